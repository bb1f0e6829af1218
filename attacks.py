"""l-infinity attacks on classifiers of images in [0, 1]: PGD, and robust accuracy close to AutoAttack's.

They take any nn.Module that maps images to logits (N, classes), attack it in eval mode and leave it and the caller's
tensors as they were, also inside torch.inference_mode().
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import log_odds
from models import Network, evaluating

# budget: (wrong classes attacked one by one, rounds over them, factor on `steps`, reach: how far from falling an image
# may be before its class is given up, balls further out in which the attack toward a class begins). Each further class
# finds images that no number of steps on the strongest class finds; a longer reach matters for convolutions with batch
# norm, little for an MLP; a start further out matters for networks trained with squared error.
BUDGETS = {"low": (2, 1, 1, 0.1, 1), "default": (9, 1, 1, 0.3, 2), "high": (9, 2, 2, 0.5, 3)}
DEFAULT_BUDGET = "default"
# Steps toward a class, in one ball, before it can be given up as out of reach: the first goes to a corner of the
# ball, the second shows whether the way is open from there.
TRIAL_STEPS = 2
ROBUST_VERSION = 2  # raised when the attack behind robust_acc changes: values before and after are not comparable
OUTSIDE = 1.5  # the attack begins in three balls beyond the largest asked for, each larger by this factor


def pgd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, steps: int = 10, step_size: float | None = None,
        restarts: int = 1, objective: str = "exact", seed: int = 0, starts: Tensor | None = None,
        start: str = "random") -> Tensor:
    """Return adversarial images, shaped like x: l-infinity projected gradient ascent (Madry et al. 2018,
    arXiv:1706.06083), clipped to [0, 1], last iterate.

    x: images (N, ...) in [0, 1], in the model's dtype; y: true classes, int64 (N,); epsilon: radius in [0, 1], in
    pixel units. step_size: in pixel units, by default 2.5 * epsilon / steps. restarts: of their last iterates the most
    misclassified one is returned for each image. start: "random" begins at a random point of the ball, "image" at x
    itself. starts: the random points (restarts, N, ...), in [-1, 1], in units of epsilon; by default drawn by `seed`.

    objective "exact" ascends u = logsumexp over j != y of z_j, minus z_y: the log-odds of being wrong. Cross-entropy
    is softplus(u), so both have the same ascent direction; but in float32 the gradient of cross-entropy, which is
    objective "ce", loses the true logit's term and then vanishes once the softmax rounds to 1.

    Raises ValueError for an argument out of its range, shapes and dtypes that do not agree, and a model that does not
    return logits (a softmax of them, for instance), returns others in each pass (dropout that is active in eval mode),
    does not let gradients through or changes its input in place.
    """
    for name, choice, known in (("start", start, ("random", "image")), ("objective", objective, ("exact", "ce"))):
        if choice not in known:
            raise ValueError(f"unknown {name} '{choice}': choose '{known[0]}' or '{known[1]}'")
    if steps < 1 or restarts < 1 or not 0 <= (step_size or 0) < math.inf:
        raise ValueError(f"PGD needs steps >= 1, restarts >= 1 and a finite step_size >= 0, not {steps}, {restarts} "
                         f"and {step_size}")
    shape = (restarts, *x.shape)
    if start == "image":
        starts = torch.zeros(shape)
    elif starts is None:
        starts = torch.empty(shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    elif starts.shape != shape:
        raise ValueError(f"starts must have the shape (restarts, *x.shape) = {shape}, not {tuple(starts.shape)}")

    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    iterates, excesses = [], []
    with attacking(model, x, y, [epsilon]) as (x, y):
        low, high = ball(x, epsilon)
        direction = torch.empty_like(x)
        for offset in starts.to(x):
            x_adv = torch.add(x, offset, alpha=epsilon).clamp_(low, high)
            for _ in range(steps):
                logits = model(x_adv.requires_grad_())
                loss = F.cross_entropy(logits, y, reduction="sum") if objective == "ce" else log_odds(logits, y).sum()
                torch.sign(input_gradient(loss, x_adv), out=direction)
                x_adv = x_adv.detach().add_(direction, alpha=step_size).clamp_(low, high)
            if restarts == 1:
                return x_adv
            with torch.no_grad():
                logits = model(x_adv)
            excess = wrong_logits(logits, y).amax(1) - pick(logits, y)
            excesses.append(torch.where(excess.isnan(), torch.inf, excess))  # a wrong answer, as in correct()
            iterates.append(x_adv)
        return torch.stack(iterates)[torch.stack(excesses).argmax(0), torch.arange(len(x), device=x.device)]


def zero_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return whether cross-entropy, as PyTorch computes it, has an input gradient of exactly zero at x, bool (N,).

    Arguments and errors as in pgd. PGD from such an image never moves, and counts it as robust.
    """
    with attacking(model, x, y, []) as (x, y):
        x.requires_grad_()
        gradient = input_gradient(F.cross_entropy(model(x), y, reduction="sum"), x)
    return (gradient == 0).flatten(1).all(1)


def robust_accuracy(model: nn.Module, x: Tensor, y: Tensor, epsilons: Iterable[float], steps: int = 10,
                    budget: str = DEFAULT_BUDGET, batch_size: int | None = None) -> list[float]:
    """Return, for each epsilon in the given order, the fraction of images that withstand the attack of radii_withstood,
    which has the same arguments and errors. batch_size: images attacked together, by default all.

    The result never rises with epsilon and never exceeds the accuracy on x. It is deterministic. An image's outcome
    depends on the others in its batch only through the last bits of the logits, which differ with the batch's size.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    epsilons, size = [*epsilons], batch_size or max(1, len(x))
    withstood = torch.cat([radii_withstood(model, x[i:i + size], y[i:i + size], epsilons, steps, budget)
                           for i in range(0, max(1, len(x)), size)])
    return shares(withstood, epsilons)


def radii_withstood(model: nn.Module, x: Tensor, y: Tensor, epsilons: Iterable[float], steps: int = 10,
                    budget: str = DEFAULT_BUDGET) -> Tensor:
    """Return how many radii among 0 and epsilons each image withstands, int64 (N,): 0 if its clean prediction is wrong,
    1 if that is right but falls at the smallest epsilon above 0, and so on.

    x, y and errors as in pgd; epsilons: radii in [0, 1], in pixel units and any order. steps: at most this many steps
    toward one class in one ball ("high": twice as many). budget: a key of BUDGETS.

    Every image starts in a ball about three times larger than the largest asked for. A misclassified iterate moves it
    to the next smaller ball, where the attack goes on from the same point: so only one epsilon costs the many steps of
    an attack that fails. The steps ascend z_j - z_y, first with the strongest wrong class at each step as j, then with
    each wrong class in turn (targeted margins, as in APGD-T: Croce and Hein 2020, arXiv:2003.01690). Each class begins
    some balls outside of the one that withstood the classes before, because an image may lie on a plateau where no
    gradient in its own ball leads to the decision boundary, as after long training with squared error. What withstands
    the attack in a ball larger than all that are asked for is attacked again in those alone. The first step crosses
    the ball, the last ones are small.
    """
    if steps < 1 or budget not in BUDGETS:
        raise ValueError(f"robust accuracy needs steps >= 1 and a budget among {', '.join(BUDGETS)}, not {steps} and "
                         f"'{budget}'")
    epsilons = ascending(epsilons)
    outside = [radius for k in (1, 2, 3) if 0 < (radius := epsilons[-1] * OUTSIDE**k) <= 1]
    with attacking(model, x, y, epsilons) as (x, y), torch.no_grad():
        radii, asked = x.new_tensor([*epsilons, *outside]), len(epsilons)
        images = Images(torch.arange(len(x), device=x.device), x, y, withstood=torch.where(
            correct(model(x), y), len(radii), 0), points=x, target=y, age=torch.zeros_like(y))
        attack_each_class(model, images, radii, steps, *BUDGETS[budget])
        left = (images.withstood > asked).nonzero().flatten()
        if len(left):  # the attack may find in a smaller ball what it misses in a larger one
            rest = images.rows(left)
            rest.place, rest.points = torch.arange(len(left), device=x.device), rest.x
            rest.withstood.fill_(asked)
            attack_each_class(model, rest, radii[:asked], steps, *BUDGETS[budget])
            images.withstood[left] = rest.withstood
    return images.withstood


def attack_each_class(model: nn.Module, images: "Images", radii: Tensor, steps: int, classes: int, rounds: int,
                      step_factor: int, reach: float, further: int) -> None:
    """Attack every image toward the strongest wrong class, then toward so many classes in turn, and lower `withstood`.
    classes, rounds, step_factor, reach, further: as in BUDGETS."""
    limits = radii, steps * step_factor, reach
    for _ in range(rounds):
        end = drop_while_fallen(model, images, True, *limits)
        logits = wrong_logits(model(end), images.y)
        for target in logits.topk(min(classes, logits.shape[1] - 1)).indices.T:
            withstood, images.target = images.withstood, target
            images.withstood = torch.where(withstood > 1, (withstood + further).clamp(max=len(radii)), withstood)
            drop_while_fallen(model, images, False, *limits)
            images.withstood = images.withstood.minimum(withstood)
        images.points = 2 * images.x - end  # the next round starts from the opposite side


@dataclass
class Images:
    """Images under attack: one row of each tensor for each of them."""

    place: Tensor  # in the batch
    x: Tensor
    y: Tensor
    withstood: Tensor  # how many radii so far; the last of these is the radius of the present ball
    points: Tensor  # in the ball: the iterates
    target: Tensor  # the class toward which the steps go
    age: Tensor  # steps taken in the present ball

    def rows(self, index: Tensor) -> "Images":
        return Images(*(values.index_select(0, index) for values in vars(self).values()))


def drop_while_fallen(model: nn.Module, images: Images, strongest: bool, radii: Tensor, steps: int, reach: float
                      ) -> Tensor:
    """Attack every image from its point, clipped to the largest ball that it withstands so far, and lower `withstood`,
    in place, at each misclassified iterate, until `steps` steps in one ball have not misclassified it or, by the linear
    model, a step of reach * radius would not. Return the last points. strongest: whether the target is the strongest
    wrong class at each step.
    """
    end = images.points.clone()
    active = images.rows((images.withstood > 1).nonzero().flatten())  # moved together only when some are done
    low, high = ball(active.x, radii[active.withstood - 1])
    active.points.clamp_(low, high)
    while len(active.place) > 0:
        with torch.enable_grad():
            logits = model(active.points.requires_grad_())
            if strongest:
                active.target = wrong_logits(logits.detach(), active.y).argmax(1)
            excess = pick(logits, active.target) - pick(logits, active.y)
            gradient = input_gradient(excess.sum(), active.points)
        fallen = ~correct(logits, active.y)
        active.withstood -= fallen.long()
        active.age.masked_fill_(fallen, 0)
        radius = radii[active.withstood - 1]
        out_of_reach = -excess > reach * radius * gradient.flatten(1).abs().sum(1)
        going_on = (active.withstood > 1) & (active.age < steps) & ~(out_of_reach & (active.age >= TRIAL_STEPS))
        size = like_images(2 * (1 - active.age / steps) * radius, active.x)
        low, high = ball(active.x, radius)
        active.points = active.points.detach().addcmul_(gradient.sign(), size).clamp_(low, high)
        active.age += 1
        kept = going_on.nonzero().flatten()  # the only look at what the device has found
        if len(kept) < len(active.place):
            images.withstood.index_copy_(0, active.place, active.withstood)
            end.index_copy_(0, active.place, active.points)
            active = active.rows(kept)
    return end


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Return whether the prediction is right, bool (N,): a row of logits with a NaN predicts nothing."""
    largest, prediction = logits.max(1)  # NaN if any is
    return (prediction == y) & ~largest.isnan()


def ascending(epsilons: Iterable[float]) -> list[float]:
    """Return the radii that radii_withstood counts: 0 and the epsilons, each once."""
    return sorted({0.0, *epsilons})


def shares(counts: Tensor, epsilons: Sequence[float]) -> list[float]:
    """Return, for each epsilon in the given order, the fraction of images whose count of radii, (N,), reaches it."""
    radii = ascending(epsilons)
    return [(counts > radii.index(epsilon)).sum().item() / len(counts) for epsilon in epsilons]


def ball(x: Tensor, radius: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value of each pixel in the ball, within [0, 1]. radius: one for all, or (N,)"""
    radius = like_images(radius, x) if isinstance(radius, Tensor) else radius
    return (x - radius).clamp_(min=0), (x + radius).clamp_(max=1)


def pick(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def wrong_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Return the logits with -inf in the true class's place."""
    return logits.scatter(1, y[:, None], -torch.inf)


def like_images(values: Tensor, x: Tensor) -> Tensor:
    """Return one value for each image, shaped to broadcast over the images."""
    return values.view(-1, *[1] * (x.dim() - 1))


def input_gradient(loss: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of loss with respect to x, a leaf. ValueError if there is none."""
    if loss.requires_grad:
        loss.backward()  # not torch.autograd.grad, which reentrant checkpointing refuses
    gradient, x.grad = x.grad, None
    if gradient is None:
        raise ValueError("the model's logits have no gradient with respect to its images")
    return gradient


@contextmanager
def attacking(model: nn.Module, x: Tensor, y: Tensor, epsilons: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Check the arguments (the model on a few images), hold the model ready for input gradients, and give copies of
    x and y that autograd accepts even if x and y were made in inference mode."""
    for epsilon in epsilons:
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon must lie in [0, 1], like the pixels (8/255, not 8), not {epsilon}")
    if x.dim() < 2 or len(x) == 0 or y.shape != x.shape[:1]:
        raise ValueError(f"an attack needs images (N, ...) and as many labels (N,), not {tuple(x.shape)} and "
                         f"{tuple(y.shape)}")
    if not (x.is_floating_point() and x.min() >= 0 and x.max() <= 1):  # comparisons with NaN are false
        raise ValueError("an attack needs images in [0, 1], of a floating-point dtype")
    if y.dtype != torch.int64 or y.device != x.device:
        raise ValueError(f"an attack needs int64 labels on the images' device, {x.device}, not {y.dtype} on {y.device}")
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("a model made inside torch.inference_mode() has no gradients: make it outside")
    with torch.inference_mode(False), evaluating(model), torch.enable_grad():
        x, y = x.detach().clone(), y.clone()
        check_model(model, x[::max(1, len(x) // 4)][:4], y)
        yield x, y


def check_model(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless an attack on the model means something. x: a few images; y: all labels."""
    images = torch.cat([x, 1 - x]).requires_grad_()
    probe = images.clone()  # not a leaf: the model may change it
    logits, n = model(probe), len(probe)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != n or logits.shape[1] < 2:
        found = f"{tuple(logits.shape)} for {n} images" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits, one tensor (N, 2 or more classes), not {found}")
    if probe._version > 0:
        raise ValueError("the model changes its input in place: use x - 0.5, say, not x.sub_(0.5)")
    input_gradient(logits.sum(), images)
    if not 0 <= y.min() <= y.max() < logits.shape[1]:
        raise ValueError(f"labels must lie between 0 and {logits.shape[1] - 1}, the model's last class, not "
                         f"{y.min()} to {y.max()}")
    with torch.no_grad():
        again, rounding = model(probe.detach()), torch.finfo(logits.dtype).eps
        if not torch.allclose(logits, again, rtol=0, atol=rounding**0.5 * logits.nan_to_num(0, 0, 0).abs().max(),
                              equal_nan=True):
            raise ValueError("the model's outputs differ between two passes over the same images: turn its dropout or "
                             "noise off in eval mode")
        # A constant model, whose rows are all the same, may have any outputs; so may ours, after squared error.
        sums_to_1 = ((logits.sum(1) - 1).abs() < max(1e-3, rounding)).all() and (logits != logits[0]).any()
        if sums_to_1 and 0 <= logits.min() and logits.max() <= 1 and not isinstance(model, Network):
            raise ValueError("the model returns probabilities (outputs in [0, 1] that sum to 1 for each image): return "
                             "the logits before the softmax, or F.log_softmax of them; a softmax rounds to 1 and hides "
                             "adversarial images")
