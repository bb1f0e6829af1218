"""Trackers that users already have: each log step as scalars in TensorBoard or Weights & Biases.

A tracker that fails is one note, and the run goes on without it. Another tracker is one more entry in TRACKERS.
"""

import functools
import importlib.util
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Row
from records.console import attempt
from records.history import flat

GROUPS = {"train_acc": "accuracy/train", "test_acc": "accuracy/test", "train_loss": "loss/train",
          "test_loss": "loss/test", "max_batch_loss": "loss/max_batch", "saturated": "saturation/attacked_images",
          "train_saturated": "saturation/training_images", "zero_gradient": "saturation/zero_gradient"}


def scalars(row: Row) -> dict[str, float]:
    """Return {name: value} of a log step's numbers, some of them in groups."""
    return {GROUPS.get(name, name): float(value) for name, value in flat(row).items()
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)}


class TensorBoard:
    """Event files in LOG_DIR/tensorboard."""

    def __init__(self, log_dir: Path, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote beyond its last checkpoint is purged.
        self.writer = SummaryWriter(str(log_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def end(self, figure: Path, step: int) -> None:
        if figure.is_file():
            from matplotlib import pyplot

            self.writer.add_image("figure", pyplot.imread(figure)[..., :3], step, dataformats="HWC")
        self.writer.close()


class WandB:
    """A run of Weights & Biases; its id is kept in LOG_DIR/wandb_id, so that a resumed run continues it."""

    def __init__(self, log_dir: Path, config: dict, step: int):
        import wandb

        self.wandb, id_file = wandb, log_dir / "wandb_id"
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:8])
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "grok"), dir=str(log_dir), resume="allow",
                              id=id_file.read_text().strip(), config=config)

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def end(self, figure: Path, step: int) -> None:
        if figure.is_file():
            self.run.log({"figure": self.wandb.Image(str(figure))}, step=step)
        self.run.finish()


TRACKERS: dict[str, Callable] = {"tensorboard": TensorBoard, "wandb": WandB}


def check(names: list[str]) -> None:
    """Raise ValueError, with the command that installs it, for a tracker whose package is not there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--tracker={name} needs the package {name}: pip install {name}")


class Trackers:
    """The trackers of a run. step: where the run starts or continues. note: called with one line if one fails."""

    def __init__(self, names: list[str], log_dir: Path, config: dict, step: int, note: Callable[[str], None]):
        self.note = note
        self.active: dict[str, Any] = dict.fromkeys(names)
        self.each(lambda name: self.active.update({name: TRACKERS[name](log_dir, config, step)}))

    def each(self, work: Callable[[str], None]) -> None:
        for name in [*self.active]:
            if not attempt(functools.partial(work, name), f"{name} failed", self.note):
                del self.active[name]

    def log(self, row: Row) -> None:
        """Send a log step's row to each tracker."""
        self.each(lambda name: self.active[name].log(scalars(row), row["step"]))

    def end(self, figure: Path, step: int) -> None:
        """Send the figure and close each tracker."""
        self.each(lambda name: self.active[name].end(figure, step))
