"""l-infinity attacks on classifiers of images in [0, 1]: PGD, and robust accuracy close to AutoAttack's.

Both ascend the input's gradient only: parameters get none, and the model is attacked in eval mode and left as it was.
"""

import math

import torch
import torch.nn.functional as F

from losses import log_odds
from models import evaluating

# budget: (wrong classes attacked one by one, rounds over them, factor on `steps`, reach: how far from falling an image
# may be before its class is given up). README.md has what each costs and finds. Each further class finds images that
# no number of steps or restarts on the strongest class alone finds; a longer reach matters on convolutions with batch
# norm, little on an MLP.
BUDGETS = {"low": (2, 1, 1, 0.1), "default": (9, 1, 1, 0.3), "high": (9, 2, 2, 0.5)}
DEFAULT_BUDGET = "default"
# Steps toward a class, in one ball, before it can be given up as out of reach: the first goes to a corner of the
# ball, the second shows whether the way is open from there.
PATIENCE = 2


def pgd(model, x, y, epsilon, steps=10, step_size=None, restarts=1, objective="exact", seed=0, starts=None,
        start="random"):
    """Return adversarial images, shaped like x: l-infinity projected gradient ascent (Madry et al. 2018,
    arXiv:1706.06083), clipped to [0, 1], last iterate.

    x: images (N, ...) in [0, 1], in the model's dtype; y: true classes (N,); epsilon: radius in pixel units.
    step_size: in pixel units, by default 2.5 * epsilon / steps. restarts: for each image the last iterate that is the
    most misclassified of this many runs. starts: (restarts, N, ...), uniform in [-1, 1], the random points in units
    of epsilon; drawn from `seed` if not given. start: "random" begins at a random point of the ball, "image" at
    x itself; where the gradient at x is exactly zero, an attack that begins there never moves.

    objective "exact" ascends u = logsumexp over j != y of z_j, minus z_y: the log-odds of being wrong. Cross-entropy
    is softplus(u), so both have the same ascent direction; but in float32 the gradient of cross-entropy, which is
    objective "ce", loses the true logit's term and then vanishes once the softmax rounds to 1.

    Raises ValueError for an epsilon or step_size that is negative or not finite, steps or restarts below 1, an
    unknown objective or start, images outside [0, 1], and shapes that do not agree.
    """
    check_images(x, y)
    check_radius("epsilon", epsilon)
    if start not in ("random", "image"):
        raise ValueError(f"unknown start '{start}': choose 'random' or 'image'")
    if objective not in ("exact", "ce"):
        raise ValueError(f"unknown objective '{objective}': choose 'exact' or 'ce'")
    if steps < 1 or restarts < 1:
        raise ValueError(f"PGD needs steps >= 1 and restarts >= 1, not {steps} and {restarts}")
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    check_radius("step_size", step_size)
    shape = (restarts, *x.shape)
    if start == "image":
        starts = torch.zeros(shape)
    elif starts is None:
        starts = torch.empty(shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    elif starts.shape != shape:
        raise ValueError(f"starts must have the shape (restarts, *x.shape) = {shape}, not {tuple(starts.shape)}")

    x, best, best_excess = x.detach(), None, None
    low, high = ball(x, epsilon)
    direction = torch.empty_like(x)
    with evaluating(model), torch.enable_grad():
        for offset in starts.to(x):
            x_adv = torch.add(x, offset, alpha=epsilon).clamp_(low, high)
            for _ in range(steps):
                x_adv.requires_grad_()
                logits = model(x_adv)
                loss = (F.cross_entropy(logits, y, reduction="sum") if objective == "ce"
                        else log_odds(logits, y).sum())
                gradient, = torch.autograd.grad(loss, x_adv)
                torch.sign(gradient, out=direction)
                x_adv = x_adv.detach().add_(direction, alpha=step_size).clamp_(low, high)
            if restarts == 1:
                return x_adv
            with torch.no_grad():
                logits = model(x_adv)
            excess = wrong_logits(logits, y).amax(1) - pick(logits, y)
            excess = torch.where(excess.isnan(), torch.inf, excess)  # a wrong answer, as in correct()
            if best is None:
                best, best_excess = x_adv, excess
            worse = excess > best_excess
            best = torch.where(like_images(worse, x), x_adv, best)
            best_excess = torch.where(worse, excess, best_excess)
    return best


def zero_gradient(model, x, y):
    """Return whether cross-entropy, as PyTorch computes it, has an input gradient of exactly zero at x, bool (N,).

    x and y as in pgd. There PGD from the image itself does not move, and the image counts as robust.
    """
    with evaluating(model), torch.enable_grad():
        x = x.detach().requires_grad_()
        gradient, = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return (gradient == 0).flatten(1).all(1)


def robust_accuracy(model, x, y, epsilons, steps=10, budget=DEFAULT_BUDGET, batch_size=None):
    """Return, for each epsilon in the given order, the fraction of images (a float) that withstand the attack of
    ranks, which has the same arguments and errors.

    An image counts at epsilon only if its clean prediction is right and no iterate of the attack, at this epsilon or
    a smaller one of the grid, is misclassified: the result never rises with epsilon and never exceeds the accuracy
    on x. It is deterministic, and no image's outcome depends on the others in its batch.

    batch_size: images attacked together, by default all.
    """
    check_images(x, y)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    parts = zip(x.split(batch_size or len(x)), y.split(batch_size or len(x)), strict=True)
    rank = torch.cat([ranks(model, *part, epsilons, steps, budget) for part in parts])
    radii = ascending(epsilons)
    return [(rank > radii.index(epsilon)).sum().item() / len(x) for epsilon in epsilons]


def ranks(model, x, y, epsilons, steps=10, budget=DEFAULT_BUDGET):
    """Return for each image the number (int64, (N,)) of radii among 0 and epsilons that it withstands: 0 if its clean
    prediction is wrong, 1 if that is right but falls at the smallest epsilon above 0, and so on.

    x: images (N, ...) in [0, 1], in the model's dtype; y: true classes (N,); epsilons: radii in pixel units, 0
    allowed, in any order. steps: at most this many steps toward one class in one ball ("high": twice as many).
    budget: a key of BUDGETS.

    Every image starts in the largest ball. An iterate that is misclassified drops it into the next smaller one,
    where the attack goes on from the same point: so it pays the many steps of an attack that fails for one epsilon,
    not for each. The steps ascend z_j - z_y, first with the strongest wrong class of the moment as j, then with
    each wrong class in turn (targeted margins, as in APGD-T: Croce and Hein 2020, arXiv:2003.01690); a class that
    was out of reach in a larger ball is not tried again. The first step crosses the ball, the last ones are small.

    Raises ValueError for an epsilon that is negative or not finite, steps below 1, an unknown budget, images
    outside [0, 1], and shapes that do not agree.
    """
    check_images(x, y)
    for epsilon in epsilons:
        check_radius("epsilon", epsilon)
    if steps < 1:
        raise ValueError(f"robust accuracy needs steps >= 1, not {steps}")
    if budget not in BUDGETS:
        raise ValueError(f"unknown budget '{budget}': choose from {', '.join(BUDGETS)}")

    classes, rounds, step_factor, reach = BUDGETS[budget]
    x, radii = x.detach(), x.new_tensor(ascending(epsilons))
    limits = radii, steps * step_factor, reach
    with evaluating(model), torch.no_grad():
        rank = torch.where(correct(model(x), y), len(radii), 0)
        start = x
        for _ in range(rounds):
            end = drop_while_fallen(model, x, y, start, None, rank, *limits)
            logits = wrong_logits(model(end), y)
            for target in logits.topk(min(classes, logits.shape[1] - 1)).indices.T:
                drop_while_fallen(model, x, y, start, target, rank, *limits)
            start = 2 * x - end  # the next round sets out from the other side
    return rank


def drop_while_fallen(model, x, y, start, target, rank, radii, steps, reach):
    """Attack every image in the largest ball that it withstands so far, of radius radii[rank - 1], and lower its rank,
    in place, at each misclassified iterate, until `steps` steps in one ball have not misclassified it or are not
    going to. Return the last points.

    start: the first points, drawn into the balls. target: the wrong class (N,) to go for, or None for the strongest
    one at each step. reach: the target is given up when the linear model says that a step of reach * radius would
    not get there.
    """
    end = start.clone()
    active = (rank > 1).nonzero().flatten()

    def rows(values, index):  # twice as fast as values[index]
        return values.index_select(0, index)

    # The active images lie together and are moved when some are done, not at every step.
    labels, held = rows(y, active), rows(rank, active)
    goal = labels if target is None else rows(target, active)
    low, high = ball(rows(x, active), like_images(radii[held - 1], x))
    points = rows(start, active).clamp_(low, high)
    ages, iteration = torch.zeros_like(held), 0  # steps taken in the present ball, and in all
    while len(active) > 0:
        with torch.enable_grad():
            logits = model(points.requires_grad_())
            if target is None:
                goal = wrong_logits(logits.detach(), labels).argmax(1)
            excess = pick(logits, goal) - pick(logits, labels)
            gradient, = torch.autograd.grad(excess.sum(), points)
        fallen = ~correct(logits, labels)
        held, ages = held - fallen.long(), ages.masked_fill(fallen, 0)
        radius = radii[held - 1]
        if len(hit := fallen.nonzero().flatten()):
            smaller = ball(rows(x, rows(active, hit)), like_images(rows(radius, hit), x))
            low.index_copy_(0, hit, smaller[0])
            high.index_copy_(0, hit, smaller[1])
        going_on = (held > 1) & (ages < steps)
        if iteration >= PATIENCE:
            out_of_reach = -excess > reach * radius * gradient.flatten(1).abs().sum(1)
            going_on &= ~(out_of_reach & (ages >= PATIENCE))
        size = like_images(2 * (1 - ages / steps) * radius, x)
        points = points.detach().addcmul_(gradient.sign(), size).clamp_(low, high)
        ages, iteration = ages + 1, iteration + 1
        if not going_on.all():
            done, kept = (~going_on).nonzero().flatten(), going_on.nonzero().flatten()
            rank.index_copy_(0, rows(active, done), rows(held, done))
            end.index_copy_(0, rows(active, done), rows(points, done))
            active, labels, held, ages, goal, points, low, high = (
                rows(each, kept) for each in (active, labels, held, ages, goal, points, low, high))
    return end


def correct(logits, y):
    """Return whether the prediction is right, bool (N,): a row of logits with a NaN predicts nothing."""
    largest, prediction = logits.max(1)  # NaN if any is
    return (prediction == y) & ~largest.isnan()


def ascending(epsilons):
    return sorted({0.0, *epsilons})


def ball(x, radius):
    """The least and the greatest value of each pixel in the ball, within [0, 1]."""
    return (x - radius).clamp_(min=0), (x + radius).clamp_(max=1)


def pick(logits, classes):
    return logits.gather(1, classes[:, None]).squeeze(1)


def wrong_logits(logits, y):
    """The logits with -inf in the true class's place."""
    return logits.scatter(1, y[:, None], -torch.inf)


def like_images(values, x):
    """One value an image, shaped to broadcast over the images."""
    return values.view(-1, *[1] * (x.dim() - 1))


def check_radius(name, value):
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, not {value}")


def check_images(x, y):
    if x.dim() < 2 or len(x) == 0 or y.shape != x.shape[:1]:
        raise ValueError(f"an attack needs images (N, ...) and as many labels (N,), not {tuple(x.shape)} and "
                         f"{tuple(y.shape)}")
    if not x.is_floating_point() or not x.min() >= 0 or not x.max() <= 1:  # not: a NaN compares with nothing
        raise ValueError("an attack needs images in [0, 1], of a floating-point dtype")
