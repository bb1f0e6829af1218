"""The losses a network is trained with, each loss(logits, labels) -> mean over the images, and the log-odds.

Cross-entropy is softplus(u), where u are the log-odds of being wrong. In float32 the softmax of a network far past
interpolation rounds to exactly 1 for the true class: the gradient of F.cross_entropy then loses the true logit's term
and keeps the others, while u never saturates.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Return u (N,): the log-odds of being wrong, logsumexp over j != y of z_j, minus z_y.

    logits: (N, classes), two classes or more; y: true classes (N,).
    """
    return odds(logits, y[:, None])[0].squeeze(1)


def one_hot(logits: Tensor, y: Tensor) -> Tensor:
    """Return whether each class is the true one, bool like logits. A GPU selects by it in one kernel; to scatter a
    tensor, or to go back through a gather, it sorts under --deterministic. y: (N, 1)."""
    return torch.arange(logits.shape[1], device=logits.device) == y


def odds(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-odds (N, 1); exp(z_j - the largest wrong z), 0 for the true class; its sum (N, 1). y: (N, 1)."""
    wrong = logits.scatter(1, y, -torch.inf)
    strongest = wrong.detach().amax(1, keepdim=True)
    share = (wrong - strongest).exp()
    total = share.sum(1, keepdim=True)
    # The difference of the two logits first: it is exact where they are close, however large they are.
    return strongest - logits.gather(1, y) + total.log(), share, total


class ExactCrossEntropy(torch.autograd.Function):
    """The mean of softplus(log_odds), with its gradient written out: a small network's step is mostly kernel calls."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
        u, share, total = odds(logits, y[:, None])
        ctx.save_for_backward(logits, y[:, None], u, share, total)
        return F.softplus(u, threshold=50).mean()  # u itself above the threshold; the default, 20, costs float64 digits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, y, u, share, total = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated: as a function of the logits
            u, share, total = odds(logits, y)
        wrong = u.sigmoid() * (gradient / len(u))
        return torch.where(one_hot(share, y), -wrong, share * (wrong / total)), None


def exact_cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return cross-entropy whose value and gradient keep every digit until they underflow, in float32 from a margin of
    about 88 on.

    label_smoothing: the target is 1 - label_smoothing at the true class plus label_smoothing / classes at every class.
    """
    loss = ExactCrossEntropy.apply(logits, y)
    if label_smoothing:
        true = torch.where(one_hot(logits, y[:, None]), logits, 0).sum(1, keepdim=True)
        loss = loss + label_smoothing * (true - logits).mean()
    return loss


def squared_error(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error on one-hot targets, over images and classes."""
    return F.mse_loss(logits, torch.zeros_like(logits).scatter_(1, y[:, None], 1))


def stablemax(logits: Tensor, y: Tensor) -> Tensor:
    """-log(s(z_y) / sum of s(z_j)), s(x) = x + 1 for x >= 0, 1 / (1 - x) below (Prieto et al., arXiv:2501.04697)."""
    side = torch.where(logits < 0, -1.0, 1.0)
    return exact_cross_entropy(side * (side * logits).log1p(), y)  # of log s(x): nothing overflows or rounds to 1


LOSSES: dict[str, Callable[..., Tensor]] = {
    "ce": F.cross_entropy, "exact_ce": exact_cross_entropy, "mse": squared_error, "stablemax": stablemax}


def build_loss(name: str, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of this name, with its targets smoothed (Szegedy et al. 2016, arXiv:1512.00567, Section 7).

    Raises ValueError for an unknown name, smoothing outside [0, 1), and smoothing of a loss other than cross-entropy.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss '{name}': choose from {', '.join(LOSSES)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), not {label_smoothing}")
    if not label_smoothing:
        return LOSSES[name]
    if name not in ("ce", "exact_ce"):
        raise ValueError(f"label_smoothing needs the loss ce or exact_ce, not {name}")
    return partial(LOSSES[name], label_smoothing=label_smoothing)
