"""How a run uses the machine it is on, measured before the first step on a copy of the network: the number of threads,
and which library multiplies the matrices of each linear layer."""

import copy
import itertools

import torch

import data
import machine
import parallel
import products
import training


def tune(config, model, dataset, kept):
    """Return {"threads": in training, "eval_threads": in log steps, "products": names of the layers that oneDNN
    multiplies}: as asked for, as kept from before a resume, or as is fastest now.

    kept: what this function returned when the run began, {} if it begins now. The same choice rounds the same way, so a
    resumed run keeps it.
    """
    threads = config.threads or kept.get("threads")
    eval_threads = config.threads or kept.get("eval_threads")
    alone_on_cpu = parallel.size() == 1 and dataset.x_train.device.type == "cpu"
    twin = copy.deepcopy(model)
    if threads is None and alone_on_cpu:
        trainer, steps = training.Trainer(twin, config, dataset), itertools.count()
        threads = machine.fastest_thread_count(lambda: trainer.advance(next(steps), 1))
        images = data.pixels(dataset.x_test[:1000], getattr(torch, config.dtype)).requires_grad_()
        eval_threads = machine.fastest_thread_count(lambda: torch.autograd.grad(twin(images).sum(), images))
    threads = threads or torch.get_num_threads()

    names = kept.get("products")
    if config.products != "auto":
        names = list(products.layers(model)) if config.products == "onednn" else []
    elif names is None and alone_on_cpu:
        torch.set_num_threads(threads)
        names = products.choose(twin, config.batch_size)
    return {"threads": threads, "eval_threads": eval_threads or threads, "products": names or []}
