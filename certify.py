"""Certified accuracy: the share of images on which no attack within an l-infinity ball can succeed, proved by CROWN.

An attack may miss, so robust_acc is an upper bound on the accuracy under the strongest attack. This is a lower bound.
"""

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attacks import ascending, attacking, ball, correct, shares
from models import MLP

TINY = 1e-20  # negligible beside the values of a network, large beside what is lost when subnormals are flushed to 0
ELEMENTS_AT_ONCE = 2**17  # of a matrix of coefficients: 1 MB stays in a core's cache


def certified_accuracy(model: nn.Module, x: Tensor, y: Tensor, epsilons: Iterable[float],
                       batch_size: int | None = None) -> list[float]:
    """Return, for each epsilon in the given order, the fraction of images that radii_certified certifies, which has the
    same arguments and errors. batch_size: images at once, by default all."""
    epsilons, size = [*epsilons], batch_size or max(1, len(x))
    return shares(torch.cat([radii_certified(model, x[i:i + size], y[i:i + size], epsilons)
                             for i in range(0, max(1, len(x)), size)]), epsilons)


def radii_certified(model: nn.Module, x: Tensor, y: Tensor, epsilons: Iterable[float]) -> Tensor:
    """Return at how many radii among 0 and epsilons each image is certified, int64 (N,): 0 if its clean prediction is
    wrong, 1 if that is right but nothing is proved at the smallest epsilon above 0, and so on.

    x, y, epsilons and errors as in attacks.radii_withstood; also ValueError for a model other than a models.MLP with
    ReLU or leaky ReLU. Batch norm is that of eval mode.

    Certified means: every image in [0, 1] that differs from x by at most epsilon in each pixel is classified as y. The
    proof is CROWN (Zhang et al. 2018, arXiv:1811.00866): linear bounds are passed backward to the image, from the
    hidden units that may change sign and then from the margins z_y - z_j, with the adaptive lower slope. An image that
    is not certified at one epsilon is not tried at a larger one.

    The proof holds for the network in exact arithmetic and as computed in its own dtype, whatever the order of the
    sums. A computed w @ h + b of n products is off by at most about (n + 1) u (|w| @ |h| + |b|), u = 2^-24 in float32
    (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1). Each layer may be off by
    1.01 (n + 16) (u + 2^-50) times that sum: 16 covers normalisation, batch norm and activation; 2^-50 covers the
    proof's own sums in float64, whose errors have the same form, in networks of up to 100 layers. Each epsilon is
    widened by 2u, because an attack rounds its images. Overflow is not covered.
    """
    if not isinstance(model, MLP) or not all(isinstance(layer, (nn.Linear, _BatchNorm, nn.ReLU, nn.LeakyReLU))
                                             for layer in model.layers):
        raise ValueError("only an MLP with relu or leaky_relu can be certified")
    radii = ascending(epsilons)
    with attacking(model, x, y, radii) as (x, y), torch.no_grad():
        counts, twin, u = correct(model(x), y).long(), copy.deepcopy(model), torch.finfo(x.dtype).eps / 2
        if x.device.type != "cuda":  # other devices may have no float64
            x, y, counts, twin = x.cpu(), y.cpu(), counts.cpu(), twin.cpu()
        layers = [*affine(twin.double())]
        for k, epsilon in enumerate(radii[1:], 1):
            left = (counts == k).nonzero().flatten()
            low, high = (twin.normalize(side).flatten(1) for side in ball(x[left].double(), epsilon + 2 * u))
            counts[left] += is_certified(layers, low, high, y[left], u)
    return counts


def affine(model: MLP) -> Iterator[tuple[Tensor, Tensor, Tensor, float | None]]:
    """Yield each layer with its batch norm: weight (out, in), bias (out,), the sum of the absolute values that make up
    the bias (out,), and the slope of the activation below 0, None after the last layer."""
    for module in model.layers:
        if isinstance(module, nn.Linear):
            weight, bias, size = module.weight.data, module.bias.data, module.bias.data.abs()
        elif isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            scale = module.weight / (module.running_var + module.eps).sqrt()
            weight, bias = scale[:, None] * weight, scale * (bias - module.running_mean) + module.bias
            size = scale.abs() * (size + module.running_mean.abs()) + module.bias.abs()
        else:
            yield weight, bias, size, getattr(module, "negative_slope", 0.0)
    yield weight, bias, size, None


def is_certified(layers: list, low: Tensor, high: Tensor, y: Tensor, u: float) -> Tensor:
    """Return whether CROWN proves that all inputs between low and high, (N, features), are classified as y, bool (N,).
    layers: from affine. u: the unit roundoff of the network's dtype."""
    box = low, high
    hidden: list[tuple[Tensor, ...]] = []
    for weight, bias, size, slope in layers:
        largest = low.abs().maximum(high.abs()) + TINY
        error = 1.01 * (weight.shape[1] + 16) * (u + 2**-50) * (largest @ weight.abs().T + size + TINY)
        if slope is None:
            break
        middle, reach = (low + high) / 2 @ weight.T + bias, (high - low) / 2 @ weight.abs().T + error
        low, high = middle - reach, middle + reach
        if hidden:  # in the first layer these are the best bounds
            for image, unit in places((low < 0) & (high > 0), weight):
                row, constant, off = weight[unit], bias[unit], error[image, unit]
                low[image, unit] = low[image, unit].maximum(least(hidden, *box, image, row, constant - off))
                high[image, unit] = high[image, unit].minimum(-least(hidden, *box, image, -row, -constant - off))
        crossing = (low < 0) & (high > 0)
        above = torch.where(crossing, (high - slope * low) / (high - low), torch.where(low < 0, slope, 1.0))
        below = torch.where(crossing, torch.where(high < -low, slope, 1.0), above)
        hidden.append((weight, bias, error, below, above, torch.where(crossing, (slope - above) * low, 0.0)))
        low, high = low.maximum(slope * low), high.maximum(slope * high)
    margins = torch.full_like(error, torch.inf)
    for image, wrong in places(torch.ones_like(margins).scatter(1, y[:, None], 0), weight):
        true = y[image]
        constant = bias[true] - bias[wrong] - error[image, true] - error[image, wrong]
        margins[image, wrong] = least(hidden, *box, image, weight[true] - weight[wrong], constant)
    return (margins > 0).all(1)


def least(hidden: list, low: Tensor, high: Tensor, image: Tensor, rows: Tensor, constant: Tensor) -> Tensor:
    """Return a lower bound (R,) of rows @ h + constant, where h is the output of the last hidden layer.

    hidden: (weight, bias, error, below, above, offset) of each hidden layer: a computed z is at most error from
    weight @ h + bias, its activation between below * z and above * z + offset; error to offset are (N, width), over the
    balls of N images. low, high: the least and greatest inputs there, (N, features). image: in which ball, (R,); rows:
    (R, width); constant: (R,).
    """
    for weight, bias, error, below, above, offset in reversed(hidden):
        constant = constant + (rows.clamp(max=0) * offset[image]).sum(1)
        rows = rows * torch.where(rows > 0, below[image], above[image])
        constant = constant + rows @ bias - (rows.abs() * error[image]).sum(1)
        rows = rows @ weight
    return constant + (rows * torch.where(rows > 0, low[image], high[image])).sum(1)


def places(mask: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Yield the rows and columns of what is set in a mask, as many at once as a row of weight for each fits a cache."""
    for part in mask.nonzero().split(max(1, ELEMENTS_AT_ONCE // weight.shape[1])):
        yield part.T
