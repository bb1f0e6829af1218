"""Train a network far past interpolation and watch it grok.

One command trains an MLP, a CNN or a ResNet-18 and records at each log step clean accuracy, accuracy under l-inf PGD
attack and local complexity: the experiment of Humayun, Balestriero and Baraniuk, "Deep Networks Always Grok and Here is
Why" (arXiv:2402.15555).

    python train.py --dataset=digits --n_steps=20000                # embedded data, no download
    python train.py --dataset=mnist --n_epochs=20000                # the paper's MNIST MLP, 100,000 steps
    torchrun --nproc_per_node=2 train.py --model=resnet18 --dataset=cifar10 --batch_size=64 --weight_decay=0
    sbatch run_mnist_mlp.sh --width=1000                            # on a SLURM cluster

The flags are in flags.py, one entry each. This file is the experiment: the training step, the log step, the loop. A run
leaves logs/training_history.json, a figure next to it, and checkpoints/checkpoint_epoch_*.pt. Exit status: 0 the run is
complete; 1 it failed on the way (full disk, a loss that is not finite); 2 the command or its input is wrong; 128 + n it
was stopped by signal n and can be resumed.
"""
# ruff: noqa: E402

import copy
import dataclasses
import errno
import itertools
import math
import os
import signal
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, cast

import flags
from flags import IMPLIED, Config, asked, implied, parse_args

if __name__ == "__main__":  # importing PyTorch takes seconds: answer Ctrl-C, --help and a wrong flag before
    signal.signal(signal.SIGINT, lambda *_: (print("train.py: interrupted", file=sys.stderr), os._exit(130)))
    parse_args()

import torch

import attacks
import data
import local_complexity
import losses
import measure
import models
from compute import cuda_graph, distributed, signals
from compute import device as devices
from compute.seeds import seed_for
from records import checkpoints, files, history, trackers
from records.console import Console
from records.run import Figure, Run, fail, fail_together, parent_of

STRETCH = 10  # steps between two looks at signals and the clock; ten times as many where they are replayed on a GPU


# ---- the training step ----------------------------------------------------------------------------------------------

# name: its class, its options by a run's flags. captured: whether its steps are going to be captured in a CUDA graph.
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[[Config, bool], dict[str, Any]]]] = {
    "adamw": (torch.optim.AdamW, lambda config, captured: {"eps": config.adam_eps, "capturable": captured}),
    "adam": (torch.optim.Adam, lambda config, captured: {"eps": config.adam_eps, "capturable": captured}),
    "sgd": (torch.optim.SGD, lambda config, captured: {"momentum": config.momentum})}


def batch_order(seed: int, block: int, epochs: int, n_images: int, batch_size: int) -> torch.Tensor:
    """Return the rows (epochs * steps per epoch * batch_size,) of the batches of `epochs` epochs, on the CPU.

    Each epoch is a fresh permutation of the n_images without its incomplete last batch. A function of its arguments
    alone: a resumed run draws the batches of the uninterrupted one. Seeding a generator takes longer than a step of a
    small network, so a block of epochs shares one.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "batches", block))
    used = n_images // batch_size * batch_size
    return torch.cat([torch.randperm(n_images, generator=generator)[:used] for _ in range(epochs)])


def learning_rates(config: Config, steps: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Return the learning rate of the step that follows so many steps, for each of them: along the line of the warm-up,
    which begins at step `first`, then by the schedule."""
    warmup, n_steps = config.warmup_steps, config.n_steps - first
    steps = (steps - first).to(getattr(torch, config.dtype))
    left = ((n_steps - steps) / (n_steps - warmup)).clamp(max=1)  # from 1 at the end of the warm-up to 0
    factor = {"constant": torch.ones_like(left), "triangle": left, "cosine": (1 - (math.pi * left).cos()) / 2}
    rise = ((steps + 1) / warmup).clamp(max=1) if warmup else 1
    return config.lr * rise * factor[config.lr_schedule]


@torch.no_grad()
def orthogonalise(parameters: list[torch.nn.Parameter]) -> None:
    """Remove from each tensor's gradient its component along the weights and scale it back to its norm, in place.

    Prieto et al. 2025, "Grokking at the edge of numerical stability" (arXiv:2501.04697). Otherwise cross-entropy can
    always fall by scaling the logits up, which ends in a saturated softmax.
    """
    tiny = torch.finfo(parameters[0].dtype).tiny
    for weight in parameters:
        if (gradient := weight.grad) is not None:
            along = (weight * gradient).sum() / (weight.square().sum() + tiny)
            before = torch.linalg.vector_norm(gradient)
            gradient.sub_(along * weight)
            gradient.mul_(before / (torch.linalg.vector_norm(gradient) + tiny))


class Trainer:
    """Makes the training steps of a run.

    model: trained in place. dataset: on the training device. report: called with one line if a CUDA graph cannot be
    captured. schedule_from: the step at which warm-up and schedule begin. optimizer: saved in a checkpoint.
    finite_steps: tensor, the number of steps before the first whose loss was not finite. largest_loss: tensor, the
    largest batch loss since it was last set to -inf.
    """

    def __init__(self, model: torch.nn.Module, config: Config, dataset: data.Dataset, report: Callable = print,
                 schedule_from: int = 0):
        where, self.dtype = dataset.x_train.device, getattr(torch, config.dtype)
        self.config, self.dataset, self.parameters = config, dataset, list(model.parameters())
        self.schedule_from = schedule_from
        compiled = torch.compile(model) if config.compile == "on" else model
        self.network = distributed.wrap(cast(torch.nn.Module, compiled), where)
        self.loss_function = losses.build_loss(config.loss, config.label_smoothing)
        # Several processes exchange gradients in a step, which a graph does not capture here.
        captured = where.type == "cuda" and config.cuda_graph and distributed.world_size() == 1
        # PyTorch's fused kernels for CUDA read the learning rate as float32, whatever the weights are.
        rate_dtype = torch.float32 if where.type == "cuda" else self.dtype
        varying = config.lr_schedule != "constant" or config.warmup_steps > 0
        lr = torch.tensor(config.lr, dtype=rate_dtype, device=where) if varying else config.lr
        kind, options = OPTIMIZERS[config.optimizer]
        self.optimizer = kind(self.parameters, lr=lr, weight_decay=config.weight_decay, fused=True,
                              **options(config, captured))
        self.epochs_in_block = max(1, 65_536 // config.train_size)
        self.block_steps = self.epochs_in_block * (config.train_size // config.batch_size)
        self.block: int | None = None
        # Tensors that keep their place, so that a captured step finds them: tables with a row for each step of the
        # block, of this process's share of the batch, and which row is next.
        size = self.block_steps, config.batch_size // distributed.world_size()
        self.order = torch.empty(size, dtype=torch.int64, device=where)
        self.shifts = torch.empty(*size, 3, dtype=torch.int64, device=where) if config.augment else None
        self.rates = torch.empty(self.block_steps, dtype=rate_dtype, device=where) if varying else None
        self.next_row = torch.zeros(1, dtype=torch.int64, device=where)
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=where)
        self.all_finite = torch.ones((), dtype=torch.bool, device=where)
        self.largest_loss = torch.full((), -math.inf, dtype=self.dtype, device=where)
        self.shard_losses: list[torch.Tensor] = []  # of this process's slices of the batches, if there are several
        self.last_enqueued: torch.cuda.Event | None = None
        self.repeat = cuda_graph.repeater(self.step, report) if captured else self.repeat_step

    def advance(self, step: int, n: int) -> None:
        """Make the n training steps that follow `step`."""
        while n > 0:
            block, offset = divmod(step, self.block_steps)
            if block != self.block:
                self.load_block(block)
            self.next_row.fill_(offset)
            length = min(n, self.block_steps - offset)
            self.repeat(length)
            step, n = step + length, n - length
        self.observe_shards()

    def load_block(self, block: int) -> None:
        config, self.block = self.config, block
        share = distributed.shard(config.batch_size)
        order = batch_order(config.seed, block, self.epochs_in_block, config.train_size, config.batch_size)
        tables = [(self.order, order.view(self.block_steps, -1)[:, share])]
        if self.shifts is not None:
            shifts = data.draw_shifts(seed_for(config.seed, "augmentation", block), len(order),
                                      self.dataset.x_train.shape[1:], data.DATASETS[config.dataset].mirror)
            tables.append((self.shifts, shifts.view(self.block_steps, -1, 3)[:, share]))
        if self.rates is not None:
            steps = torch.arange(block * self.block_steps, (block + 1) * self.block_steps)
            tables.append((self.rates, learning_rates(config, steps, self.schedule_from)))
        for place, values in tables:
            values = values.to(place.dtype)
            # From pinned memory the copy waits its turn on the GPU, and the host does not wait for it.
            place.copy_(values.pin_memory() if place.is_cuda else values, non_blocking=True)

    def repeat_step(self, n: int) -> None:
        for _ in range(n):
            self.step()

    def step(self) -> None:
        """Make the step at self.next_row; reads nothing back from the device."""
        rows = self.order.index_select(0, self.next_row)[0]
        images = self.dataset.x_train.index_select(0, rows)
        if self.shifts is not None:
            images = data.augmented(images, self.shifts.index_select(0, self.next_row)[0])
        if self.rates is not None:
            self.optimizer.param_groups[0]["lr"].copy_(self.rates.index_select(0, self.next_row)[0])
        self.next_row.add_(1)
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.network(data.pixels(images, self.dtype))
        loss = self.loss_function(logits, self.dataset.y_train.index_select(0, rows))
        loss.backward()
        if self.config.orthogonal_gradient:
            orthogonalise(self.parameters)
        self.optimizer.step()
        if distributed.world_size() == 1:
            self.observe(loss.detach())
        else:
            self.shard_losses.append(loss.detach())

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the step that follows `step` steps."""
        if self.rates is None:
            return self.config.lr
        return learning_rates(self.config, torch.tensor([step]), self.schedule_from).item()

    def stay_close(self) -> None:
        """Let the host run ahead of the GPU by one stretch of steps: the GPU never idles, a signal is obeyed soon."""
        enqueued = torch.cuda.Event(blocking=True)  # which lets the core sleep
        enqueued.record()
        if self.last_enqueued is not None:
            self.last_enqueued.synchronize()
        self.last_enqueued = enqueued

    def observe(self, loss: torch.Tensor) -> None:
        """Note the loss of a whole batch, a scalar."""
        self.finite_steps.add_(self.all_finite.logical_and_(loss < math.inf))  # false for NaN, too
        torch.maximum(self.largest_loss, loss, out=self.largest_loss)

    def observe_shards(self) -> None:
        """With several processes, note the losses of the batches since the last call: one exchange for all of them."""
        if self.shard_losses:
            for loss in distributed.all_reduce_sum(torch.stack(self.shard_losses)) / distributed.world_size():
                self.observe(loss)
            self.shard_losses.clear()


# ---- the log step ---------------------------------------------------------------------------------------------------

def log_step(run: Run, dataset: data.Dataset, probes: measure.Probes, stop: signals.Stop) -> None:
    """Measure the network and record a row of the history and of the table, and a checkpoint."""
    config, derived = run.config, run.history["derived"]
    check_finite(run)
    torch.set_num_threads(derived["eval_threads"])
    with stop.while_measuring():
        row = measure.measure(run.model, dataset, probes, config, run.console.measuring)
    torch.set_num_threads(derived["threads"])
    if not math.isfinite(row["train_loss"]):
        refuse_nan(run, f"the training loss at step {run.step}", before=run.step)
    largest_loss = run.trainer.largest_loss.item()
    row = {"epoch": run.epoch, "step": run.step, **row,
           "max_batch_loss": largest_loss if run.step > 0 else math.nan, "lr": run.trainer.learning_rate(run.step),
           "seconds": run.seconds}
    run.trainer.largest_loss.fill_(-math.inf)
    said = {warning.get("kind") for warning in run.history["warnings"]}
    run.record(row, {kind: text for kind, text in measure.remarks(row, config).items() if kind not in said})


def log_schedule(n_steps: int, log_points: int, log_from: int = 1) -> list[int]:
    """Return the log steps: log_points whole numbers from 0 to n_steps, evenly spaced in log(step) from log_from on.

    Where even spacing would be closer than one step, neighbours are one step apart and the rest is spaced anew, so
    there are exactly log_points (3 or more) of them unless n_steps is smaller than that.
    """
    steps = [0, min(log_from, n_steps)]
    while steps[-1] < n_steps:
        left = max(log_points - len(steps), 1)
        ratio = (n_steps / steps[-1]) ** (1 / left)
        steps.append(min(max(steps[-1] + 1, round(steps[-1] * ratio)), n_steps))
    return steps


def schedule_for(config: Config) -> Sequence[int]:
    """Return the log steps before the last step, in order."""
    if config.log_interval is None:
        return log_schedule(config.n_steps, config.log_points, config.log_from)[:-1]
    return range(0, config.n_steps, config.log_interval * (config.train_size // config.batch_size))


# ---- the loop -------------------------------------------------------------------------------------------------------

class RunFailed(Exception):
    """The run cannot go on; the message is the one line to print."""


def check_finite(run: Run) -> None:
    """Raise RunFailed if a step's loss was not finite, unless --on_nan=continue."""
    bad = run.step - int(run.trainer.finite_steps.item())
    if bad:
        step = run.step - bad + 1
        # The loss of step n is that of the weights after n - 1 steps: they are already bad.
        refuse_nan(run, f"the loss of step {step}", before=step - 1)


def refuse_nan(run: Run, what: str, before: int) -> None:
    """Raise RunFailed, naming the last checkpoint with fewer than `before` steps, unless --on_nan=continue."""
    if run.config.on_nan == "continue":
        return
    _, path = checkpoints.newest_checkpoint(run.config.save_dir, run.console.note, before=before)
    good = f"the last good checkpoint is {path}" if path else "there is no good checkpoint"
    raise RunFailed(f"{what} is not finite (learning rate {run.config.lr:g}); {good}; lower --lr, or go on with "
                    "--resume --on_nan=continue")


def train(run: Run, dataset: data.Dataset, probes: measure.Probes, stop: signals.Stop, figure: Figure | None) -> int:
    """Train to n_steps with a log step at each step of the schedule; return the number of the signal that stopped the
    run, or 0 if it is complete. figure: on rank 0 only."""
    config, schedule, device = run.config, schedule_for(run.config), dataset.x_train.device
    stretch = STRETCH * 10 if device.type == "cuda" and distributed.world_size() == 1 else STRETCH
    run.console.start(config.epsilons, config.lc_radius, run.step, config.n_steps,
                      len(schedule) + 1 - bisect_left(schedule, run.step))
    while True:
        following = bisect_right(schedule, run.step)  # the first log step after this one
        due = run.step == config.n_steps or (following > 0 and schedule[following - 1] == run.step)
        logging = due and run.history["step"][-1:] != [run.step]
        if logging:
            with suppress(signals.Interrupted):
                log_step(run, dataset, probes, stop)
        # The processes agree on what only some of them know: each of the following steps is made by all or by none.
        saving, drawing, stopped_by = distributed.all_reduce_max(
            [run.save_due(), logging and figure is not None and figure.due(), stop.signal or distributed.orphaned()],
            device)
        if drawing:
            distributed.run_on_rank0(figure.redraw if figure else lambda: None)
        if saving or stopped_by:
            check_finite(run)
            run.save_rolling()
        if stopped_by or run.step == config.n_steps:
            break
        target = schedule[following] if following < len(schedule) else config.n_steps
        n = min(stretch, target - run.step)
        began = time.perf_counter()
        run.trainer.advance(run.step, n)
        run.step += n
        if device.type == "cpu":
            check_finite(run)
        elif device.type == "cuda":  # looking at the loss would wait for the device: only the log steps do
            run.trainer.stay_close()
        run.console.progress(run.step, time.perf_counter() - began)
    run.console.end()
    return stopped_by


# ---- a run's beginning and end --------------------------------------------------------------------------------------

def complete(args: Config, dataset: data.Dataset, device: torch.device) -> Config:
    """Return every flag as it is used with this data set. ValueError for a flag that does not fit it."""
    n_train, n_test, grey = len(dataset.x_train), len(dataset.x_test), dataset.x_test.shape[1] == 1
    decided: dict[str, Any] = {name: implied(name, vars(args)) for name in IMPLIED if getattr(args, name) is None}
    decided |= dict(
        device=str(device), train_size=n_train, adv_size=n_test if args.adv_size == "all" else args.adv_size,
        epsilons=sorted(args.epsilons or (flags.GREY_EPSILONS if grey else flags.COLOUR_EPSILONS)),
        lc_radius=args.lc_radius or (flags.GREY_RADIUS if grey else flags.COLOUR_RADIUS),
        n_steps=args.n_steps or args.n_epochs * (n_train // args.batch_size),
        n_epochs=None if args.n_steps else args.n_epochs)
    config = dataclasses.replace(args, **decided)
    check_fit(config, dataset)
    return config


def check_fit(config: Config, dataset: data.Dataset) -> None:
    """Raise ValueError, with one line, for a flag that does not fit the data set, another flag or the machine."""
    processes, features, batch = distributed.world_size(), dataset.x_test[0].numel(), config.batch_size
    if batch > config.train_size:
        raise ValueError(f"--batch_size={batch} is larger than the training set of {config.train_size} images")
    if batch % processes:
        raise ValueError(f"--batch_size={batch} is not divisible by the {processes} processes")
    if config.batch_norm and batch == 1:
        raise ValueError("--batch_norm needs batches of two images or more")
    if config.n_steps <= config.warmup_steps:
        raise ValueError(f"--warmup_steps={config.warmup_steps} is not less than the run's {config.n_steps} steps")
    if config.augment and min(dataset.x_test.shape[2:]) < 16:
        raise ValueError(f"--augment shifts images by pixels: those of {config.dataset} are too small for it")
    if config.lc_samples and config.lc_directions > features:
        raise ValueError(f"--lc_directions={config.lc_directions} is more than the {features} values of an image")
    if config.certify and (config.model != "mlp" or config.activation not in ("relu", "leaky_relu")):
        raise ValueError("--certify needs --model=mlp with --activation=relu or leaky_relu")
    attacked, points = measure.attacked(config, dataset), min(config.lc_samples, config.train_size, len(dataset.x_test))
    for flag, images in (("adv_size", attacked), ("certify", config.certify), ("lc_samples", points)):
        if 0 < images < processes:
            raise ValueError(f"--{flag}={images} is less than one for each of {processes} processes")


def resident(dataset: data.Dataset, device: torch.device) -> data.Dataset:
    """Return dataset with its tensors on device."""
    splits = ("x_train", "y_train", "x_test", "y_test")
    return dataclasses.replace(dataset, **{split: getattr(dataset, split).to(device) for split in splits})


def build_model(config: Config, dataset: data.Dataset) -> torch.nn.Module:
    """Return the network of a run as it is before the first step, on the data set's device."""
    torch.manual_seed(seed_for(config.seed, "weights"))
    model = models.from_config(dataclasses.asdict(config), dataset.x_test.shape[1:], dataset.num_classes, dataset.mean,
                               dataset.std).to(dataset.x_train.device)
    # On a CPU a convolution is faster so. But PyTorch (2.14) writes beyond its memory in the backward pass of a 1x1
    # convolution of stride 2 with fewer than 8 channels.
    if dataset.x_train.device.type == "cpu" and config.width >= 16:
        model = model.to(memory_format=torch.channels_last)
    return model


def empty_history(config: Config, args: Config, dataset: data.Dataset, model: torch.nn.Module, fingerprint: str,
                  layers: dict[str, int] | None = None) -> history.History:
    """Return the history of a run before its first log step. fingerprint: of the data. layers: of local complexity."""
    in_shape = tuple(dataset.x_test.shape[1:])
    layers = local_complexity.layer_units(model, in_shape) if layers is None else layers
    n = measure.attacked(config, dataset)
    return {
        "version": history.HISTORY_VERSION, "step": [], "config": dataclasses.asdict(config), "asked": asked(args),
        "derived": {"attacked": n, "data": fingerprint, "robust_version": attacks.ROBUST_VERSION},
        "environment": {**devices.describe(dataset.x_train.device), "processes": distributed.world_size()},
        "sizes": {"train": config.train_size, "test": len(dataset.x_test), "attacked": n,
                  "parameters": sum(p.numel() for p in model.parameters()),
                  "num_classes": dataset.num_classes, "in_shape": list(in_shape)},
        "layers": {"names": list(layers), "units": list(layers.values())}, "warnings": []}


def choose_threads(config: Config, model: torch.nn.Module, dataset: data.Dataset, earlier: dict | None) -> dict:
    """Return {"threads": in training, "eval_threads": in log steps}: as given, as before a resume, or as is fastest."""
    before = (earlier or {}).get("derived", {})
    if config.threads is None and "eval_threads" in before:
        return {name: before[name] for name in ("threads", "eval_threads")}
    if config.threads or distributed.world_size() > 1 or dataset.x_train.device.type != "cpu":
        return dict.fromkeys(("threads", "eval_threads"), config.threads or torch.get_num_threads())
    twin = copy.deepcopy(model)
    trainer, steps = Trainer(twin, dataclasses.replace(config, compile="off"), dataset), itertools.count()
    threads = devices.fastest_thread_count(lambda: trainer.advance(next(steps), 1))
    images = data.pixels(dataset.x_test[:1000], trainer.dtype)
    images = images[:config.eval_batch_size or measure.default_eval_batch_size(twin, images[:1])].requires_grad_()
    return {"threads": threads, "eval_threads": devices.fastest_thread_count(
        lambda: torch.autograd.grad(twin(images).sum(), images))}


def start(args: Config) -> tuple[Run, data.Dataset, measure.Probes]:
    """Return the run that the flags ask for, with its data on the device, ready for the first step.

    Raises ValueError, OSError, MemoryError or RuntimeError if it cannot be; an earlier run's files are moved aside, or
    continued from, only when all else is in order.
    """
    trackers.check(args.tracker or [])
    devices.set_precision(args.deterministic)
    device = distributed.start(devices.choose_device(args.device, args.dtype))
    dataset = distributed.rank0_first(lambda: data.from_config(dataclasses.asdict(args)))
    config = complete(args, dataset, device)
    fingerprint = data.fingerprint(dataset)
    dataset = resident(dataset, device)
    model = build_model(config, dataset)
    console = Console(quiet=config.quiet or distributed.rank() > 0)
    # Rank 0 alone holds them: a lock ends with its process.
    locks = distributed.run_where(distributed.rank() == 0, lambda: files.FolderLocks(
        config.log_dir, config.save_dir, note=console.note)) or files.FolderLocks()
    with ExitStack() as failed:
        failed.callback(locks.release)
        earlier = distributed.run_on_rank0(
            lambda: checkpoints.continue_from(config, fingerprint, console.note) if config.resume else None)
        parent = distributed.run_on_rank0(
            lambda: parent_of(config, fingerprint) if config.branch_from and not earlier else None)
        record = empty_history(config, args, dataset, model, fingerprint)
        if parent:
            changed = checkpoints.differences(parent["config"], config, {"loss", "label_smoothing"})
            steps = [*parent["history"].get("branch", {}).get("loss_changed", []), *[parent["step"]] * bool(changed)]
            record["branch"] = {"of": str(parent["path"]), "step": parent["step"], "epoch": parent["epoch"],
                                "schedule_from": parent["step"], "loss_changed": steps}
        elif earlier and "branch" in earlier["history"]:
            record["branch"] = earlier["history"]["branch"]
        record["derived"] |= choose_threads(config, model, dataset, earlier)
        if source := earlier or parent:  # the first rows are its own; an old one does not say
            record["derived"]["robust_version"] = source.get("derived", {}).get("robust_version", 1)
        # Branches of earlier versions lack schedule_from: theirs counts from the first step of all.
        trainer = Trainer(model, config, dataset, console.note, record.get("branch", {}).get("schedule_from", 0))
        probes = measure.draw_probes(config, dataset)
        run = Run(config, record, model, trainer, console, locks, earlier, parent)
        torch.set_num_threads(record["derived"]["threads"])
        failed.pop_all()
    return run, dataset, probes


def draw(run: Run) -> None:
    from analysis import figure  # it brings matplotlib, which takes a second

    figure.draw([run.history], run.history_file.path.with_suffix(""))


def finish(run: Run, stopped_by: int, figure: Figure | None) -> None:
    from analysis import report

    run.locks.check()
    run.history_file.flush(run.history)
    if stopped_by:
        run.console.note(f"stopped by {signal.Signals(stopped_by).name} at step {run.step}; continue with the same "
                         "command and --resume")
    else:
        run.console.note("\n" + report.summary(run.history))
    if figure and run.history["step"]:
        figure.redraw()
        if not figure.failed:
            run.console.note(f"\nfigure: {run.history_file.path.with_suffix('.png')} and .svg")
    run.trackers.end(run.history_file.path.with_suffix(".png"), run.step)


def main(argv: list[str] | None = None) -> int:
    """Run a command line of train.py; return the exit status."""
    signals.replace_unencodable()
    args = parse_args(argv)
    try:
        run, dataset, probes = start(args)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if devices.out_of_memory(error):
            return fail("not enough memory: lower --width, --train_size, --adv_size, --pgd_restarts or "
                        "--lc_samples", 2)
        if not isinstance(error, (ValueError, OSError)):
            raise
        full_disk = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return fail_together(error, 1 if full_disk else 2)
    except KeyboardInterrupt:
        return fail("interrupted before the first step", 128 + signal.SIGINT)
    plot = run.config.plot and distributed.rank() == 0
    figure = Figure(lambda: draw(run), run.console.note) if plot else None
    try:
        run.console.header(run.history)
        # A distributed run drops a measurement on all processes or on none.
        with signals.Stop(can_interrupt=distributed.world_size() == 1) as stop:
            stopped_by = train(run, dataset, probes, stop, figure)
            distributed.run_on_rank0(lambda: finish(run, stopped_by, figure))
    except RunFailed as error:
        return fail_together(error, 1)
    except OSError as error:
        return fail_together(
            f"{error}; the files written before are whole: run again with --resume once this is fixed", 1)
    except (MemoryError, RuntimeError) as error:
        if devices.out_of_memory(error):
            return fail("the memory is full: lower --eval_batch_size or --batch_size and run again with --resume", 1)
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason, _, _ = str(error).partition("\n\n")
            return fail(f"--compile: {reason}; install what is missing, or go on with --resume --compile=off", 1)
        if not distributed.lost_another(error):
            raise
        return fail("another process of this run has ended, so this one ends too: run again with --resume", 1)
    finally:
        run.locks.release()
    distributed.barrier()  # none leaves while another still listens to it
    return 128 + stopped_by if stopped_by else 0


if __name__ == "__main__":
    distributed.leave(main())
