"""The losses a network is trained with, each loss(logits, labels) -> mean over the images, and the log-odds.

Cross-entropy is softplus(u), where u are the log-odds of being wrong. In float32 the softmax of a network far past
interpolation rounds to exactly 1 for the true class: F.cross_entropy's gradient then loses the true logit's term and
keeps the others', while u saturates nowhere.
"""

import torch
import torch.nn.functional as F


def log_odds(logits, y):
    """Return u (N,): the log-odds of being wrong, logsumexp over j != y of z_j, minus z_y.

    logits: (N, classes), two classes or more; y: true classes (N,).
    """
    return odds(logits, y[:, None])[0].squeeze(1)


def odds(logits, y):
    """Return the log-odds (N, 1); exp(z_j - the largest wrong z), 0 for the true class; its sum (N, 1). y: (N, 1)."""
    wrong = logits.scatter(1, y, -torch.inf)
    strongest = wrong.detach().amax(1, keepdim=True)
    share = (wrong - strongest).exp()
    total = share.sum(1, keepdim=True)
    # The difference of the two logits first: it is exact where they are close, however large they are.
    return strongest - logits.gather(1, y) + total.log(), share, total


class ExactCrossEntropy(torch.autograd.Function):
    """The mean of softplus(log_odds), its gradient written out: in a small network's step each kernel counts."""

    @staticmethod
    def forward(ctx, logits, y):
        u, share, total = odds(logits, y[:, None])
        ctx.save_for_backward(u, share, total, y[:, None])
        return F.softplus(u, threshold=50).mean()  # above its threshold it is u; 20, the default, is soon for float64

    @staticmethod
    def backward(ctx, gradient):
        u, share, total, y = ctx.saved_tensors
        wrong = u.sigmoid() * (gradient / len(u))
        return (share * (wrong / total)).scatter_(1, y, -wrong), None


def exact_cross_entropy(logits, y):
    """Cross-entropy whose value and gradient keep every digit, however sure the network is."""
    return ExactCrossEntropy.apply(logits, y)


def squared_error(logits, y):
    """Mean squared error on one-hot targets, over images and classes."""
    return F.mse_loss(logits, torch.zeros_like(logits).scatter_(1, y[:, None], 1))


def stablemax(logits, y):
    """-log(s(z_y) / sum of s(z_j)), s(x) = x + 1 for x >= 0, 1 / (1 - x) below (Prieto et al., arXiv:2501.04697)."""
    side = torch.where(logits < 0, -1.0, 1.0)
    return exact_cross_entropy(side * (side * logits).log1p(), y)  # of log s(x): nothing overflows or rounds to 1


LOSSES = {"ce": F.cross_entropy, "exact_ce": exact_cross_entropy, "mse": squared_error, "stablemax": stablemax}
