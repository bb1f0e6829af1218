"""What is certified against what attacks break, against exact bounds, and against all points of a ball."""

import pytest
import torch
from conftest import SMALL, history_of, run_here
from torch import nn

import attacks
import certify
import data
import remeasure
from models import MLP, build_model

EPSILONS = [0.003, 0.01, 0.03, 0.1]


def trained(x, y, steps=80, **options):
    """An MLP after some steps of AdamW."""
    torch.manual_seed(0)
    model = build_model("mlp", x.shape[1:], int(y.max()) + 1, mean=[0.3], std=[0.3], **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def digits():
    dataset = data.load_dataset("digits")
    return data.pixels(dataset.x_train[:400], torch.float32), dataset.y_train[:400]


@pytest.mark.parametrize("options", [
    {}, {"depth": 2, "width": 100}, {"depth": 6, "width": 20}, {"activation": "leaky_relu"}, {"batch_norm": True}])
@pytest.mark.parametrize("steps", [0, 80])
def test_no_attack_breaks_what_is_certified(digits, options, steps):
    x, y = digits
    model = trained(x, y, steps, **{"width": 50, **options})
    x = x[:50]
    y = y[:50] if steps else model.eval()(x).argmax(1)  # an untrained network is right by its own labels
    counts = certify.radii_certified(model, x, y, EPSILONS)
    assert (counts <= attacks.radii_withstood(model, x, y, EPSILONS, budget="high")).all() and (counts > 1).sum() > 25
    shares = certify.certified_accuracy(model, x, y, EPSILONS, batch_size=20)
    for k, epsilon in enumerate(EPSILONS, 1):
        x_adv, held = attacks.pgd(model, x, y, epsilon), counts > k
        with torch.no_grad():
            assert attacks.correct(model.eval()(x_adv), y)[held].all() and shares[k - 1] == held.sum().item() / 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_hidden_units_the_bound_is_exact(dtype):
    """The least margin in the ball has a closed form; only what is within rounding of 0 may differ."""
    torch.manual_seed(0)
    model = MLP((1, 5, 5), 4, 1, 8, nn.ReLU, False, mean=[0.4], std=[0.2]).to(dtype)
    x = torch.rand(200, 1, 5, 5).to(dtype)
    y = model(x).argmax(1)
    weight, bias = (p.detach().double() for p in model.layers[0].parameters())
    for epsilon in (0.01, 0.03, 0.1):
        low, high = ((side.double() - 0.4) / 0.2 for side in attacks.ball(x, epsilon))
        row = weight[y][:, None] - weight
        margins = (torch.where(row > 0, low.flatten(1)[:, None], high.flatten(1)[:, None]) * row).sum(2)
        margins = (margins + bias[y][:, None] - bias).scatter(1, y[:, None], torch.inf).amin(1)
        found = certify.certified_accuracy(model, x, y, [epsilon])
        assert (margins > 1e-5).sum() <= 200 * found[0] <= (margins > -1e-6).sum() and 0 < found[0] < 1


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_two_inputs_against_all_points_of_a_grid(activation):
    """Not one certified image has a wrong point in its ball, and most balls without one are certified."""
    torch.manual_seed(0)
    grid = torch.linspace(-1, 1, 41)
    offsets = torch.cartesian_prod(grid, grid).view(-1, 1, 1, 1, 2)
    x = torch.rand(300, 1, 1, 2)
    y = ((x - 0.5).flatten(1).norm(dim=1) > 0.35).long()
    model = trained(x, y, width=20, depth=3, activation=activation)
    counts = certify.radii_certified(model, x, y, EPSILONS)
    for k, epsilon in enumerate(EPSILONS, 1):
        with torch.no_grad():
            right = model((x + epsilon * offsets).clamp(0, 1).view(-1, 1, 1, 2)).argmax(1).view(-1, 300) == y
        held, certified = right.all(0), counts > k
        assert not (certified & ~held).any() and certified.sum() > 0.8 * held.sum() > 0


def test_rounding_is_allowed_for():
    """Two logits that differ by less than float32 may get wrong: not certified in float32, but in float64."""
    model = MLP((1, 10, 10), 2, 1, 8, nn.ReLU, False, mean=None, std=None)
    with torch.no_grad():
        model.layers[0].weight.fill_(1.0)
        model.layers[0].bias.copy_(torch.tensor([0.0, -1e-4]))
    x, y = torch.full((1, 1, 10, 10), 0.5), torch.tensor([0])
    assert certify.radii_certified(model, x, y, [1e-12]).item() == 1
    assert certify.radii_certified(model.double(), x.double(), y, [1e-12]).item() == 2


def test_what_cannot_be_certified(digits):
    for model in (build_model("mlp", (1, 8, 8), 10, activation="gelu"), build_model("cnn", (1, 8, 8), 10, width=2),
                  nn.Sequential(nn.Flatten(), nn.Linear(64, 10))):
        with pytest.raises(ValueError, match="only an MLP with relu or leaky_relu can be certified"):
            certify.certified_accuracy(model, *digits, [0.1])


def test_a_run_and_measuring_it_again(tmp_path):
    flags = ["--n_steps=200", "--log_points=3", "--adv_size=60"]
    run_here(tmp_path, *SMALL, *flags)
    assert "certified_acc" not in history_of(tmp_path)
    remeasure.main([str(tmp_path), f"--log_dir={tmp_path}/again/logs", "--certify=40", "--epsilons", "0.01", "0.05",
                    "--threads=1", "--device=cpu"])
    again = history_of(tmp_path / "again")
    certified, robust = ([[ord(k) - 48 for k in text] for text in again["outcomes"][name]]
                         for name in ("certified", "robust"))
    assert all(a <= b for row, other in zip(certified, robust, strict=True) for a, b in zip(row, other, strict=True))
    assert again["certified_acc"] == {key: [sum(k > at for k in row) / 40 for row in certified]
                                      for at, key in enumerate(["0.01", "0.05"], 1)}
    assert again["certified_acc"]["0.01"][-1] > 0.5
    run_here(tmp_path / "more", *SMALL, *flags, "--certify=100", "--epsilons=0.01,0.05")  # than are attacked
    more = history_of(tmp_path / "more")["outcomes"]["certified"]
    for text, part in zip(more, again["outcomes"]["certified"], strict=True):
        assert "-" not in text and part.count("-") == 20
        assert [*part] == [a if b != "-" else b for a, b in zip(text, part, strict=True)]
