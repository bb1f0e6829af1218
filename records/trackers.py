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
        from torch.utils.tensorboard.summary import hparams

        # What an interrupted run wrote beyond its last checkpoint is purged.
        self.writer = SummaryWriter(str(log_dir / "tensorboard"), purge_step=step + 1 if step else None)
        # As text, since the table would show False as 0.0000.
        flat = {name: value if type(value) in (int, float) else str(value) for name, value in config.items()}
        metrics = dict.fromkeys(("accuracy/train", "accuracy/test", "weight_norm"), 0.0)  # columns of the HPARAMS table
        for summary in hparams(flat, metrics):
            self.writer._get_file_writer().add_summary(summary)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def end(self, figure: Path, step: int) -> None:
        if figure.is_file():
            import numpy as np
            from PIL import Image

            self.writer.add_image("figure", np.asarray(Image.open(figure).convert("RGB")), step, dataformats="HWC")
        self.writer.close()


class WandB:
    """A run of Weights & Biases; its id is kept in LOG_DIR/wandb_id, so that a resumed run continues it."""

    def __init__(self, log_dir: Path, config: dict, step: int):
        import wandb

        id_file = log_dir / "wandb_id"
        if step == 0 or not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:8])
        self.wandb = wandb
        folder = log_dir.parent if log_dir.name == "logs" else log_dir  # a sweep keeps a run in FOLDER/logs
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "grok"), dir=str(log_dir), resume="allow",
                              id=id_file.read_text().strip(), name=os.environ.get("WANDB_NAME", folder.name) or None,
                              config=config, settings=wandb.Settings(console="off", silent=True))

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
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of this name, in which the tracker keeps its files
            raise ValueError(f"--tracker={name} needs the package {name}: pip install {name}")


class Trackers:
    """The trackers of a run. step: where the run starts or continues. note: called with one line if one fails."""

    def __init__(self, names: list[str], log_dir: Path, config: dict, step: int, note: Callable[[str], None]):
        self.note = note
        self.active: dict[str, Any] = {}
        for name in names:
            def begin(name: str = name) -> None:
                self.active[name] = TRACKERS[name](log_dir, config, step)

            attempt(begin, f"{name} failed", note)

    def each(self, work: Callable[[Any], None]) -> None:
        self.active = {name: tracker for name, tracker in self.active.items()
                       if attempt(functools.partial(work, tracker), f"{name} failed", self.note)}

    def log(self, row: Row) -> None:
        """Send a log step's row to each tracker."""
        values = scalars(row)
        self.each(lambda tracker: tracker.log(values, row["step"]))

    def end(self, figure: Path, step: int) -> None:
        """Send the figure and close each tracker."""
        self.each(lambda tracker: tracker.end(figure, step))
