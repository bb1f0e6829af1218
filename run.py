"""A run: what it is made of, how far it has come, and its way onto the disk and back."""

import dataclasses
import math
import time
from pathlib import Path

import torch

import data
import local_complexity
import measure
import models
import training
import tuning
from runtime import checkpoints, distributed, files, signals
from runtime import device as devices
from runtime.console import Console
from runtime.history import HISTORY_VERSION, append, write_history
from runtime.seeds import seed_for


class RunFailed(Exception):
    """The run cannot go on; the message is the one line to print."""


def resident(dataset, device):
    """Return dataset with its tensors on device."""
    splits = ("x_train", "y_train", "x_test", "y_test")
    return dataclasses.replace(dataset, **{split: getattr(dataset, split).to(device) for split in splits})


def build_model(config, dataset):
    """Return the network of a run as it is before the first step, where the data set lies."""
    torch.manual_seed(seed_for(config.seed, "weights"))
    model = models.from_config(vars(config), dataset.x_test.shape[1:], dataset.num_classes, dataset.mean, dataset.std)
    model = model.to(dataset.x_train.device)
    # On a CPU a convolution is faster so; a linear layer does not know of it. But PyTorch (2.14) writes beyond its
    # memory in the backward pass of a 1x1 convolution of stride 2 and fewer than 8 channels.
    if dataset.x_train.device.type == "cpu" and config.width >= 16:
        model = model.to(memory_format=torch.channels_last)
    return model


def empty_history(config, asked, dataset, model, fingerprint):
    """Return the history of a run before its first log step. asked: the names of the flags that the user gave."""
    in_shape = tuple(dataset.x_test.shape[1:])
    layers = local_complexity.layer_units(model, in_shape)
    attacked = measure.attacked(config, dataset)
    return {
        "version": HISTORY_VERSION, "step": [], "config": dict(vars(config)), "asked": asked,
        "derived": {"attacked": attacked, "data": fingerprint},
        "environment": {**devices.describe(dataset.x_train.device), "processes": distributed.size()},
        "sizes": {"train": config.train_size, "test": len(dataset.x_test), "attacked": attacked,
                  "parameters": sum(p.numel() for p in model.parameters()),
                  "num_classes": dataset.num_classes, "in_shape": list(in_shape)},
        "layers": {"names": list(layers), "units": list(layers.values())}, "warnings": []}


class Run:
    """What a run is made of, and how far it has come.

    config: the flags as used. asked: the names of the flags that the user gave. defaults: what a flag counts as that
    an earlier run did not have yet. dataset: on the CPU. device: where the run computes.

    Raises ValueError or OSError, with a line for the user, if the run cannot be; the files of an earlier run are moved
    aside, or continued from, only when all else is in order.
    """

    def __init__(self, config, asked, defaults, dataset, device):
        self.config, self.device = config, device
        self.history_path = Path(config.log_dir) / files.HISTORY_NAME
        fingerprint = data.fingerprint(dataset)
        self.dataset = resident(dataset, device)
        self.model = build_model(config, self.dataset)
        self.history = empty_history(config, asked, self.dataset, self.model, fingerprint)
        self.console = Console(self.history, quiet=config.quiet or distributed.rank() > 0)

        distributed.run_on_rank0(self.lock_folders)
        before = distributed.run_on_rank0(lambda: self.find_earlier(defaults, fingerprint))
        self.tuned, network = tuning.tune(config, self.model, self.dataset, self.kept(before), self.console.note)
        self.history["derived"].update(self.tuned)
        self.trainer = training.Trainer(self.model, config, self.dataset, self.console.note, network)
        self.probes = measure.draw_probes(config, self.dataset)
        self.step, seconds = 0, 0.0
        if before:
            seconds = self.restore(before)
        self.trainer.finite_steps.fill_(self.step)
        distributed.run_on_rank0(lambda: self.begin_files(continued=bool(before)))
        torch.set_num_threads(self.tuned["threads"])
        self.began = time.perf_counter() - seconds
        self.saved_at = self.drawn_at = time.perf_counter()
        self.saved_step, self.drawing_took = self.step, 0.0
        self.steps_at_once, self.last_enqueued = 1, None
        # The processes of a distributed run have to drop a measurement together or not at all.
        self.stop = signals.Stop(can_interrupt=distributed.size() == 1)

    @property
    def epoch(self):
        return self.step / (self.config.train_size // self.config.batch_size)

    @property
    def seconds(self):
        return time.perf_counter() - self.began

    # ---- from the disk

    def lock_folders(self):
        # Kept, and returned to nobody: the lock ends with what runlog gives, and that with this process.
        self.lock = files.lock_folders(self.config.log_dir, self.config.save_dir, note=self.console.note)

    def find_earlier(self, defaults, fingerprint):
        """Return the checkpoint to continue from, with its history, or None to start."""
        config = self.config
        if not config.resume:
            return None
        return checkpoints.continue_from(config.log_dir, config.save_dir, vars(config), defaults, fingerprint,
                                    self.console.note, finite=config.on_nan == "stop")

    def kept(self, before):
        """Return what was measured when the run began: on the same kind of machine it rounds the same way."""
        if before is None:
            return {}
        same = (before["config"].get("device") == self.config.device
                and before["history"]["environment"].get("processes") == distributed.size())
        kept = before.get("derived", before["config"])  # an older run kept its threads among the flags
        return {"compiled": False, **kept} if same else {}

    def restore(self, before):
        """Continue from a checkpoint; return the seconds that the run had taken until then."""
        checkpoints.load_state(self.model, self.trainer.optimizer, before)
        self.step, history = before["step"], before["history"]
        if self.step not in history["step"]:
            self.trainer.largest_loss.fill_(before.get("largest_loss", -math.inf))
        self.history.update({key: value for key, value in history.items()
                             if key not in ("config", "asked", "derived", "environment")})
        return before["seconds"]

    # ---- to the disk

    def begin_files(self, continued):
        if not continued:
            weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
            files.check_room(self.config.save_dir, 3 * weights)  # a checkpoint: weights and two moments
            for folder in files.move_aside(self.config.log_dir, self.config.save_dir):
                self.console.note(f"an earlier run's files are now in {folder}")
        write_history(self.history_path, self.history)

    def state(self, **metrics):
        """Return what a checkpoint holds."""
        return {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, **metrics,
                "logged": len(self.history["step"]), "largest_loss": self.trainer.largest_loss.item(),
                **{key: self.history[key] for key in ("config", "asked", "derived", "sizes")},
                "model_state_dict": self.model.state_dict(),
                "optimizer_state_dict": self.trainer.optimizer.state_dict()}

    def record(self, row, remarks):
        """Append row to the history; write the history, a checkpoint and the row of the table."""
        self.history["warnings"] += [{"step": self.step, "kind": kind, "text": text} for kind, text in remarks.items()]
        append(self.history, row)
        distributed.run_on_rank0(lambda: self.write_log_step(row, remarks.values()))
        self.saved_at, self.saved_step = time.perf_counter(), self.step

    def write_log_step(self, row, remarks):
        write_history(self.history_path, self.history)
        metrics = {name: value for name, value in row.items() if name != "outcomes"}
        checkpoints.save_checkpoint(self.config.save_dir, self.state(**metrics), self.config.keep_checkpoints)
        self.console.row(row, remarks)
        # At most a hundredth of the run's time goes into redrawing the figure.
        if self.config.plot and time.perf_counter() - self.drawn_at > max(30, 100 * self.drawing_took):
            self.draw()

    def save_rolling(self):
        """Write the state between two log steps, if it is not saved yet."""
        self.check_finite()
        if self.step > self.saved_step:  # else nothing came of the time since, and the file's date is to show it
            distributed.run_on_rank0(lambda: checkpoints.save_rolling(self.config.save_dir, self.state()))
            self.saved_step = self.step
        self.saved_at = time.perf_counter()

    def draw(self):
        from analysis import (
            figure,  # it brings matplotlib, which a run without figures, and a short one until its end, can do without
        )

        began = time.perf_counter()
        figure.draw([self.history], self.history_path.with_suffix(""))
        self.drawn_at = time.perf_counter()
        self.drawing_took = self.drawn_at - began

    # ---- on the way

    def stay_close(self):
        """Let the host run ahead of the GPU by one stretch of steps: the GPU never idles, a signal is soon obeyed."""
        enqueued = torch.cuda.Event()
        enqueued.record()
        if self.last_enqueued is not None:
            self.last_enqueued.synchronize()
        self.last_enqueued = enqueued

    def check_finite(self):
        """Raise RunFailed if a step's loss was not finite, unless --on_nan=continue."""
        bad = distributed.all_reduce_max(self.step - self.trainer.finite_steps.item(), self.device)
        if bad:
            step = self.step - bad + 1
            # The loss of step n is that of the weights after n - 1 steps: they are already bad.
            self.refuse_nan(f"the loss of step {step}", before=step - 1)

    def refuse_nan(self, what, before):
        """Raise RunFailed, naming the last checkpoint with fewer than `before` steps, unless --on_nan=continue."""
        config = self.config
        if config.on_nan == "continue":
            return
        _, path = checkpoints.newest_checkpoint(config.save_dir, self.console.note, before=before)
        good = f"the last good checkpoint is {path}" if path else "there is no good checkpoint"
        raise RunFailed(f"{what} is not finite (learning rate {config.lr:g}); {good}; lower --lr, or go on with "
                        "--resume --on_nan=continue")
