"""A log step's row against what it is made of."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attacks
import certify
import data
import local_complexity
import measure
from flags import Config
from models import build_model


@pytest.fixture(scope="module")
def small():
    """A data set of 40 random images, and a network that is right on most of them."""
    torch.manual_seed(0)
    x, model = torch.randint(256, (40, 1, 4, 4), dtype=torch.uint8), build_model("mlp", (1, 4, 4), 3, width=8)
    with torch.no_grad():
        y = model(data.pixels(x, torch.float32)).argmax(1)
    y[0] = (y[0] + 1) % 3
    return model, data.Dataset(x_train=x, y_train=y, x_test=x[:20], y_test=y[:20], num_classes=3, mean=[0.0], std=[1.0],
                               name="small")


def row_of(small, **flags):
    config = replace(Config(), **{**dict(adv_size=20, pgd_steps=1, epsilons=[0.1], lc_samples=0, robust_budget="low",
                                         lc_radius=[0.1]), **flags})
    return config, measure.measure(*small, measure.draw_probes(config, small[1]), config)


def test_counts_are_written_whole_for_any_number_of_epsilons(small):
    """300 radii: the characters go beyond those of one byte."""
    config, row = row_of(small, epsilons=[0.003 * k for k in range(1, 301)])
    text = row["outcomes"]["robust"]
    rank = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(int) - 48
    assert len(text) == 20 and rank[0] == 0 and rank.max() > 206
    probes = measure.draw_probes(config, small[1])
    assert torch.equal(probes.images, data.pixels(small[1].x_test, torch.float32))
    found = attacks.radii_withstood(small[0], probes.images, small[1].y_test, config.epsilons, 1, "low")
    assert rank.tolist() == found.tolist()
    assert list(row["robust_acc"].values()) == [float((rank > k).mean()) for k in range(1, 301)]


def test_the_certified_images_are_drawn_among_the_attacked(small):
    """Not the first ones, which are of one class in a folder of images."""
    config, row = row_of(small, adv_size=15, certify=6)
    few, text = measure.draw_probes(config, small[1]), row["outcomes"]["certified"]
    assert len(text) == 15 and [code != "-" for code in text] == few.among.tolist()
    chosen = few.images[few.among]
    assert torch.equal(chosen, data.pixels(small[1].x_test[few.certified], torch.float32)) and len(chosen) == 6
    assert few.among.tolist() != [True] * 6 + [False] * 9
    counts = certify.radii_certified(small[0], chosen, few.labels[few.among], [0.1])
    assert text.replace("-", "") == measure.characters_of(counts)


def test_the_losses_are_those_that_training_minimises(small):
    model, dataset = small
    logits = model(data.pixels(dataset.x_train, torch.float32))
    for loss in ("ce", "exact_ce"):
        _, row = row_of(small, loss=loss, label_smoothing=0.2, eval_batch_size=7)
        expected = F.cross_entropy(logits, dataset.y_train, label_smoothing=0.2).item()
        assert row["train_loss"] == pytest.approx(expected, rel=1e-5)
        assert row["train_acc"] == 39 / 40 and row["outcomes"]["test"] == "7ffff"
    assert list(row) == ["train_loss", "train_acc", "train_saturated", "test_loss", "test_acc", "outcomes", "adv_acc",
                         "rounding", "robust_acc", "saturated", "zero_gradient", "local_complexity", "weight_norm"]


def test_an_attack_that_begins_at_the_image_and_the_images_that_it_cannot_leave(small):
    torch.manual_seed(0)
    model, dataset = build_model("mlp", (1, 4, 4), 3, width=8, init_scale=10), small[1]
    x = data.pixels(dataset.x_test, torch.float32)
    y = model(x).argmax(1)
    dataset = replace(dataset, y_train=torch.cat([y, y]), y_test=y)
    _, row = row_of((model, dataset), pgd_start="image", pgd_steps=4, pgd_step_size=0.1, epsilons=[0.2])
    point, zero = x.clone(), []
    for _ in range(4):
        point.requires_grad_()
        gradient, = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
        zero.append((gradient == 0).flatten(1).all(1).sum().item())
        point = (point.detach() + 0.1 * gradient.sign()).clamp(x - 0.2, x + 0.2).clamp(0, 1).detach()
    assert 0 < zero[0] < zero[-1] < 20 and row["zero_gradient"] == zero[0] / 20
    right = model(point).argmax(1) == y
    assert row["adv_acc"]["0.2"] == right.sum().item() / 20 and row["outcomes"]["adv"]["0.2"] == measure.hex_of(right)


@pytest.fixture(scope="module")
def trained():
    """digits and a network of plain PyTorch that has learned them."""
    dataset = data.load_dataset("digits")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(network(dataset.x_train / 255), dataset.y_train).backward()
        optimizer.step()
    return network, dataset


@pytest.mark.parametrize("factor, least, most", [(1, 0, 0.02), (100, 0.3, 1)])
def test_rounding_is_what_the_same_attack_finds_on_the_exact_objective(trained, factor, least, most):
    model, dataset = copy.deepcopy(trained[0]), trained[1]
    for parameter in model[-1].parameters():  # the same predictions, and a softmax that rounds
        parameter.data *= factor
    wrong = 1 - torch.eye(10)
    config, row = row_of((model, dataset), adv_size=200, pgd_steps=10, epsilons=[0.05, 0.15], eval_batch_size=64)
    probes = measure.draw_probes(config, dataset)
    x, y = probes.images, probes.labels

    def withstands(epsilon, loss_of):
        """Plain PGD: ten steps of a quarter of epsilon, the last iterate."""
        point = (x + epsilon * probes.starts[0]).clamp(0, 1)
        for _ in range(10):
            point.requires_grad_()
            gradient, = torch.autograd.grad(loss_of(model(point)), point)
            point = (point.detach() + epsilon / 4 * gradient.sign()).clamp(x - epsilon, x + epsilon).clamp(0, 1)
        return model(point).argmax(1) == y

    def bits(text):
        return torch.tensor([int(bit) for digit in text for bit in f"{int(digit, 16):04b}"]).bool()

    for key, epsilon in (("0.05", 0.05), ("0.15", 0.15)):
        adv = withstands(epsilon, lambda logits: F.cross_entropy(logits, y, reduction="sum"))
        exact = withstands(epsilon, lambda logits: (
            (logits + wrong[y].log()).logsumexp(1) - logits.gather(1, y[:, None])[:, 0]).sum())
        assert row["adv_acc"][key] == pytest.approx(adv.float().mean().item(), abs=0.01)
        assert row["rounding"][key] == pytest.approx((adv & ~exact).float().mean().item(), abs=0.01)
        kept, rounded = (bits(row["outcomes"][name][key]) for name in ("adv", "rounding"))
        assert row["rounding"][key] == rounded.sum().item() / 200 and not (rounded & ~kept).any()
    assert least <= row["rounding"]["0.15"] <= most


def test_a_layer_with_a_pre_activation_that_is_not_a_number_has_no_mean(small):
    model, dataset = small
    broken = build_model("mlp", (1, 4, 4), 3, width=8)
    broken.load_state_dict(model.state_dict())
    broken.layers[2].weight.data[0, 0] = torch.nan
    config, row = row_of((broken, dataset), lc_samples=200, lc_directions=3)
    for means in row["local_complexity"].values():
        assert np.isnan(means["0.1"]).tolist() == [False, True, True]
    directions = measure.draw_probes(config, dataset).directions
    for split, images in (("train", dataset.x_train), ("test", dataset.x_test)):  # fewer than 200: all of them
        counts = local_complexity.local_complexity(broken, data.pixels(images, torch.float32), 0.1, directions)
        assert row["local_complexity"][split]["0.1"][0] == pytest.approx(counts[:, 0].double().mean().item())
