"""A run: how far it has come, and its way to the disk and back."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compute import distributed
from flags import MEASUREMENT, SCHEDULE, Config, flags_of
from records import checkpoints, files, history
from records.console import Console, attempt
from records.trackers import Trackers

SECONDS_BETWEEN_DRAWINGS, DRAWING_SHARE = 30, 0.01  # a figure is redrawn no more often, and in this share of the time


class RunFailed(Exception):
    """The run cannot go on; the message is the one line to print."""


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


def parent_of(config: Config, fingerprint: str) -> dict:
    """Return the checkpoint that --branch_from names, with its "path" and, as "history", its run's up to there. Raises
    ValueError or OSError, with one line, if it is of another network or other data, or has no history."""
    path = Path(config.branch_from)
    checkpoint = checkpoints.load_checkpoint(path)
    before = checkpoint["config"]
    found = history_of(path, before)
    if found is None:
        raise ValueError(f"--branch_from={path}: there is no {history.HISTORY_NAME} of its run near it or in "
                         f"{before.get('log_dir', 'logs')}")
    network = {"model", "depth", "width", "activation", "batch_norm", "train_size"}
    differing = checkpoints.differences(before, config, network)
    if differing or not checkpoints.is_of_data(checkpoint, fingerprint):
        raise ValueError(f"--branch_from={path} is of another network or other data "
                         f"({', '.join(differing) or 'the images differ'}): give its flags")
    if config.n_steps <= checkpoint["step"]:
        raise ValueError(f"--branch_from={path} is at step {checkpoint['step']}: raise --n_steps={config.n_steps}")
    record = history.read_history(found)
    checkpoints.check_history(found, record, path, checkpoint)
    attack = {name for name in flags_of(MEASUREMENT) - SCHEDULE if not name.startswith("lc_")}
    if checkpoints.differences(before, config, attack | {"seed"}):
        # The attacks were others, or on other images.
        record["outcomes"] = {name: kept for name, kept in record.get("outcomes", {}).items() if name == "test"}
    return {**checkpoint, "path": path, "history": record}


class Run:
    """What a run has recorded, and where it keeps it.

    config: the complete flags. record: the history of a run before its first log step. fingerprint: of the data.

    Making one locks the run's folders and looks for a checkpoint to continue from (self.earlier, None if the run
    starts); begin() then touches the files. Raises ValueError or OSError, with one line for the user.
    """

    model: torch.nn.Module
    trainer: Any  # train.Trainer
    trackers: Trackers

    def __init__(self, config: Config, record: dict, fingerprint: str, device: torch.device):
        self.config, self.history, self.device = config, record, device
        self.console = Console(record, quiet=config.quiet or distributed.rank() > 0)
        distributed.run_on_rank0(self.lock_folders)
        self.history_file = history.HistoryFile(Path(config.log_dir) / history.HISTORY_NAME)
        self.earlier = distributed.run_on_rank0(
            lambda: checkpoints.continue_from(config, fingerprint, self.console.note) if config.resume else None)
        self.step, self.began = 0, time.perf_counter()
        self.saved_step, self.saved_at = 0, self.began
        self.last_enqueued: torch.cuda.Event | None = None

    @property
    def epoch(self) -> float:
        return self.step / (self.config.train_size // self.config.batch_size)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def lock_folders(self) -> None:
        # Kept by rank 0 alone: a lock ends with what holds it.
        self.held = files.FolderLocks(self.config.log_dir, self.config.save_dir, note=self.console.note)

    def release(self) -> None:
        """Give up the folders, so that another run in this process may use them."""
        if distributed.rank() == 0:
            self.held.release()

    def begin(self, model: torch.nn.Module, trainer: Any, parent: dict | None = None) -> None:
        """Load the checkpoint to continue from, or that of the run to branch from; then prepare the files. parent: the
        checkpoint (with its "history" and "path") of which this run is a branch."""
        self.model, self.trainer = model, trainer
        source = self.earlier or parent
        if source:
            checkpoints.load_weights(model, source, source["path"])
            if not checkpoints.load_moments(trainer.optimizer, source):
                if self.earlier:
                    raise ValueError(f"{source['path']}: its state does not fit the optimizer of its config")
                self.console.note(f"the optimizer starts anew: the state in {source['path']} is not one of its kind")
            self.step = self.saved_step = source["step"]
            ruler = flags_of(MEASUREMENT) - SCHEDULE - {"epsilons"} | {"label_smoothing"}
            other = checkpoints.differences(source["config"], self.config, ruler)
            if other:  # only a branch may differ from what it starts from
                self.console.note(f"{'; '.join(other)}: what is measured up to step {self.step} and after it is not "
                                  "the same")
            self.began -= source["seconds"]
            own = self.history.keys() - {"step", "warnings"}
            self.history.update({key: value for key, value in source["history"].items() if key not in own})
            if self.history["step"][-1:] != [self.step]:
                trainer.largest_loss.fill_(source.get("largest_loss", -math.inf))
        trainer.finite_steps.fill_(self.step)
        distributed.run_on_rank0(self.begin_files)
        self.saved_at = time.perf_counter()

    def begin_files(self) -> None:
        if not self.earlier:
            for folder in files.move_aside(self.config.log_dir, self.config.save_dir):
                self.console.note(f"an earlier run's files are now in {folder}")
        self.history_file.begin(self.history)
        self.trackers = Trackers(self.config.tracker or [], Path(self.config.log_dir), self.history["config"],
                                 self.step, self.console.note)

    # ---- saving

    def state(self, **metrics: Any) -> dict:
        """Return what a checkpoint holds."""
        return {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, **metrics,
                "logged": len(self.history["step"]), "largest_loss": self.trainer.largest_loss.item(),
                **{key: self.history[key] for key in ("config", "asked", "derived", "sizes")},
                "model_state_dict": self.model.state_dict(),
                "optimizer_state_dict": self.trainer.optimizer.state_dict()}

    def record(self, row: dict, remarks: dict[str, str]) -> None:
        """Append a log step's row to the history; write the history, a checkpoint and the row of the table."""
        self.history["warnings"] += [{"step": self.step, "kind": kind, "text": text} for kind, text in remarks.items()]
        history.append(self.history, row)
        distributed.run_on_rank0(lambda: self.write_log_step(row, remarks))
        self.saved_at, self.saved_step = time.perf_counter(), self.step

    def write_log_step(self, row: dict, remarks: dict[str, str]) -> None:
        self.held.check()
        self.history_file.log(self.history, row)
        metrics = {name: value for name, value in row.items() if name != "outcomes"}
        checkpoints.save_checkpoint(self.config.save_dir, self.state(**metrics), self.config.keep_checkpoints)
        self.console.row(row, [*remarks.values()])
        self.trackers.log(row)

    def save_rolling(self) -> None:
        """Write the state between two log steps, if it is not saved yet."""
        self.check_finite()
        if self.step > self.saved_step:
            distributed.run_on_rank0(self.write_rolling)
            self.saved_step = self.step
        self.saved_at = time.perf_counter()

    def write_rolling(self) -> None:
        self.held.check()
        self.history_file.flush(self.history)
        checkpoints.save_state(Path(self.config.save_dir) / files.ROLLING_NAME, self.state())

    def save_due(self) -> bool:
        """Whether this process made its last save --checkpoint_minutes ago."""
        return time.perf_counter() - self.saved_at > 60 * self.config.checkpoint_minutes

    # ---- on the way

    def stay_close(self) -> None:
        """Let the host run ahead of the GPU by one stretch of steps: the GPU never idles, a signal is obeyed soon."""
        enqueued = torch.cuda.Event()
        enqueued.record()
        if self.last_enqueued is not None:
            self.last_enqueued.synchronize()
        self.last_enqueued = enqueued

    def check_finite(self) -> None:
        """Raise RunFailed if a step's loss was not finite, unless --on_nan=continue."""
        bad = self.step - int(self.trainer.finite_steps.item())
        if bad:
            step = self.step - bad + 1
            # The loss of step n is that of the weights after n - 1 steps: they are already bad.
            self.refuse_nan(f"the loss of step {step}", before=step - 1)

    def refuse_nan(self, what: str, before: int) -> None:
        """Raise RunFailed, naming the last checkpoint with fewer than `before` steps, unless --on_nan=continue."""
        if self.config.on_nan == "continue":
            return
        _, path = checkpoints.newest_checkpoint(self.config.save_dir, self.console.note, before=before)
        good = f"the last good checkpoint is {path}" if path else "there is no good checkpoint"
        raise RunFailed(f"{what} is not finite (learning rate {self.config.lr:g}); {good}; lower --lr, or go on with "
                        "--resume --on_nan=continue")


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
