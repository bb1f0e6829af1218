"""The training step: a batch, the loss and its gradient, the optimizer. On a GPU it is captured once and replayed."""

import math

import torch

import data
from losses import LOSSES
from runtime import cuda_graph, distributed
from runtime.seeds import seed_for


def adam(kind):
    return lambda parameters, config, captured: kind(
        parameters, lr=config.lr, weight_decay=config.weight_decay, eps=config.adam_eps, fused=True,
        capturable=captured)


def sgd(parameters, config, captured):
    return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)


# name: optimizer(parameters, config, captured: whether its steps are going to be captured in a CUDA graph)
OPTIMIZERS = {"adamw": adam(torch.optim.AdamW), "adam": adam(torch.optim.Adam), "sgd": sgd}


def captures_steps(config, device):
    """Whether the steps are replayed as CUDA graphs; with several processes they are not: these exchange gradients."""
    return device.type == "cuda" and config.cuda_graph and distributed.size() == 1


def batch_order(seed, block, epochs, n_images, batch_size):
    """Return the rows (epochs * steps per epoch * batch_size,) of the batches of `epochs` epochs, on the CPU.

    Each epoch is a fresh permutation of the n_images without its incomplete last batch. A function of its arguments
    alone: the batches are the same on every device, and after a resume those of the uninterrupted run. Several epochs
    make a block because seeding a generator for each would take longer than a step.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "batches", block))
    used = n_images // batch_size * batch_size
    return torch.cat([torch.randperm(n_images, generator=generator)[:used] for _ in range(epochs)])


@torch.no_grad()
def orthogonalise(parameters):
    """Take from each tensor's gradient its component along the weights and scale it back to its norm, in place.

    Prieto et al. 2025, "Grokking at the edge of numerical stability" (arXiv:2501.04697), the optimizers' ⊥Grad: without
    it cross-entropy can always fall by scaling the logits up, which is what ends in a saturated softmax.
    """
    weights, gradients = zip(*((p, p.grad) for p in parameters if p.grad is not None), strict=True)
    tiny = torch.finfo(gradients[0].dtype).tiny
    for weight, gradient in zip(weights, gradients, strict=True):
        along = (weight * gradient).sum() / (weight.square().sum() + tiny)
        before = torch.linalg.vector_norm(gradient)
        gradient.sub_(along * weight)
        gradient.mul_(before / (torch.linalg.vector_norm(gradient) + tiny))


class Trainer:
    """Makes the training steps of a run.

    model: trained in place. config: the flags as used. dataset: on the device. report: called with a line if a capture
    fails. network: what to call in training in place of model, such as a compiled model.

    optimizer: what a checkpoint saves beside the model. finite_steps: tensor, the number of steps before the first
    whose loss was not finite. largest_loss: tensor, the largest batch loss since it was last set to -inf; in a
    distributed run it is that of this process's share of the batches.
    """

    def __init__(self, model, config, dataset, report=print, network=None):
        device, self.dtype = dataset.x_train.device, getattr(torch, config.dtype)
        self.config, self.dataset, self.parameters = config, dataset, list(model.parameters())
        self.network = distributed.wrap(model if network is None else network, device)
        captured = captures_steps(config, device)
        self.optimizer = OPTIMIZERS[config.optimizer](self.parameters, config, captured)
        self.loss_function = LOSSES[config.loss]
        self.epochs_in_block = max(1, 65_536 // config.train_size)
        self.block_steps = self.epochs_in_block * (config.train_size // config.batch_size)
        self.block = None
        # Tensors that stay where they are, so that a captured step finds them.
        self.order = torch.empty(self.block_steps * config.batch_size, dtype=torch.int64, device=device)
        self.first_batch = torch.arange(config.batch_size, device=device)[distributed.shard(config.batch_size)]
        self.positions = self.first_batch.clone()
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.all_finite = torch.ones((), dtype=torch.bool, device=device)
        self.largest_loss = torch.full((), -math.inf, dtype=self.dtype, device=device)
        self.repeat = cuda_graph.repeater(self.step, report) if captured else self.repeat_step

    def advance(self, step, n):
        """Make the n training steps that follow `step`."""
        while n > 0:
            block, offset = divmod(step, self.block_steps)
            if block != self.block:
                self.load_order(block)
            torch.add(self.first_batch, offset * self.config.batch_size, out=self.positions)
            length = min(n, self.block_steps - offset)
            self.repeat(length)
            step, n = step + length, n - length

    def load_order(self, block):
        config = self.config
        order = batch_order(config.seed, block, self.epochs_in_block, config.train_size, config.batch_size)
        # From pinned memory the copy waits its turn on the GPU, and the host does not wait for it.
        self.order.copy_(order.pin_memory() if self.order.is_cuda else order, non_blocking=True)
        self.block = block

    def repeat_step(self, n):
        for _ in range(n):
            self.step()

    def step(self):
        """Make the step on the batch at self.positions; reads nothing back from the device."""
        rows = self.order.index_select(0, self.positions)
        self.positions.add_(self.config.batch_size)
        images = data.pixels(self.dataset.x_train.index_select(0, rows), self.dtype)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_function(self.network(images), self.dataset.y_train.index_select(0, rows))
        loss.backward()
        if self.config.orthogonal_gradient:
            orthogonalise(self.parameters)
        self.optimizer.step()
        loss = loss.detach()
        self.finite_steps.add_(self.all_finite.logical_and_(loss < math.inf))  # false for NaN, too
        torch.maximum(self.largest_loss, loss, out=self.largest_loss)
