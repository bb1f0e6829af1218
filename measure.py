"""The measurements of a log step: one row of the history, with the columns that the functions in METRICS return."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attacks
import certify
import data
import local_complexity
import models
from compute import distributed
from compute.seeds import seed_for
from flags import Config, epsilon_label, history_key
from losses import build_loss

Progress = Callable[[str, float], None]  # is told what is being measured, and which share of it is done
POINTS_AT_ONCE = 128  # of local complexity on a CPU, and of images to certify, so that the progress shows


class Row(TypedDict, total=False):
    """What a log step records; docs/files.md says what each column holds."""

    epoch: float
    step: int
    train_loss: float
    train_acc: float
    train_saturated: float
    test_loss: float
    test_acc: float
    adv_acc: dict[str, float]
    rounding: dict[str, float]
    robust_acc: dict[str, float]
    certified_acc: dict[str, float]
    saturated: float
    zero_gradient: float
    local_complexity: dict[str, dict[str, list[float]]]
    weight_norm: float
    max_batch_loss: float
    lr: float
    seconds: float
    outcomes: dict[str, Any]


@dataclass
class Probes:
    """What every log step looks at, this process's shard of it: the same in two log steps and in two processes.

    images: (N, C, H, W) test images to attack, in [0, 1]; labels: (N,); starts: (restarts, N, C, H, W), the points
    where PGD starts, in units of epsilon. points: {"train" | "test" | "random": (M, C, H, W)}, those of local
    complexity; directions: (P, C * H * W), orthonormal. certified: rows of the test images to certify. among: whether
    each attacked image is one of these, bool, of all processes.
    """

    images: Tensor
    labels: Tensor
    starts: Tensor
    points: dict[str, Tensor] = field(default_factory=dict)
    directions: Tensor = torch.empty(0)
    certified: Tensor = torch.empty(0, dtype=torch.int64)
    among: Tensor = torch.empty(0, dtype=torch.bool)


def attacked(config: Config, dataset: data.Dataset) -> int:
    """Return how many test images are attacked."""
    return min(config.adv_size, len(dataset.x_test))


def draw_probes(config: Config, dataset: data.Dataset) -> Probes:
    """Return the Probes of a run, which depend only on its flags and its data set."""
    device, dtype = dataset.x_test.device, getattr(torch, config.dtype)

    def generator(purpose: str) -> np.random.Generator:
        return np.random.default_rng(seed_for(config.seed, purpose))

    def draw(images: Tensor, n: int, purpose: str) -> Tensor:
        return torch.from_numpy(np.sort(generator(purpose).permutation(len(images))[:n])).to(device)

    def mine(rows: Tensor) -> Tensor:
        return rows[distributed.shard(len(rows))]

    n, image_shape = attacked(config, dataset), dataset.x_test.shape[1:]
    all_rows = draw(dataset.x_test, n, "attacked images")
    rows, to_certify = mine(all_rows), draw(dataset.x_test, min(n, config.certify), "attacked images")
    starts = torch.from_numpy(
        generator("attack starts").random((config.pgd_restarts, n, *image_shape), dtype=np.float32) * 2 - 1)
    probes = Probes(data.pixels(dataset.x_test[rows], dtype), dataset.y_test[rows],
                    starts[:, distributed.shard(n)].to(device=device, dtype=dtype),
                    certified=mine(to_certify), among=torch.isin(all_rows, to_certify))
    if config.lc_samples:
        for split, images in (("train", dataset.x_train), ("test", dataset.x_test)):
            probes.points[split] = data.pixels(images[mine(draw(images, config.lc_samples, f"{split} points"))], dtype)
        uniform = generator("random points").random((config.lc_samples, *image_shape), dtype=np.float32)
        shard = torch.from_numpy(uniform[distributed.shard(config.lc_samples)])
        probes.points["random"] = shard.to(device=device, dtype=dtype)
        probes.directions = local_complexity.random_directions(
            config.lc_directions, image_shape.numel(), seed_for(config.seed, "directions"), dtype, device)
    return probes


# ---- the metrics: functions of (model, dataset, probes, config, batch_size, progress) that return columns of the row

@torch.inference_mode()
def clean(model: nn.Module, dataset: data.Dataset, probes: Probes, config: Config, batch_size: int,
          progress: Progress) -> Row:
    """Return loss and accuracy on all images, and train_saturated: the share of the training images on which the
    softmax rounds to 1 at the true class, so that the gradient of cross-entropy has lost that class's term."""
    row: Any = {}  # the names of its columns are put together below
    loss_function = build_loss(config.loss, config.label_smoothing)
    for split in ("train", "test"):
        n = len(getattr(dataset, f"y_{split}"))
        part = distributed.shard(n)
        images, labels = getattr(dataset, f"x_{split}")[part], getattr(dataset, f"y_{split}")[part]
        loss, saturated, parts = 0.0, 0, []
        for i, (x, y) in enumerate(zip(images.split(batch_size), labels.split(batch_size), strict=True)):
            progress(f"{split} accuracy", i * batch_size / len(images))
            logits = model(data.pixels(x, getattr(torch, config.dtype)))
            loss += loss_function(logits, y).item() * len(y)
            parts.append(attacks.correct(logits, y))
            saturated += int((logits.softmax(1).gather(1, y[:, None]) == 1).sum())
        sums = torch.tensor([loss, saturated], dtype=torch.float64, device=images.device)
        loss, saturated = distributed.all_reduce_sum(sums).tolist()
        correct = distributed.gather_shards(torch.cat(parts).int(), n)
        row |= {f"{split}_loss": loss / n, f"{split}_acc": correct.sum().item() / n}
        if split == "train":
            row["train_saturated"] = saturated / n
    row["outcomes"] = {"test": hex_of(correct)}
    return row


def under_attack(model: nn.Module, dataset: data.Dataset, probes: Probes, config: Config, batch_size: int,
                 progress: Progress) -> Row:
    """Return adv_acc, as in the paper (PGD on cross-entropy as PyTorch computes it, last iterate); rounding, the
    share of the attacked images that withstand this attack but not the same attack on the exact objective; robust_acc,
    from how many radii each image withstands; saturated, the share on which the softmax rounds to exactly 1;
    zero_gradient, the share whose input gradient of cross-entropy is exactly zero."""
    n, epsilons = attacked(config, dataset), config.epsilons
    outcomes = []
    for start in range(0, len(probes.labels), batch_size):
        part = slice(start, start + batch_size)
        x, y, starts = probes.images[part], probes.labels[part], probes.starts[:, part]
        columns = []
        for i, epsilon in enumerate(epsilons):
            progress("PGD on cross-entropy", (start + i / len(epsilons) * len(y)) / len(probes.labels))
            withstood = withstands(model, x, y, starts, epsilon, config, "ce")
            rounded, left = torch.zeros_like(withstood), withstood.nonzero().flatten()
            if len(left):
                rounded[left] = ~withstands(model, x[left], y[left], starts[:, left], epsilon, config, "exact")
            columns += [withstood, rounded]
        zero = attacks.zero_gradient(model, x, y)
        with torch.inference_mode():
            saturated = model(x).softmax(1).amax(1) == 1
        progress("robust accuracy", start / len(probes.labels))
        counts = attacks.radii_withstood(model, x, y, epsilons, config.pgd_steps, config.robust_budget)
        outcomes.append(torch.stack([counts, saturated, zero, *columns], dim=1))

    counts, saturated, zero, *columns = distributed.gather_shards(torch.cat(outcomes), n).T
    keys = [*map(history_key, epsilons)]
    adv, rounding = (dict(zip(keys, of_kind, strict=True)) for of_kind in (columns[::2], columns[1::2]))
    return {
        "adv_acc": {key: column.sum().item() / n for key, column in adv.items()},
        "rounding": {key: column.sum().item() / n for key, column in rounding.items()},
        "robust_acc": dict(zip(keys, attacks.shares(counts, epsilons), strict=True)),
        "saturated": saturated.sum().item() / n, "zero_gradient": zero.sum().item() / n,
        "outcomes": {"robust": characters_of(counts), "adv": {key: hex_of(column) for key, column in adv.items()},
                     "rounding": {key: hex_of(column) for key, column in rounding.items()}}}


def withstands(model: nn.Module, x: Tensor, y: Tensor, starts: Tensor, epsilon: float, config: Config, objective: str
               ) -> Tensor:
    """Return whether the prediction is right at the last iterate of the attack behind adv_acc, or of the same attack on
    the exact objective, bool (N,)."""
    x_adv = attacks.pgd(model, x, y, epsilon, config.pgd_steps, config.pgd_step_size, config.pgd_restarts, objective,
                        starts=starts, start=config.pgd_start)
    with torch.inference_mode():
        return attacks.correct(model(x_adv), y)


def certified(model: nn.Module, dataset: data.Dataset, probes: Probes, config: Config, batch_size: int,
              progress: Progress) -> Row:
    """Return certified_acc, the share of config.certify of the attacked images that are certified; nothing if that is
    0."""
    if config.certify == 0:
        return {}
    parts = []
    for i, rows in enumerate(probes.certified.split(POINTS_AT_ONCE)):
        progress("certified accuracy", i * POINTS_AT_ONCE / len(probes.certified))
        x = data.pixels(dataset.x_test[rows], getattr(torch, config.dtype))
        parts.append(certify.radii_certified(model, x, dataset.y_test[rows], config.epsilons))
    counts = distributed.gather_shards(torch.cat(parts), int(probes.among.sum()))
    keys, found = map(history_key, config.epsilons), iter(characters_of(counts))
    return {"certified_acc": dict(zip(keys, attacks.shares(counts, config.epsilons), strict=True)),
            "outcomes": {"certified": "".join(next(found) if one else "-" for one in probes.among.tolist())}}


def complexity(model: nn.Module, dataset: data.Dataset, probes: Probes, config: Config, batch_size: int,
               progress: Progress) -> Row:
    """Return local_complexity: {set of points: {radius: [mean count of each layer]}}, NaN for a layer with a
    pre-activation that is NaN."""
    means = {}
    for name, points in probes.points.items():
        parts, at_once = [], POINTS_AT_ONCE if points.is_cpu else len(points)
        for start in range(0, len(points), at_once):
            progress(f"local complexity, {name} points", start / len(points))
            parts.append(local_complexity.local_complexity(model, points[start:start + at_once],
                                                           config.lc_radius, probes.directions, config.eval_batch_size))
        counts = torch.cat(parts, dim=1)
        undefined = distributed.all_reduce_sum((counts < 0).any(1).long()) > 0
        total = min(config.lc_samples, len(getattr(dataset, f"x_{name}"))) if name != "random" else config.lc_samples
        sums = distributed.all_reduce_sum(counts.sum(1)).cpu().double()
        mean = (sums / total).masked_fill(undefined.cpu(), math.nan).tolist()
        means[name] = {history_key(radius): layers for radius, layers in zip(config.lc_radius, mean, strict=True)}
    return {"local_complexity": means}


def weight_norm(model: nn.Module, *_: object) -> Row:
    """Return weight_norm, the norm of all parameters together."""
    return {"weight_norm": nn.utils.get_total_norm([p.detach().cpu().double() for p in model.parameters()]).item()}


METRICS = (clean, under_attack, certified, complexity, weight_norm)


def measure(model: nn.Module, dataset: data.Dataset, probes: Probes, config: Config,
            progress: Progress = lambda what, share: None, metrics: Sequence[Callable] = METRICS) -> Row:
    """Return one row of the history: what a log step records of the network, except for its step and time.

    config: the flags as used. progress: called with what is being measured and which share of it is done (0 to 1).
    metrics: those of METRICS to measure.
    """
    batch_size = config.eval_batch_size or default_eval_batch_size(
        model, data.pixels(dataset.x_train[:1], getattr(torch, config.dtype)))
    row: Row = {}
    with models.evaluating(model):
        for metric in metrics:
            columns = metric(model, dataset, probes, config, batch_size, progress)
            row |= {**columns, "outcomes": row.get("outcomes", {}) | columns.get("outcomes", {})}
    return row


def characters_of(counts: Tensor) -> str:
    """Return one character for each image: chr(48 + k) for a count of k, so "0" to "9" for those up to 9."""
    return "".join(map(chr, (48 + counts).tolist()))


def hex_of(bits: Tensor) -> str:
    """Return one bit for each image as text, four images to a hexadecimal digit, the first in the highest bit."""
    packed = np.packbits(bits.bool().cpu().numpy()).tobytes().hex()
    return packed[:-(-len(bits) // 4)]


class Outputs(TorchDispatchMode):
    """Counts the elements of what PyTorch's operators return."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.elements += sum(tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, Tensor))
        return result


def default_eval_batch_size(model: nn.Module, image: Tensor) -> int:
    """Return how many inputs like image, (1, C, H, W), the network can take at once within about 1 GB of activations,
    or 4 GB on a GPU. What is free there does not count: a resumed run has to evaluate in the same batches."""
    outputs = Outputs()

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        outputs.elements += 0 if any(module.children()) else output.numel()

    # Networks of ours by the modules' outputs: other batches would change the last bits.
    counting: Any = register_module_forward_hook(count) if isinstance(model, models.Network) else outputs
    with torch.no_grad(), models.evaluating(model), counting:
        model(image)
    memory, most = (2**32, 10_000) if image.device.type == "cuda" else (2**30, 1000)
    # Twice: a backward pass holds the activations and their gradients.
    return max(1, min(memory // (2 * max(1, outputs.elements) * image.element_size()), most))


# ---- what a row says to the reader ----------------------------------------------------------------------------------

def remarks(row: Row, config: Config) -> dict[str, str]:
    """Return {kind: line} of what a reader of this row should know; a run prints each kind once."""
    found = {}
    if row["zero_gradient"] > 0.01:
        found["zero gradient"] = (
            f"on {100 * row['zero_gradient']:.0f}% of the attacked images the input gradient of cross-entropy is "
            "exactly zero: PGD that starts at the image never moves and counts them as robust; trust robust_acc")
    parts = {key: (rounding, row["adv_acc"][key] - row["robust_acc"][key] - rounding)
             for key, rounding in row["rounding"].items()}
    for i, kind in enumerate(("rounding", "stronger attack")):
        key = max(parts, key=lambda key: parts[key][i])
        if parts[key][i] > 0.05:
            rounding, weaker = (100 * part for part in parts[key])
            found[kind] = (
                f"at epsilon {epsilon_label(key)} adv_acc is {100 * row['adv_acc'][key]:.1f}% and robust_acc "
                f"{100 * row['robust_acc'][key]:.1f}%: {rounding:.1f} points are rounding (the same attack without the "
                f"rounding of cross-entropy breaks these images), {weaker:.1f} are found by a stronger attack only; "
                "trust robust_acc")
    if config.loss == "ce" and row["train_saturated"] > 0.5:
        found["training saturated"] = (
            f"on {100 * row['train_saturated']:.0f}% of the training images the softmax rounds to exactly 1: there the "
            "gradient of cross-entropy has lost its true-class term, and what the run does from here on may be "
            "rounding; --loss=exact_ce is the same loss without it")
    return found
