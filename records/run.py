"""A run: how far it has come, and its way to the disk and back."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

import attacks
import models
from compute import distributed
from flags import MEASUREMENT, SCHEDULE, Config, flags_of
from measure import Row
from records import checkpoints, files, history
from records.console import Console, attempt
from records.history import History
from records.trackers import Trackers

SECONDS_BETWEEN_DRAWINGS, DRAWING_SHARE = 30, 0.01  # a figure is redrawn no more often, and in this share of the time


def fail(error: object, status: int, program: str = "train.py") -> int:
    """Print error in one line; return status."""
    print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def fail_together(error: object, status: int) -> int:
    """fail() for an error that every process of the run has met: rank 0 prints it."""
    if distributed.rank() == 0:
        fail(error, status)
    distributed.barrier()  # torchrun ends all processes when one has ended: not before the line is out
    return status


def history_of(checkpoint: Path, config: dict) -> Path | None:
    """Return the history of the run that a checkpoint with this config is of, None if it cannot be found."""
    log_dir, folder = Path(config.get("log_dir", "logs")), checkpoint.parent
    folders = [folder.parent / log_dir.name, log_dir, folder]
    if folder.name.startswith("earlier-"):  # both were moved aside
        folders = [folder.parent.parent / log_dir.name / folder.name, log_dir / folder.name, folder]
    return next(filter(Path.is_file, (place / history.HISTORY_NAME for place in folders)), None)


def own_history(path: Path, checkpoint: dict) -> History | None:
    """Return the history of the run that the checkpoint in path is of, None if it is not near it."""
    place = history_of(path, checkpoint["config"])
    record = history.read_history(place) if place else None
    # Two runs never take the same time.
    known = record and (checkpoint["step"], checkpoint["seconds"]) in zip(
        record["step"], record.get("seconds", []), strict=False)
    return record if known else None


def parent_of(config: Config, fingerprint: str) -> dict:
    """Return the checkpoint that --branch_from names, with its "path" and, as "history", its run's up to there. Raises
    ValueError or OSError, with one line, if it is of another network or other data, or has no history."""
    path = Path(config.branch_from or "")
    checkpoint = checkpoints.load_checkpoint(path)
    before = checkpoint["config"]
    found = history_of(path, before)
    if found is None:
        raise ValueError(f"--branch_from={path}: there is no {history.HISTORY_NAME} of its run near it or in "
                         f"{before.get('log_dir', 'logs')}")
    network = {"dataset", "model", "depth", "width", "activation", "batch_norm", "init_scale", "train_size"}
    differing = checkpoints.differences(before, config, network)
    if differing or not checkpoints.is_of_data(checkpoint, fingerprint):
        raise ValueError(f"--branch_from={path} is of another network or other data "
                         f"({', '.join(differing) or 'the images differ'}): give its flags")
    if config.n_steps <= checkpoint["step"] + config.warmup_steps:
        raise ValueError(f"--branch_from={path} is at step {checkpoint['step']}: raise --n_steps={config.n_steps} "
                         f"above {checkpoint['step'] + config.warmup_steps} (warm-up included)")
    record = history.read_history(found)
    checkpoints.check_history(found, record, path, checkpoint)
    attack = {name for name in flags_of(MEASUREMENT) - SCHEDULE if not name.startswith("lc_")}
    if checkpoints.differences(before, config, attack | {"seed"}):
        # The attacks were others, or on other images.
        record["outcomes"] = {name: kept for name, kept in record.get("outcomes", {}).items() if name == "test"}
    return {**checkpoint, "path": path, "history": record}


class Run:
    """A run on its way: its network, its history and its files.

    config: the complete flags. record: the history before the first log step. model, trainer: as before the first step.
    locks: on its folders, on rank 0. earlier: the checkpoint from which the run continues; parent: that of another run
    from which it starts; each with its "path" and "history". Raises ValueError or OSError, with one line for the user.
    """

    def __init__(self, config: Config, record: History, model: torch.nn.Module, trainer: Any, console: Console,
                 locks: files.FolderLocks, earlier: dict | None = None, parent: dict | None = None):
        self.config, self.history, self.model, self.trainer = config, record, model, trainer
        self.console, self.locks = console, locks
        self.history_file = history.HistoryFile(Path(config.log_dir) / history.HISTORY_NAME)
        self.step = self.saved_step = 0
        self.began = time.perf_counter()
        if earlier or parent:
            self.load(earlier or parent or {}, is_parent=earlier is None)
        trainer.finite_steps.fill_(self.step)
        distributed.run_on_rank0(lambda: self.begin_files(starts=earlier is None))
        self.trackers = Trackers(config.tracker or [] if distributed.rank() == 0 else [], Path(config.log_dir),
                                 record["config"], self.step, console.note)
        self.saved_at = time.perf_counter()

    def load(self, source: dict, is_parent: bool) -> None:
        """Take over weights, optimizer state, step and history from a checkpoint, its own or its parent's."""
        models.load_weights(self.model, source, source["path"])
        loaded = checkpoints.load_optimizer_state(self.trainer.optimizer, source)
        if not loaded and not is_parent:
            raise ValueError(f"{source['path']}: its state does not fit the optimizer of its config")
        if not loaded:
            self.console.note(f"the optimizer starts anew: the state in {source['path']} is of another kind")
        self.step = self.saved_step = source["step"]
        self.began -= source["seconds"]
        own = self.history.keys() - {"step", "warnings"}
        cast(dict, self.history).update({key: value for key, value in source["history"].items() if key not in own})
        if self.history["step"][-1:] != [self.step]:
            self.trainer.largest_loss.fill_(source.get("largest_loss", -math.inf))
        ruler = flags_of(MEASUREMENT) - SCHEDULE - {"epsilons"} | {"label_smoothing"}
        other = checkpoints.differences(source["config"], self.config, ruler)
        if other:  # only a branch may differ from what it starts from
            self.console.note(f"{'; '.join(other)}: measurements before and after step {self.step} are not comparable")
        if self.history["derived"]["robust_version"] < attacks.ROBUST_VERSION:
            self.console.note(f"robust_acc before step {self.step} is of an earlier version's attack and not "
                              "comparable with what follows: remeasure.py measures it anew")

    def begin_files(self, starts: bool) -> None:
        if starts:
            for folder in files.move_aside(self.config.log_dir, self.config.save_dir):
                self.console.note(f"an earlier run's files are now in {folder}")
        self.history_file.begin(self.history)

    @property
    def epoch(self) -> float:
        branch = self.history.get("branch", {})  # those of earlier versions lack the epoch
        since = branch["step"] if "epoch" in branch else 0
        passes = (self.step - since) / (self.config.train_size // self.config.batch_size)
        return round(branch["epoch"] + passes, 9) if since else passes

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    # ---- saving

    def state(self, **metrics: Any) -> dict:
        """Return what a checkpoint holds."""
        return {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, **metrics,
                "logged": len(self.history["step"]), "largest_loss": self.trainer.largest_loss.item(),
                **{key: self.history[key] for key in ("config", "asked", "derived", "sizes")},
                "model_state_dict": self.model.state_dict(),
                "optimizer_state_dict": self.trainer.optimizer.state_dict()}

    def record(self, row: Row, remarks: dict[str, str]) -> None:
        """Append a log step's row to the history; write the history, a checkpoint and the row of the table."""
        self.history["warnings"] += [{"step": self.step, "kind": kind, "text": text} for kind, text in remarks.items()]
        history.append(self.history, row)
        distributed.run_on_rank0(lambda: self.write_log_step(row, remarks))
        self.saved_at, self.saved_step = time.perf_counter(), self.step

    def write_log_step(self, row: Row, remarks: dict[str, str]) -> None:
        self.locks.check()
        self.history_file.log(self.history, row)
        metrics = {name: value for name, value in row.items() if name != "outcomes"}
        checkpoints.save_checkpoint(self.config.save_dir, self.state(**metrics), self.config.keep_checkpoints)
        self.console.row(row, [*remarks.values()])
        self.trackers.log(row)

    def save_rolling(self) -> None:
        """Write the state between two log steps, if it is not saved yet."""
        if self.step > self.saved_step:
            distributed.run_on_rank0(self.write_rolling)
            self.saved_step = self.step
        self.saved_at = time.perf_counter()

    def write_rolling(self) -> None:
        self.locks.check()
        self.history_file.flush(self.history)
        checkpoints.save_state(Path(self.config.save_dir) / files.ROLLING_NAME, self.state())

    def save_due(self) -> bool:
        """Whether this process made its last save --checkpoint_minutes ago."""
        return time.perf_counter() - self.saved_at > 60 * self.config.checkpoint_minutes


class Figure:
    """The figure of a run, redrawn by rank 0 now and then. If that fails it is one note, and the run goes on."""

    def __init__(self, draw: Callable[[], object], note: Callable[[str], None]):
        self.draw, self.note, self.failed = draw, note, False
        self.drawn_at, self.took = time.perf_counter(), 0.0

    def due(self) -> bool:
        """Whether to redraw; `took` is how long the last drawing took."""
        pause = max(SECONDS_BETWEEN_DRAWINGS, self.took / DRAWING_SHARE)
        return not self.failed and time.perf_counter() - self.drawn_at > pause

    def redraw(self) -> None:
        began = time.perf_counter()
        self.failed = not attempt(self.draw, "the figure cannot be drawn", self.note)
        self.drawn_at = time.perf_counter()
        self.took = self.drawn_at - began
