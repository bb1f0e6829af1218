"""How a run uses the machine it is on, measured before the first step on a copy of the network: the number of threads,
which library multiplies the matrices of each linear layer, whether the network is compiled."""

import copy
import itertools
import time

import torch

import compiler
import data
import products
import training
from runtime import device as devices
from runtime import distributed


def tune(config, model, dataset, kept, report):
    """Return ({"threads": in training, "eval_threads": in log steps, "products": names of the layers that oneDNN
    multiplies, "compiled": whether the network is}, the network to call in training): as asked for, as kept from before
    a resume, or as is fastest now. The model's layers take their products as the first says.

    kept: the dict that this function returned when the run began, {} if it begins now. The same choice rounds the same
    way, so a resumed run keeps it. report: called with a line for the user.
    """
    threads = config.threads or kept.get("threads")
    eval_threads = config.threads or kept.get("eval_threads")
    alone_on_cpu = distributed.size() == 1 and dataset.x_train.device.type == "cpu"
    if threads is None and alone_on_cpu:
        twin = copy.deepcopy(model)
        trainer, steps = training.Trainer(twin, config, dataset), itertools.count()
        threads = devices.fastest_thread_count(lambda: trainer.advance(next(steps), 1))
        images = data.pixels(dataset.x_test[:1000], getattr(torch, config.dtype)).requires_grad_()
        eval_threads = devices.fastest_thread_count(lambda: torch.autograd.grad(twin(images).sum(), images))
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)

    names = kept.get("products")
    if config.products != "auto":
        names = list(products.layers(model)) if config.products == "onednn" else []
    elif names is None and alone_on_cpu:
        names = products.choose(copy.deepcopy(model), config.batch_size)
    products.use(model, names or [])

    network = model
    mode = {True: "on", False: "off"}[kept["compiled"]] if config.compile == "auto" and kept else config.compile
    if distributed.size() == 1 and mode != "off":
        batch = data.pixels(dataset.x_train[:config.batch_size], getattr(torch, config.dtype))
        seconds = config.n_steps * seconds_of_a_pass(model, batch) if mode == "auto" else 0
        network = compiler.compiled(model, batch, mode, seconds, report)
    return {"threads": threads, "eval_threads": eval_threads or threads, "products": names or [],
            "compiled": network is not model}, network


def seconds_of_a_pass(model, images):
    """Return the time of a forward and a backward pass, nearly all of a convolutional network's step."""
    twin = copy.deepcopy(model)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        twin(images).sum().backward()
        times.append(time.perf_counter() - began)
    return min(times)
