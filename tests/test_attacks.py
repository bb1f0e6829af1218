import contextlib
import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, run_here
from torch import nn

import attacks
import data
import models

EPSILONS = [0.02, 0.05, 0.1, 0.15, 0.2]


@pytest.fixture(scope="module")
def digits():
    return data.load_dataset("digits")


@pytest.fixture(scope="module")
def images(digits):
    return digits.x_test[:60].double() / 255, digits.y_test[:60]


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    return fit(models.build_model("mlp", (1, 8, 8), 10, depth=3, width=32, mean=digits.mean, std=digits.std), digits)


@pytest.fixture(scope="module")
def linear(digits):
    torch.manual_seed(0)
    return fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits)


def fit(model, digits, steps=300):
    """Train on digits, too shortly for the softmax to saturate, and return the model in float64."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, y = digits.x_train.float() / 255, digits.y_train
    for _ in range(steps):
        part = torch.randint(len(x), (200,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    return model.double().eval()


def random_model(name, batch_norm):
    """A small network in float64 whose batch norm, if any, has seen data, and whose predictions are not all one."""
    torch.manual_seed(1)
    model = models.build_model(name, (2, 8, 8), 5, width=6, batch_norm=batch_norm).double()
    for _ in range(5):
        model(torch.rand(20, 2, 8, 8, dtype=torch.float64))
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.bias.data -= model.eval()(torch.rand(20, 2, 8, 8, dtype=torch.float64)).detach().mean(0)
    return model.train()


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def slow_pgd(model, image, label, epsilon, steps, step_size, start):
    """PGD on one image, by the definition; the image comes and goes without a batch dimension."""
    point = (image + epsilon * start).clamp(0, 1)
    for _ in range(steps):
        point = point.clone().requires_grad_(True)
        logits = model(point[None])[0]
        wrong = torch.stack([logits[j] for j in range(len(logits)) if j != label])
        (wrong.exp().sum().log() - logits[label]).backward(inputs=[point])
        moved = point.detach() + step_size * point.grad.sign()
        point = (image + (moved - image).clamp(-epsilon, epsilon)).clamp(0, 1)
    return point.detach()


def slow_robust(model, image, label, epsilons, steps, budget):
    """How many of the ascending epsilons one image withstands; None if its clean prediction is wrong."""
    classes, rounds, factor, reach, further = attacks.BUDGETS[budget]
    clean = model(image[None])[0]
    if clean.argmax() != label:
        return None
    wrong = [j for j in range(len(clean)) if j != label]
    radii = [*epsilons, *(epsilons[-1] * 1.5**k for k in (1, 2, 3))]

    def attacked(radii):
        withstood, start = len(radii), image
        for _ in range(rounds):
            withstood, end = slow_descent(model, image, label, start, None, radii, withstood, steps * factor, reach)
            with torch.no_grad():
                logits = model(end[None])[0]
            for target in sorted(wrong, key=lambda j: -logits[j])[:classes]:
                begin = min(withstood + further, len(radii)) if withstood else 0
                found, _ = slow_descent(model, image, label, start, target, radii, begin, steps * factor, reach)
                withstood = min(withstood, found)
            start = image + (image - end)
        return withstood

    withstood = attacked(radii)
    return withstood if withstood <= len(epsilons) else attacked(epsilons)


def slow_descent(model, image, label, start, target, epsilons, withstood, steps, reach):
    """One pass of the above toward one class, None for the strongest of the moment: what is withstood, the end."""
    epsilon = epsilons[withstood - 1] if withstood else 0
    point, taken, given_up = (image + (start - image).clamp(-epsilon, epsilon)).clamp(0, 1), 0, False
    while withstood > 0 and not given_up:
        point = point.clone().requires_grad_(True)
        logits = model(point[None])[0]
        strongest = max((j for j in range(len(logits)) if j != label), key=lambda j: logits[j])
        rival = strongest if target is None else target
        gap = logits[label] - logits[rival]
        gap.backward(inputs=[point])
        gradient, gap, point = point.grad, gap.item(), point.detach()
        if logits.argmax() != label:
            withstood, taken = withstood - 1, 0
        if withstood > 0:
            epsilon = epsilons[withstood - 1]
            given_up = taken == steps or taken >= 2 and gap > reach * epsilon * gradient.abs().sum()
            moved = point - 2 * epsilon * (1 - taken / steps) * gradient.sign()
            point = (image + (moved - image).clamp(-epsilon, epsilon)).clamp(0, 1)
            taken += 1
    return withstood, point


@pytest.mark.parametrize("objective", ["exact", "ce"])
def test_pgd_stays_in_the_ball_and_in_the_unit_cube(trained, images, objective):
    x, y = images
    for epsilon in (0.0, 0.03, 0.3, 1.0):
        x_adv = attacks.pgd(trained, x, y, epsilon, objective=objective)
        assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        assert (x_adv - x).abs().max() <= epsilon + 1e-12
        assert epsilon == 0 or (x_adv - x).abs().max() > 0.9 * epsilon


@pytest.mark.parametrize("name, batch_norm", [("mlp", True), ("cnn", False), ("resnet18", True)])
def test_pgd_equals_the_slow_one(name, batch_norm):
    model = random_model(name, batch_norm)
    x, y = torch.rand(3, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 4, 2])
    starts = torch.rand(1, *x.shape, dtype=torch.float64) * 2 - 1
    x_adv = attacks.pgd(model, x, y, 0.05, steps=4, step_size=0.03, starts=starts)
    model.eval()
    slow = torch.stack([slow_pgd(model, *each, 0.05, 4, 0.03, start)
                        for *each, start in zip(x, y, starts[0], strict=True)])
    torch.testing.assert_close(x_adv, slow, rtol=0, atol=1e-9)


@pytest.mark.parametrize("budget", attacks.BUDGETS)
def test_robust_accuracy_visits_the_points_of_the_slow_one(trained, images, budget):
    """On digits, for every image: the same iterates in the same order, and the same outcome."""
    visited = []

    def remember(_, inputs):
        if inputs[0].requires_grad:
            visited.append(inputs[0].detach().clone())

    outcomes = set()
    with trained.register_forward_pre_hook(remember):
        for i in range(8):
            found = attacks.robust_accuracy(trained, images[0][i:i + 1], images[1][i:i + 1], EPSILONS, 4, budget)
            fast, visited[:] = visited[1:], []  # the first one is the probe of the model
            withstood = slow_robust(trained, images[0][i], images[1][i], EPSILONS, 4, budget)
            slow, visited[:] = list(visited), []
            torch.testing.assert_close(torch.cat(fast), torch.cat(slow), rtol=0, atol=1e-12)
            assert found == [float(k < (withstood or 0)) for k in range(len(EPSILONS))]
            outcomes.add(withstood)
    assert len(outcomes) > 1


def test_the_radii_that_an_image_withstands_are_counted(trained, images):
    x, y = images
    count = attacks.radii_withstood(trained, x, y, [0.15, 0.05, 0.0, 0.05, 0.1])  # of 0, 0.05, 0.1 and 0.15
    assert count.shape == y.shape and count.dtype == torch.int64 and set(count.tolist()) == {0, 1, 2, 3, 4}
    with torch.no_grad():
        assert torch.equal(count > 0, trained(x).argmax(1) == y)
    shares = attacks.robust_accuracy(trained, x, y, (epsilon for epsilon in (0.1, 0.0, 0.15, 0.05)), batch_size=33)
    assert shares == [(count > k).double().mean().item() for k in (2, 0, 3, 1)]
    assert attacks.radii_withstood(trained, x, y, []).tolist() == attacks.radii_withstood(trained, x, y, [0.0]).tolist()
    assert attacks.radii_withstood(trained, x, y, [0.0]).tolist() == (count > 0).long().tolist()


def test_on_a_linear_classifier_every_count_is_exact(linear, images):
    x, y = images
    margins = torch.stack([worst_case_margins(linear, x, y, epsilon)[0].amin(1) for epsilon in [0.0, *EPSILONS]])
    assert torch.equal(attacks.radii_withstood(linear, x, y, EPSILONS), (margins > 0).sum(0))


class Plateau(nn.Module):
    """The margin's gradient points along pixel 0; only there, beyond the ball, does it lead to the wrong class."""

    def forward(self, x):
        d = x.flatten(1)[:, :2] - 0.5
        seen = 50 * (d[:, 0] - 0.12).relu() * d[:, 1]
        margin = 1 - 0.1 * d[:, 0] + seen - 30 * (-0.06 - d[:, 1]).relu()
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def test_an_image_on_a_plateau_is_attacked_from_outside_its_ball():
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    assert attacks.robust_accuracy(Plateau(), x, y, [0.1, 0.05]) == [0, 1]
    x_adv = attacks.pgd(Plateau(), x, y, 0.1, start="image")
    assert (Plateau()(x_adv).argmax(1) == 0).all()  # inside the ball the gradient does not show the way


class Walls(nn.Module):
    """Class 0 leads the two strongest of the others by constants; the weakest grows with the pixels' sum."""

    def forward(self, x):
        weakest = x.flatten(1).sum(1) - 8
        return torch.stack([torch.full_like(weakest, 1.0), 0.9 + 0 * weakest, 0.8 + 0 * weakest, weakest], 1)


def test_the_budget_says_how_many_classes_are_tried():
    x, y = torch.full((1, 1, 4, 4), 0.5), torch.tensor([0])
    found = {budget: attacks.radii_withstood(Walls(), x, y, [0.05, 0.1], budget=budget).item()
             for budget in attacks.BUDGETS}
    assert found == {"low": 3, "default": 2, "high": 2}  # 16 pixels: at 0.05 the weakest class rises by 0.8 of 1


def worst_case_margins(linear, x, y, epsilon):
    """z_y - z_j of a linear classifier at the worst point of the ball, box included, for every wrong class j."""
    weight, bias = linear[1].weight.detach(), linear[1].bias.detach()
    x = x.flatten(1)
    lowest, highest = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    difference = weight[y][:, None] - weight[None]
    corner = torch.where(difference > 0, lowest[:, None], highest[:, None])
    margins = (difference * corner).sum(2) + bias[y][:, None] - bias[None]
    return margins.scatter(1, y[:, None], torch.inf), corner


def test_on_a_linear_classifier_of_two_classes_pgd_finds_the_worst_point(linear, images):
    x, y = images[0], images[1] % 2
    two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    two[1].weight.data, two[1].bias.data = linear[1].weight.data[:2].clone(), linear[1].bias.data[:2].clone()
    for epsilon in (0.03, 0.2):
        worst = worst_case_margins(two, x, y, epsilon)[1][torch.arange(len(x)), 1 - y]
        torch.testing.assert_close(attacks.pgd(two, x, y, epsilon).flatten(1), worst, rtol=0, atol=1e-12)


def test_cross_entropy_fails_on_a_saturated_network_in_float32(trained, images):
    x, y = images[0].float(), images[1]
    saturated = nn.Sequential(copy.deepcopy(trained), nn.Linear(10, 10, bias=False)).float()
    saturated[1].weight.data = 300 * torch.eye(10)
    under = {objective: accuracy(saturated, attacks.pgd(saturated, x, y, 0.1, objective=objective), y)
             for objective in ("exact", "ce")}
    robust, = attacks.robust_accuracy(saturated, x, y, [0.1])
    assert under["ce"] > under["exact"] + 0.2
    # The scale changes no prediction: what is found must be what is found without it.
    assert abs(under["exact"] - accuracy(trained, attacks.pgd(trained, *images, 0.1), y)) <= 0.05
    assert abs(robust - attacks.robust_accuracy(trained, *images, [0.1])[0]) <= 0.02


CALLS = {
    "pgd": lambda model, x, y: attacks.pgd(model, x, y, 0.05),
    "radii_withstood": lambda model, x, y: attacks.radii_withstood(model, x, y, [0.05, 0.1]),
    "robust_accuracy": lambda model, x, y: attacks.robust_accuracy(model, x, y, [0.05, 0.1]),
}


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("attack", CALLS)
def test_the_model_is_left_as_it_was(attack, failing):
    model, calls = random_model("cnn", batch_norm=True), []
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    model.train()
    next(module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))).eval()
    frozen, remembering, *others = model.parameters()
    frozen.requires_grad_(False)
    remembering.grad = torch.ones_like(remembering)
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def check_while_attacked(model, _):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        calls.append(1)
        if failing and len(calls) == 3:
            raise RuntimeError("third call")

    model.register_forward_pre_hook(check_while_attacked)
    with pytest.raises(RuntimeError, match="third call") if failing else contextlib.nullcontext():
        CALLS[attack](model, x, y)
    assert [module.training for module in model.modules()] == modes
    assert not frozen.requires_grad and all(parameter.requires_grad for parameter in (remembering, *others))
    assert torch.equal(remembering.grad, torch.ones_like(remembering))
    assert all(parameter.grad is None for parameter in (frozen, *others))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("attack", CALLS)
def test_works_in_every_gradient_mode_and_for_scripted_models(trained, images, attack):
    expected = torch.as_tensor(CALLS[attack](trained, *images))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = CALLS[attack](trained, *(tensor * 1 for tensor in images))
            assert not torch.is_grad_enabled()
            made_there = [tensor * 1 for tensor in images]  # in inference mode, of a kind that autograd refuses
        assert torch.equal(torch.as_tensor(found), expected)
    assert torch.equal(torch.as_tensor(CALLS[attack](trained, *made_there)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still in use
        scripted = torch.jit.trace(trained, images[0])
    assert torch.equal(torch.as_tensor(CALLS[attack](scripted, *images)), expected)


def test_pgd_repeats_by_seed_and_takes_starts(trained, images):
    x, y = images
    first = attacks.pgd(trained, x, y, 0.05, seed=3)
    assert torch.equal(first, attacks.pgd(trained, x, y, 0.05, seed=3))
    assert not torch.equal(first, attacks.pgd(trained, x, y, 0.05, seed=4))

    starts = torch.rand(2, *x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype) * 2 - 1
    whole = attacks.pgd(trained, x, y, 0.05, restarts=2, starts=starts)
    part = attacks.pgd(trained, x[:7], y[:7], 0.05, restarts=2, starts=starts[:, :7])
    torch.testing.assert_close(whole[:7], part, rtol=0, atol=1e-12)
    tiny = attacks.pgd(trained, x, y, 0.05, step_size=0.0, starts=starts[:1])
    torch.testing.assert_close(tiny, (x + 0.05 * starts[0]).clamp(0, 1), rtol=0, atol=1e-15)


def test_pgd_starts_anywhere_in_the_ball():
    """Uniform, each pixel for itself: not a corner, not one orthant, not the same for all images."""
    x, y = torch.full((400, 1, 8, 8), 0.5), torch.zeros(400, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    start = (attacks.pgd(model, x, y, 0.1, step_size=0.0) - x).flatten(1) / 0.1
    assert start.abs().max() <= 1 + 1e-5
    assert (start.mean(0).abs() < 0.2).all() and (start.mean(1).abs() < 0.4).all()  # 5 deviations and more
    counts = torch.histc(start, bins=10, min=-1, max=1)
    assert (counts / start.numel() - 0.1).abs().max() < 0.01


@pytest.mark.parametrize("objective", ["exact", "ce"])
def test_a_step_has_the_size_that_is_asked_for(objective):
    """On a linear classifier of two classes each step is step_size times the sign of a constant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    x, y = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64), torch.tensor([0, 1, 0])
    sign = (model[1].weight[1 - y] - model[1].weight[y]).detach().sign().view_as(x)
    starts = torch.zeros(1, *x.shape)

    def moved(**options):
        return attacks.pgd(model, x, y, 0.2, starts=starts, objective=objective, **options) - x

    for steps, step_size, distance in [(1, 0.01, 0.01), (3, 0.01, 0.03), (3, 0.15, 0.2), (4, None, 0.2), (1, 0.0, 0)]:
        torch.testing.assert_close(moved(steps=steps, step_size=step_size), distance * sign, rtol=0, atol=1e-12)
    seen = []
    with model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone())):
        moved(steps=20)
    torch.testing.assert_close(seen[3] - seen[2], 2.5 * 0.2 / 20 * sign, rtol=0, atol=1e-12)  # by default


def test_the_objective_is_the_one_asked_for():
    """Where the softmax rounds to 1 and the wrong logits are below its range, only cross-entropy stands still."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model[1].weight.data, model[1].bias.data = torch.tensor([[1.0] * 4, [0.0] * 4]), torch.tensor([1000.0, 0.0])
    x, y, starts = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), torch.zeros(1, 1, 1, 2, 2)
    assert torch.equal(attacks.pgd(model, x, y, 0.1, starts=starts, objective="ce"), x)
    for options in ({}, {"objective": "exact"}):
        torch.testing.assert_close(attacks.pgd(model, x, y, 0.1, starts=starts, **options), x - 0.1)


class NotANumber(nn.Module):
    """A linear classifier that gives NaN: of every image, or of those brighter than a limit, in one logit or in all."""

    def __init__(self, limit=-1.0, logits=slice(None)):
        super().__init__()
        self.limit, self.logits, self.linear = limit, logits, nn.Linear(16, 3)
        self.linear.weight.data = torch.tensor([[1.0], [0.5], [0.0]]).expand(3, 16).clone()
        self.linear.bias.data = torch.tensor([0.0, 5.0, 0.0])

    def forward(self, x):
        logits = self.linear(x.flatten(1))
        poison = torch.zeros_like(logits)
        poison[x.flatten(1).mean(1) > self.limit, self.logits] = torch.nan
        return logits + poison


@pytest.mark.parametrize("logits", [slice(None), 0, 1, 2])
def test_what_is_not_a_number_is_wrong(logits):
    x, y = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    for budget in attacks.BUDGETS:
        assert attacks.robust_accuracy(NotANumber(logits=logits), x, y, [0.0, 0.1, 0.3], budget=budget) == [0, 0, 0]
    for objective in ("exact", "ce"):
        x_adv = attacks.pgd(NotANumber(logits=logits), x, y, 0.1, restarts=2, objective=objective)
        assert ((x_adv - x).abs() <= 0.1 + 1e-6).all() and ((x_adv >= 0) & (x_adv <= 1)).all()


@pytest.mark.parametrize("logits", [slice(None), 0, 1, 2])
def test_a_point_where_the_network_is_not_a_number_is_an_adversarial_one(logits):
    """z_1 - z_0 = 5 - 8 * mean: class 1 is right everywhere, brightness brings the others closer, NaN is above 0.57."""
    model, x, y = NotANumber(0.57, logits), torch.full((2, 1, 4, 4), 0.5), torch.tensor([1, 1])
    x[1] = 0.3
    assert attacks.radii_withstood(model, x, y, [0.05, 0.1, 0.2, 0.25]).tolist() == [2, 5]
    starts = torch.stack([torch.full_like(x, -0.4), torch.full_like(x, 1.0), torch.full_like(x, 0.2)])
    worst = attacks.pgd(model, x, y, 0.1, step_size=0.0, restarts=3, starts=starts)
    torch.testing.assert_close(worst[0], x[0] + 0.1)
    torch.testing.assert_close(worst[1], x[1] + 0.1)


def test_correct_is_the_argmax_of_numbers():
    nan = math.nan
    logits = torch.tensor([[1.0, 2, 0], [1, 2, 0], [nan, 2, 0], [1, nan, 0], [1, 2, nan], [nan, nan, nan],
                           [math.inf, 1, 2], [-math.inf, 1, 0]])
    y = torch.tensor([1, 0, 1, 1, 1, 0, 0, 1])
    assert attacks.correct(logits, y).tolist() == [True, False, False, False, False, False, True, True]


def test_restarts_keep_the_worst_last_iterate_of_each_image(trained, images):
    x, y = images
    starts = torch.rand(3, *x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype) * 2 - 1
    single = torch.stack([attacks.pgd(trained, x, y, 0.08, steps=3, starts=start[None]) for start in starts])
    with torch.no_grad():
        logits = torch.stack([trained(x_adv) for x_adv in single])
    others = logits.masked_fill(F.one_hot(y, 10).bool(), -torch.inf).amax(2)
    best = (others - logits[:, torch.arange(len(x)), y]).argmax(0)
    assert len(set(best.tolist())) == 3
    together = attacks.pgd(trained, x, y, 0.08, steps=3, restarts=3, starts=starts)
    assert torch.equal(together, single[best, torch.arange(len(x))])


def test_an_image_fares_alone_as_in_company(trained, images):
    """Neither the batch size nor the others that still stand change what is found of an image."""
    x, y = images[0][:12], images[1][:12]
    together = attacks.robust_accuracy(trained, x, y, EPSILONS)
    assert together[0] > together[-1]
    for batch_size in (1, 7, 1000):
        assert attacks.robust_accuracy(trained, x, y, EPSILONS, batch_size=batch_size) == together

    model, x = copy.deepcopy(trained).float(), x.float()
    together = attacks.robust_accuracy(model, x, y, EPSILONS)
    assert attacks.robust_accuracy(model, x, y, EPSILONS, batch_size=4) == pytest.approx(together, abs=1 / 12 + 1e-9)


def test_two_classes_and_flat_images_will_do():
    torch.manual_seed(0)
    model, x = nn.Linear(5, 2), torch.rand(20, 5)
    y = model(x).argmax(1)
    assert attacks.pgd(model, x, y, 0.1).shape == x.shape
    assert attacks.robust_accuracy(model, x, y, [0.0, 1.0])[0] == 1.0


def bad_input(**changes):
    return {"x": torch.rand(2, 1, 2, 2), "y": torch.zeros(2, dtype=torch.int64), "epsilon": 0.1, **changes}


torch.manual_seed(0)  # one draw in 200 of its weights saturates to one class, which counts as constant
FLAT = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
EVERYWHERE = [
    *[("epsilon", dict(epsilon=value)) for value in (-0.1, 8.0, math.nan, math.inf)], ("steps", dict(steps=0)),
    *[("images", dict(x=torch.full((2, 1, 2, 2), value))) for value in (-0.01, 1.01, math.nan)],
    ("images", dict(x=torch.ones(2, 1, 2, 2, dtype=torch.uint8))),
    ("images", dict(x=torch.zeros(0, 1, 2, 2), y=torch.zeros(0).long())),
    *[("labels", dict(y=y)) for y in (
        torch.zeros(1).long(), torch.zeros(2, 1).long(), torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.zeros(2),
        torch.zeros(2, dtype=torch.uint8))]]
OF_PGD = [(next(iter(change)), change) for change in (
    dict(objective="dlr"), dict(restarts=0), dict(step_size=-0.1), dict(start="corner"), dict(step_size=math.nan),
    dict(starts=torch.zeros(2, 2, 1, 2, 2)))]
OF_ROBUST_ACCURACY = [("budget", dict(budget="lavish")), ("batch_size", dict(batch_size=0))]


@pytest.mark.parametrize("attack, cases", [
    (attacks.pgd, EVERYWHERE + OF_PGD), (attacks.radii_withstood, EVERYWHERE),
    (attacks.robust_accuracy, EVERYWHERE + OF_ROBUST_ACCURACY)], ids=lambda value: getattr(value, "__name__", ""))
def test_bad_input_is_refused(attack, cases):
    for what, change in cases:
        arguments = bad_input(**change)
        if attack is not attacks.pgd:
            arguments["epsilons"] = [0.05, arguments.pop("epsilon")]
        with pytest.raises(ValueError, match=what):
            attack(FLAT, **arguments)


class Bent(nn.Module):
    """FLAT, changed by a function on the way in and one on the way out."""

    def __init__(self, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(FLAT(self.before(x)))


MISFITS = {
    "in place": [Bent(before=lambda x: x.sub_(0.5)), Bent(before=lambda x: x.clamp_(0, 1)),
                 nn.Sequential(nn.ReLU(inplace=True), FLAT)],
    "must return logits": [Bent(after=lambda z: (z, z)), Bent(after=lambda z: z[:, :1]), Bent(after=lambda z: z[0])],
    "no gradient": [Bent(before=lambda x: x.detach().round())],
    "probabilities": [Bent(after=lambda z: z.softmax(1)), Bent(after=lambda z: (99 * z).softmax(1))],
    "differ between two passes": [Bent(before=lambda x: F.dropout(x, 0.1)), Bent(after=F.dropout),
                                  Bent(before=lambda x: x + 0.01 * torch.randn_like(x))],
}


@pytest.mark.parametrize("says", MISFITS)
@pytest.mark.parametrize("attack", [*CALLS, "zero_gradient"])
def test_a_model_that_cannot_be_attacked_is_refused_and_the_images_stay(says, attack):
    call = {**CALLS, "zero_gradient": attacks.zero_gradient}[attack]
    for model in MISFITS[says]:
        model.requires_grad_(False)
        x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 2])
        before = x.clone()
        with pytest.raises(ValueError, match=says):
            call(model, x, y)
        assert torch.equal(x, before) and not x.requires_grad and x.grad is None


@pytest.mark.parametrize("after", [lambda z: z.log_softmax(1), torch.sigmoid, F.relu,
                                   lambda z: 0 * z + torch.tensor([0.0, 1, 0]), lambda z: 0 * z + 1 / 3])
def test_what_only_resembles_probabilities_is_attacked(after):
    x, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 2, 1, 1, 0])
    for call in CALLS.values():
        call(Bent(after=after), x, y)


def test_a_network_of_ours_is_attacked_also_if_squared_error_made_its_outputs_look_like_probabilities():
    model = models.build_model("mlp", (1, 2, 2), 2, depth=2, width=4)
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        last.weight[1] = -last.weight[0].mul_(1e-3)
        last.bias.fill_(0.5)
    for call in CALLS.values():
        call(model, torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 1, 1, 0]))


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="inference_mode"):
        attacks.pgd(model, **bad_input())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_benchmark_measures_a_checkpoint(tmp_path, capsys):
    from benchmarks import attacks as bench_attacks

    run_here(tmp_path, *SMALL, "--n_steps=40")
    capsys.readouterr()
    path = str(max((tmp_path / "checkpoints").glob("*step_000000040.pt")))
    bench_attacks.main([path, "--images=30", "--epsilons", "0.02", "8/255", "--autoattack_steps"])
    head, _, *rows = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    cells = {row[0].strip(): dict(zip(map(str.strip, head), map(str.strip, row), strict=True)) for row in rows}
    assert list(cells) == ["0.02", "8/255", "seconds"] and {*attacks.BUDGETS, "PGD-10 ce"} < {*cells["0.02"]}

    checkpoint = torch.load(path, weights_only=True)
    model, digits = models.load_network(checkpoint), data.load_dataset("digits")
    x, y = data.pixels(digits.x_test[:30], torch.float32), digits.y_test[:30]
    robust = attacks.robust_accuracy(model, x, y, [0.02, 8 / 255])
    assert [cells[row]["default"] for row in ("0.02", "8/255")] == [f"{100 * share:.1f}" for share in robust]
    assert cells["8/255"]["clean"] == f"{100 * accuracy(model, x, y):.1f}"

    with pytest.raises(SystemExit):
        bench_attacks.main([str(tmp_path / "none.pt")])
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_attack_from_the_image_is_plain_pgd_without_a_random_start():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.rand(20, 3, 2, 2), torch.randint(3, (20,))
    expected = x.clone()
    for _ in range(4):
        expected.requires_grad_()
        gradient, = torch.autograd.grad(F.cross_entropy(model(expected), y, reduction="sum"), expected)
        expected = (expected.detach() + 0.02 * gradient.sign()).clamp(x - 0.05, x + 0.05).clamp(0, 1)
    found = attacks.pgd(model, x, y, 0.05, steps=4, step_size=0.02, objective="ce", start="image")
    torch.testing.assert_close(found, expected)


def test_zero_gradient_names_the_images_from_which_an_attack_does_not_move():
    model = nn.Linear(2, 2, bias=False)  # the second pixel has no part in the answer
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e4, 0.0], [0.0, 0.0]]))
    x, y = torch.tensor([[1.0, 0.5], [1e-5, 0.5]]), torch.tensor([0, 0])
    assert attacks.zero_gradient(model, x, y).tolist() == [True, False]
    moved = attacks.pgd(model, x, y, 0.1, objective="ce", start="image")
    assert (moved != x).tolist() == [[False, False], [True, False]]
