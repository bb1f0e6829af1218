"""The matrix products of linear layers on the CPU, by MKL or by oneDNN, whichever is faster here.

PyTorch takes MKL, which on AMD keeps to its AVX2 code; the oneDNN that PyTorch carries for its own compiler uses
AVX-512 where there is any, at twice the speed. Rounding errors are of the same size (784 products summed: 3e-7 with
MKL, 5e-7 with oneDNN). oneDNN prepares its code anew for each batch size, in a millisecond, and keeps the last
thousand: the batch sizes should be few.
"""

import contextlib
import copy
import statistics
import time

import torch
from torch import nn
from torch.autograd.function import once_differentiable

MARGIN = 1.1  # oneDNN is taken where it is faster by this factor, so that noise does not decide
SECONDS = 0.1  # of measuring for each shape of layer


class Linear(nn.Linear):
    """nn.Linear, its forward product and the two of its backward pass by oneDNN. float32 on the CPU, as use() sees to.

    A layer becomes one, and an nn.Linear again, by assigning its __class__: parameters and state dict are the same.
    """

    def forward(self, x):
        # Anything but a batch of rows is PyTorch's own affair, and so is a network that was moved after use().
        if x.dim() != 2 or x.dtype != torch.float32 or x.device.type != "cpu" or len(x) == 0:
            return super().forward(x)
        return Products.apply(x, self.weight, self.bias)


class Products(torch.autograd.Function):
    """x @ weight.T + bias for x (N, in), weight (out, in), bias (out,) or None."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (product(gradient, weight.t()) if of_x else None,
                product(gradient.t(), x.t()) if of_weight else None,
                gradient.sum(0) if of_bias else None)


def product(a, b, bias=None):
    """Return a @ b.T + bias by oneDNN, which takes transposed operands as they are."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def available():
    """Whether this PyTorch has the operator; it is not part of the public interface."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def layers(model):
    """Return {name: layer} of the linear layers that can go either way."""
    return {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Linear)
            and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu" and available()}


def use(model, names):
    """Let the products of the linear layers of these names go through oneDNN and all others' through MKL.

    Names of layers for which oneDNN is not to be had here are passed over.
    """
    for name, layer in layers(model).items():
        layer.__class__ = Linear if name in names else nn.Linear


@contextlib.contextmanager
def by_mkl(model):
    """Let all products go through MKL for a while."""
    names = [name for name, layer in layers(model).items() if type(layer) is Linear]
    use(model, [])
    try:
        yield
    finally:
        use(model, names)


def choose(model, batch_size):
    """Return the names of the linear layers that are faster with oneDNN, as measured now, at the present number of
    threads: forward and backward pass on batches of this size. It takes 0.1 s for each shape among the layers."""
    gains = {}
    for layer in layers(model).values():
        shape = layer.weight.shape
        if shape not in gains:
            gains[shape] = gain(copy.deepcopy(layer), batch_size)
    return [name for name, layer in layers(model).items() if gains[layer.weight.shape] > MARGIN]


def gain(layer, batch_size):
    """Return how many times faster the layer is with oneDNN: the median over turns."""
    x = torch.ones(batch_size, layer.in_features, requires_grad=True)
    gradient = torch.ones(batch_size, layer.out_features)

    def clock(kind):
        layer.__class__ = kind
        start = time.perf_counter()
        torch.autograd.grad(layer(x), [x, *layer.parameters()], gradient)
        return time.perf_counter() - start

    for kind in (nn.Linear, Linear):
        clock(kind)  # the first pass prepares the code
    ratios, start = [], time.perf_counter()
    while len(ratios) < 5 or time.perf_counter() - start < SECONDS:
        ratios.append(clock(nn.Linear) / clock(Linear))
    return statistics.median(ratios)
