"""What a run means: its steps against plain PyTorch, its columns against direct calls, with flags of its own."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import history_of, run_here

import attacks
import data
import local_complexity
import models
from compute.seeds import seed_for
from data import augmented, draw_shifts
from records import checkpoints
from train import Trainer, batch_order, build_model, complete, parse_args

EPSILONS = [0.02, 0.07, 0.15]
FLAGS = ["--dataset=digits", "--width=12", "--depth=3", "--train_size=120", "--batch_size=40", "--n_steps=60",
         "--log_points=4", "--threads=1", "--device=cpu", "--no_plot", "--seed=7", "--lr=0.004", "--weight_decay=0.3",
         "--epsilons=0.02,0.07,0.15", "--pgd_steps=4", "--pgd_step_size=0.011", "--pgd_restarts=2", "--adv_size=90",
         "--robust_budget=low", "--lc_samples=50", "--lc_directions=9", "--lc_radius=0.2,0.02", "--label_noise=0.2"]


# ---- training -------------------------------------------------------------------------------------------------------

def stablemax(z, y):
    s = torch.where(z >= 0, z + 1, 1 / (1 - z))
    return -(s[torch.arange(len(y)), y] / s.sum(1)).log().mean()


PLAIN_LOSSES = {
    "ce": F.cross_entropy,
    "exact_ce": F.cross_entropy,  # the same function, where nothing saturates
    "mse": lambda z, y: ((z - F.one_hot(y, 10)) ** 2).mean(),
    "stablemax": stablemax,
}
PLAIN_OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.004, weight_decay=0.3, eps=1e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=0.004, weight_decay=0.3, eps=1e-4),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.004, weight_decay=0.3, momentum=0.9),
}
PLAIN_SCHEDULES = {
    "constant": lambda step: 1.0,
    "triangle": lambda step: min((step + 1) / 20, 1) * min((60 - step) / 40, 1),
    "cosine": lambda step: min((step + 1) / 20, 1) * 0.5 * (1 + math.cos(math.pi * max(step - 20, 0) / 40)),
}


def plain_training(dataset, loss, optimizer, steps, orthogonal=False, schedule="constant", smoothing=0.0):
    """Train as one would without this program; return (network, the losses of the steps)."""
    torch.manual_seed(seed_for(7, "weights"))
    model = models.build_model("mlp", (1, 8, 8), 10, depth=3, width=12, mean=dataset.mean, std=dataset.std).double()
    optimizer = PLAIN_OPTIMIZERS[optimizer](model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, PLAIN_SCHEDULES[schedule])
    loss_of = functools.partial(F.cross_entropy, label_smoothing=smoothing) if smoothing else PLAIN_LOSSES[loss]
    rows = batch_order(7, 0, steps // 3 + 1, 120, 40).view(-1, 40)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss_of(model(dataset.x_train[rows[step]].double() / 255), dataset.y_train[rows[step]])
        value.backward()
        for p in model.parameters() if orthogonal else ():
            w, g = p.detach().flatten(), p.grad.flatten()
            rest = g - (w @ g) / (w @ w) * w
            p.grad = (rest * g.norm() / rest.norm()).view_as(p)
        optimizer.step()
        scheduler.step()
        seen.append(value.item())
    return model, seen


@pytest.mark.parametrize("loss, optimizer, orthogonal, schedule, smoothing", [
    ("ce", "adamw", False, "constant", 0), ("ce", "adam", False, "triangle", 0), ("ce", "sgd", False, "constant", 0),
    ("exact_ce", "adamw", False, "cosine", 0.1), ("mse", "adamw", False, "constant", 0),
    ("stablemax", "adamw", False, "constant", 0), ("ce", "adamw", True, "constant", 0),
    ("ce", "sgd", False, "cosine", 0.2)])
def test_the_steps_are_those_of_a_plain_loop(tmp_path, loss, optimizer, orthogonal, schedule, smoothing):
    run_here(tmp_path, *FLAGS, "--dtype=float64", f"--loss={loss}", f"--optimizer={optimizer}",
             *["--orthogonal_gradient"] * orthogonal, "--momentum=0.9" if optimizer == "sgd" else "--adam_eps=1e-4",
             *([f"--lr_schedule={schedule}", "--warmup_steps=20"] if schedule != "constant" else []),
             f"--label_smoothing={smoothing}")
    dataset = data.load_dataset("digits", train_size=120, seed=7, label_noise=0.2)
    model, losses = plain_training(dataset, loss, optimizer, 60, orthogonal, schedule, smoothing)
    history, state = history_of(tmp_path), last_checkpoint(tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state["model_state_dict"][name], value, rtol=1e-5, atol=1e-8)
    steps = history["step"]
    expected = [max(losses[a:b]) for a, b in zip(steps, steps[1:], strict=False)]
    assert history["max_batch_loss"][0] is None and history["max_batch_loss"][1:] == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        z = model(dataset.x_test.double() / 255)
    expected = F.cross_entropy(z, dataset.y_test, label_smoothing=smoothing) if smoothing else (
        PLAIN_LOSSES[loss](z, dataset.y_test))
    assert history["test_loss"][-1] == pytest.approx(expected.item(), rel=1e-6)


def last_checkpoint(folder):
    return checkpoints.load_checkpoint(checkpoints.saved_checkpoints(folder / "checkpoints")[0])


def test_augmentation_shifts_in_black_and_mirrors_half_of_the_images():
    images = torch.randint(1, 256, (200, 3, 16, 24), dtype=torch.uint8)
    shifts = draw_shifts(7, 200, (3, 16, 24), mirror=True)
    assert shifts[:, 0].unique().tolist() == [-2, -1, 0, 1, 2] and shifts[:, 1].unique().tolist() == [*range(-3, 4)]
    assert shifts[:, 2].unique().tolist() == [0, 1] and torch.equal(
        draw_shifts(7, 200, (3, 16, 24), mirror=False)[:, :2], shifts[:, :2])
    for image, (down, right, mirrored), moved in zip(images, shifts.tolist(), augmented(images, shifts), strict=True):
        expected = torch.zeros_like(image)
        image = image.flip(2) if mirrored else image
        for y in range(max(down, 0), min(16, 16 + down)):
            for x in range(max(right, 0), min(24, 24 + right)):
                expected[:, y, x] = image[:, y - down, x - right]
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("augment", [False, True])
def test_a_run_trains_on_the_images_drawn_for_its_steps(augment):
    args = parse_args(["--dataset=mnist", "--train_size=50", "--batch_size=20", "--n_steps=9000", "--seed=7",
                       *["--augment"] * augment])
    rng = np.random.default_rng(0)
    images, labels = (torch.from_numpy(rng.integers(0, high, shape)) for high, shape in (
        (256, (50, 1, 16, 16)), (10, 50)))
    dataset = data.Dataset("random", images.byte(), labels, images[:5].byte(), labels[:5], 10, [0.0], [1.0])
    config = complete(args, dataset, torch.device("cpu"))
    seen = []
    model = build_model(config, dataset)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    epochs = 65_536 // 50  # in a block, which has generators of its own
    Trainer(model, config, dataset).advance(2 * epochs - 2, 4)  # the last epoch of the first block, and the next
    for block, epoch, batches in ((0, epochs - 1, seen[:2]), (1, 0, seen[2:])):
        generator = torch.Generator().manual_seed(seed_for(7, "batches", block))
        rows = [torch.randperm(50, generator=generator)[:40] for _ in range(epoch + 1)][-1]
        expected = dataset.x_train[rows]
        if augment:
            shifts = draw_shifts(seed_for(7, "augmentation", block), epochs * 40, (1, 16, 16), False)
            expected = augmented(expected, shifts.view(epochs, 40, 3)[epoch])
        torch.testing.assert_close(torch.cat(batches), expected / 255)


@pytest.mark.parametrize("name, mirrored", [("cifar10", {0, 1}), ("imagefolder", {0})])
def test_only_images_whose_mirror_image_is_of_the_same_class_are_mirrored(name, mirrored):
    images, labels = torch.zeros(40, 3, 16, 16, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64)
    dataset = data.Dataset(name, images, labels, images, labels, 10, [0.0], [1.0])
    config = complete(parse_args([f"--dataset={name}", "--augment", "--batch_size=20", "--width=4", "--model=cnn"]),
                      dataset, torch.device("cpu"))
    trainer = Trainer(build_model(config, dataset), config, dataset)
    trainer.load_block(0)
    assert {*trainer.shifts[..., 2].flatten().tolist()} == mirrored and len(trainer.shifts[..., 0].unique()) == 5


def test_an_epoch_takes_each_image_at_most_once_and_the_next_another_order():
    order = batch_order(7, 0, 5, 50, 15).view(5, 45)
    assert all(len(set(epoch.tolist())) == 45 for epoch in order) and len({*map(tuple, order.tolist())}) == 5


def test_a_step_does_not_depend_on_how_the_steps_are_dealt_out(tmp_path):
    args = parse_args([*FLAGS, "--n_steps=7000", "--train_size=100", "--batch_size=50"])
    dataset = data.load_dataset("digits", train_size=100, seed=7, label_noise=0.2)
    config = complete(args, dataset, torch.device("cpu"))

    def weights(*calls):
        model = build_model(config, dataset)
        trainer = Trainer(model, config, dataset)
        for step, n in calls:
            trainer.advance(step, n)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = weights((0, 30))
    assert torch.equal(weights((0, 1), (1, 12), (13, 17)), whole)
    assert not torch.equal(weights((0, 1), (8, 1)), weights((0, 1), (1, 1)))  # the batch is that of the step
    assert torch.equal(weights((1308, 4)), weights((1308, 1), (1309, 1), (1310, 1), (1311, 1)))  # blocks: 1310 steps


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_steps_count_as_finite_up_to_the_first_loss_that_is_not(bad):
    dataset = data.load_dataset("digits", train_size=120, seed=7)
    config = complete(parse_args(FLAGS), dataset, torch.device("cpu"))
    trainer, values = Trainer(build_model(config, dataset), config, dataset), iter([3.0, 1.0, bad, 2.0])
    trainer.loss_function = lambda logits, y: 0 * logits.sum() + next(values)
    trainer.advance(0, 2)
    assert trainer.finite_steps == 2 and trainer.largest_loss == 3
    trainer.advance(2, 2)
    assert trainer.finite_steps == 2 and not trainer.largest_loss.isfinite()


# ---- measuring ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [["--batch_norm"], ["--init_scale=40", "--eval_batch_size=7"],
                                   ["--dtype=float64", "--loss=mse", "--robust_budget=high"]], ids=" ".join)
def test_every_column_is_what_direct_calls_give(tmp_path, flags):
    run_here(tmp_path, *FLAGS, *flags)
    history, state = history_of(tmp_path), last_checkpoint(tmp_path)
    config = history["config"]
    dataset = data.load_dataset("digits", train_size=120, seed=7, label_noise=0.2)
    dtype = getattr(torch, config["dtype"])
    model = models.build_model("mlp", (1, 8, 8), 10, depth=3, width=12, batch_norm=config["batch_norm"]).to(dtype)
    model.load_state_dict(state["model_state_dict"])
    model.eval()

    def last(*path):
        value = history
        for key in path:
            value = value[key]
        return value[-1]

    loss = PLAIN_LOSSES[config["loss"]]
    for split in ("train", "test"):
        x, y = getattr(dataset, f"x_{split}").to(dtype) / 255, getattr(dataset, f"y_{split}")
        with torch.no_grad():
            z = model(x)
        right = z.argmax(1) == y
        assert last(f"{split}_loss") == pytest.approx(loss(z, y).item(), rel=1e-5)
        assert last(f"{split}_acc") == right.double().mean().item()
        if split == "train":
            p = z.softmax(1)[torch.arange(len(y)), y]
            assert last("train_saturated") == pytest.approx((p == 1).double().mean().item())
        else:
            assert bits(last("outcomes", "test"), len(y)) == right.tolist()

    def drawn(n_images, n, purpose):
        return np.sort(np.random.default_rng(seed_for(7, purpose)).permutation(n_images)[:n])

    rows = drawn(797, 90, "attacked images")
    x, y = dataset.x_test[rows].to(dtype) / 255, dataset.y_test[rows]
    starts = np.random.default_rng(seed_for(7, "attack starts")).random((2, 90, 1, 8, 8), dtype=np.float32) * 2 - 1
    assert starts.min() < -0.99 and starts.max() > 0.99
    for epsilon in EPSILONS:
        x_adv = attacks.pgd(model, x, y, epsilon, steps=4, step_size=0.011, restarts=2, objective="ce",
                            starts=torch.from_numpy(starts))
        with torch.no_grad():
            right = model(x_adv).argmax(1) == y
        assert last("adv_acc", f"{epsilon}") == right.double().mean().item()
        assert bits(last("outcomes", "adv", f"{epsilon}"), 90) == right.tolist()
    robust = attacks.robust_accuracy(model, x, y, EPSILONS, steps=4, budget=config["robust_budget"])
    assert [last("robust_acc", f"{epsilon}") for epsilon in EPSILONS] == robust
    ranks = [ord(character) - 48 for character in last("outcomes", "robust")]
    assert [sum(rank > place for rank in ranks) / 90 for place in (1, 2, 3)] == robust
    with torch.no_grad():
        assert last("saturated") == (model(x).softmax(1).amax(1) == 1).double().mean().item()

    directions = local_complexity.random_directions(9, 64, seed_for(7, "directions"), dtype)
    points = {"train": dataset.x_train[drawn(120, 50, "train points")].to(dtype) / 255,
              "test": dataset.x_test[drawn(797, 50, "test points")].to(dtype) / 255,
              "random": torch.from_numpy(np.random.default_rng(seed_for(7, "random points")).random(
                  (50, 1, 8, 8), dtype=np.float32)).to(dtype)}
    for name, x in points.items():
        for radius in (0.02, 0.2):
            counts = local_complexity.local_complexity(model, x, radius, directions)
            assert last("local_complexity", name, f"{radius}") == pytest.approx(counts.double().mean(0).tolist())
    norm = math.sqrt(sum(p.double().square().sum().item() for p in model.parameters()))
    assert last("weight_norm") == pytest.approx(norm)
    assert history["epoch"][-1] == 20


def bits(text, n):
    """Return the outcomes that a text of the history holds, four a hexadecimal digit."""
    return [digit == "1" for digit in "".join(f"{int(character, 16):04b}" for character in text)[:n]]


@pytest.mark.parametrize("n", [1, 4, 5, 797])
def test_outcomes_are_written_four_a_digit_the_first_in_the_highest_bit(n):
    from measure import hex_of

    right = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
    text = hex_of(right)
    assert len(text) == -(-n // 4) and bits(text, n) == right.tolist()
    assert hex_of(torch.tensor([True] * 5)) == "f8"


def test_eval_batch_size_bounds_what_a_log_step_holds_at_once(tmp_path, monkeypatch):
    held = []
    for name in ("encode", "decode"):
        function = getattr(models.MLP, name)

        def watched(self, x, function=function):
            if not self.training:
                held.append(len(x))
            return function(self, x)

        monkeypatch.setattr(models.MLP, name, watched)
    run_here(tmp_path, *FLAGS, "--n_steps=1", "--eval_batch_size=9")
    assert max(held) == 9
    held.clear()
    run_here(tmp_path, *FLAGS, "--n_steps=1")
    assert max(held) > 100
