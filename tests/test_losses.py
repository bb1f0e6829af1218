"""The losses against their definitions, in more digits than they have."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses import LOSSES, build_loss, log_odds

CASES = [(2, 0.1, 0), (3, 5, 1), (10, 5, 2), (10, 100, 3), (10, 1e4, 4), (100, 1e4, 5)]  # classes, scale, seed
BOTH = [torch.float32, torch.float64]


def draw(classes, scale, seed, dtype, n=40):
    """Logits within ±scale, some of them equal, and labels of which half are the largest logit."""
    generator = torch.Generator().manual_seed(seed)
    logits = ((2 * torch.rand(n, classes, generator=generator, dtype=torch.float64) - 1) * scale).to(dtype)
    logits[::5] = logits[::5].round()
    logits[::7, 0] = logits[::7, 1]
    y = torch.randint(classes, (n,), generator=generator)
    y[::2] = logits[::2].argmax(1)
    return logits, y


def precise(logits, y):
    """Return u, softplus(u) and the gradient of the mean of softplus(u) in extended precision."""
    z, y = logits.detach().double().numpy().astype(np.longdouble), y.numpy()
    rows = np.arange(len(z))
    difference = z - z[rows, y][:, None]
    difference[rows, y] = -np.inf
    strongest = difference.max(1, keepdims=True)
    share = np.exp(difference - strongest)
    u = strongest[:, 0] + np.log(share.sum(1))
    wrong = np.where(u > 0, 1 / (1 + np.exp(-np.abs(u))), np.exp(-np.abs(u)) / (1 + np.exp(-np.abs(u))))
    gradient = share / share.sum(1, keepdims=True) * wrong[:, None]
    gradient[rows, y] = -wrong
    return u, np.maximum(u, 0) + np.log1p(np.exp(-np.abs(u))), gradient / len(z)


def close(found, expected, digits, smallest=0.0):
    """Within so many units of rounding of the value itself, or below what the dtype can hold."""
    error = np.abs(found.detach().double().numpy() - expected)
    return (error <= digits * torch.finfo(found.dtype).eps * np.abs(expected) + smallest).all()


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("classes, scale, seed", CASES)
def test_log_odds_keep_every_digit(classes, scale, seed, dtype):
    logits, y = draw(classes, scale, seed, dtype)
    u = log_odds(logits, y)
    assert u.shape == y.shape and u.dtype == dtype and u.isfinite().all()
    # Of the two terms: the log-odds of a coin are 0 from terms that are not.
    assert close(u, precise(logits, y)[0], 4, 4 * torch.finfo(dtype).eps * math.log(classes))


def test_log_odds_of_large_logits_that_are_close():
    logits = torch.tensor([[10_000.0, 10_000.0, -10_000.0], [9_999.0, 10_000.0, 9_999.0]])
    expected = torch.tensor([0.0, math.log(2) - 1])
    torch.testing.assert_close(log_odds(logits, torch.tensor([0, 1])), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("function", [log_odds, *LOSSES.values()])
def test_gradients_are_finite_differences(function, classes):
    logits, y = draw(classes, 3, 5, torch.float64)
    logits[1, 0] = 0.0  # where the two branches of stablemax meet
    logits[3] = -logits[3].abs()
    assert torch.autograd.gradcheck(lambda z: function(z, y), logits.requires_grad_())


@pytest.mark.parametrize("name", ["exact_ce", "stablemax"])
def test_second_derivatives_are_finite_differences(name):
    logits, y = draw(4, 3, 5, torch.float64, n=6)
    assert torch.autograd.gradgradcheck(lambda z: LOSSES[name](z, y), logits.requires_grad_())


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("classes, scale, seed", CASES)
def test_exact_ce_keeps_every_digit(classes, scale, seed, dtype):
    """Value and gradient, logit by logit, down to the smallest number of the dtype."""
    logits, y = draw(classes, scale, seed, dtype)
    _, expected, expected_gradient = precise(logits, y)
    smallest = torch.finfo(dtype).tiny
    loss = LOSSES["exact_ce"](logits.requires_grad_(), y)
    gradient, = torch.autograd.grad(loss, logits)
    assert loss.shape == () and close(loss, expected.mean(), 8, smallest)
    # exp turns the rounding of its argument into an error relative to the result.
    assert close(gradient, expected_gradient, 8 + 4 * min(scale, -math.log(smallest)), smallest)
    single = torch.stack([LOSSES["exact_ce"](logits[i:i + 1], y[i:i + 1]) for i in range(len(y))])
    assert close(single, expected, 8 + 4 * min(scale, -math.log(smallest)), smallest)


@pytest.mark.parametrize("dtype", BOTH)
def test_exact_ce_is_cross_entropy_where_that_is_exact(dtype):
    logits, y = draw(10, 3, 0, dtype)
    results = []
    for name in ("ce", "exact_ce"):
        twin = logits.clone().requires_grad_()
        loss = LOSSES[name](twin, y)
        (3 * loss).backward()
        results.append((loss.detach(), twin.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("margin, dtype", [(19.5, torch.float32), (25.0, torch.float32), (60.0, torch.float32),
                                           (22.0, torch.float64), (45.0, torch.float64), (500.0, torch.float64)])
def test_a_saturated_softmax(margin, dtype):
    """The logits' gradients add up to zero, as they must, where those of F.cross_entropy do not; nor is the loss 0."""
    logits = torch.tensor([[margin, 0.0, -1.0], [-1.0, 0.5, margin]], dtype=dtype)
    y = torch.tensor([0, 2])
    remains = {}
    for name in ("ce", "exact_ce"):
        twin = logits.clone().requires_grad_()
        loss = LOSSES[name](twin, y)
        loss.backward()
        remains[name] = (twin.grad.sum(1).abs() / twin.grad.amax(1)).max().item()
        if name == "exact_ce":
            odds = (math.exp(-margin) * (1 + math.exp(-1)) + math.exp(0.5 - margin) + math.exp(-1 - margin)) / 2
            assert loss.item() == pytest.approx(odds, rel=1e-5 if dtype == torch.float32 else 1e-9)
            assert (twin.grad[[0, 1], y] < 0).all()
    assert remains["exact_ce"] < 8 * torch.finfo(dtype).eps
    if logits.softmax(1).amax() == 1:
        assert remains["ce"] > 0.5


@pytest.mark.parametrize("u", [-700.0, -50.0, -1e-9, 0.0, 19.9, 20.1, 36.0, 49.9, 50.1, 1e4])
def test_exact_ce_in_float64_is_softplus_for_every_u(u):
    """F.softplus as it comes is the identity above 20, which is wrong in the 9th digit."""
    logits = torch.tensor([[0.0, u]], dtype=torch.float64)
    expected = max(u, 0) + math.log1p(math.exp(-abs(u)))
    assert LOSSES["exact_ce"](logits, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-15, abs=0)


@pytest.mark.parametrize("dtype", BOTH)
def test_mse_is_that_of_one_hot_targets(dtype):
    logits, y = draw(10, 5, 1, dtype)
    assert LOSSES["mse"](logits, y) == F.mse_loss(logits, torch.eye(10, dtype=dtype)[y])
    assert LOSSES["mse"](torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([0, 1])) == (0 + 4 + 0 + 1) / 4


def s(x):
    return x + 1 if x >= 0 else 1 / (1 - x)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("scale", [0.1, 5, 1e4, 1e30])
def test_stablemax_is_its_definition(scale, dtype):
    logits, y = draw(10, scale, 2, dtype)
    terms = [[s(np.longdouble(z)) for z in row] for row in logits.tolist()]
    expected = [math.log1p(float(sum(t for j, t in enumerate(row) if j != label) / row[label]))
                for row, label in zip(terms, y.tolist(), strict=True)]
    assert LOSSES["stablemax"](logits, y).item() == pytest.approx(np.mean(expected), rel=20 * torch.finfo(dtype).eps)


def test_stablemax_has_a_gradient_at_zero_and_does_not_round_to_1():
    zero = torch.zeros(1, 4, requires_grad=True)  # s'(0) = 1, s(0) = 1: softmax's gradient
    LOSSES["stablemax"](zero, torch.tensor([2])).backward()
    torch.testing.assert_close(zero.grad, torch.tensor([[0.25, 0.25, -0.75, 0.25]]))
    sure = torch.tensor([[1e6, -1e6, -1e6]], requires_grad=True)
    loss = LOSSES["stablemax"](sure, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(2e-12, rel=1e-4)
    torch.testing.assert_close(sure.grad, torch.tensor([[-2e-18, 1e-18, 1e-18]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_not_a_number_says_so(name):
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, math.nan, 2.0]])
    assert LOSSES[name](logits, torch.tensor([0, 0])).isnan()


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("classes, scale, seed", CASES)
@pytest.mark.parametrize("name", ["ce", "exact_ce"])
def test_label_smoothing_is_pytorchs(name, classes, scale, seed, dtype):
    """Value and gradient against F.cross_entropy in float64, and the sum over the target distribution."""
    logits, y = draw(classes, scale, seed, dtype)
    for smoothing in (0.1, 0.7):
        found, expected = logits.clone().requires_grad_(), logits.double().clone().requires_grad_()
        loss = build_loss(name, smoothing)(found, y)
        truth = F.cross_entropy(expected, y, label_smoothing=smoothing)
        target = (1 - smoothing) * F.one_hot(y, classes) + smoothing / classes
        torch.testing.assert_close(truth, -(target * expected.log_softmax(1)).sum(1).mean())
        (3 * loss).backward()
        (3 * truth).backward()
        digits = 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(loss.double(), truth, rtol=digits, atol=digits)
        # exp turns the rounding of logits of this size into an error relative to the result.
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=digits * max(1, scale), atol=digits)


def test_smoothed_exact_ce_keeps_the_digits_that_cross_entropy_loses():
    """Where the softmax rounds to 1, the smoothed loss minus its linear part is still the tiny plain loss."""
    logits, y = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True), torch.tensor([0])
    loss = build_loss("exact_ce", 1e-20)(logits, y)
    assert loss.item() == pytest.approx(2 * math.exp(-30), rel=1e-5)
    assert build_loss("ce", 1e-20)(logits, y).item() < 1e-15
    double = logits.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: build_loss("exact_ce", 0.2)(z, y), double)


@pytest.mark.parametrize("name", LOSSES)
def test_without_smoothing_a_loss_is_the_registrys_own(name):
    assert build_loss(name) is LOSSES[name] and build_loss(name, 0.0) is LOSSES[name]


@pytest.mark.parametrize("name, smoothing, says", [
    ("mse", 0.1, "exact_ce, not mse"), ("stablemax", 0.1, "exact_ce, not stablemax"), ("ce", 1.0, "not 1.0"),
    ("exact_ce", -0.1, "not -0.1"), ("ce", math.nan, "not nan"), ("hinge", 0.0, "unknown loss 'hinge'")])
def test_losses_that_do_not_exist_are_refused(name, smoothing, says):
    with pytest.raises(ValueError, match=says):
        build_loss(name, smoothing)


@pytest.mark.cuda
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_captured_in_a_cuda_graph(name):
    logits, y = draw(10, 30, 4, torch.float32)
    expected = logits.clone().requires_grad_()
    loss = LOSSES[name](expected, y)
    loss.backward()

    on_device, labels = torch.zeros_like(logits, device="cuda").requires_grad_(), y.cuda()

    def step():
        on_device.grad = None
        result = LOSSES[name](on_device, labels)
        result.backward()
        return result

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    on_device.data.copy_(logits)
    graph.replay()
    torch.testing.assert_close(captured.cpu(), loss.detach())
    torch.testing.assert_close(on_device.grad.cpu(), expected.grad, rtol=1e-4, atol=1e-12)
