"""Checkpoints: written whole, read without trust, and what a resumed run needs of them."""

import io
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from flags import EXPERIMENT, FIELDS, MEASUREMENT, Config, flags_of, implied
from records.files import CHECKPOINT_PATTERN, ROLLING_NAME, write_atomically
from records.history import HISTORY_NAME, History, forget_after, read_history

PARTS = {"config", "sizes", "model_state_dict", "optimizer_state_dict", "epoch", "step", "logged", "seconds"}


def save_checkpoint(folder: str | Path, state: dict, keep: str | int = "all") -> Path:
    """Write the checkpoint of a log step; return its path. keep: "all", "last", or N: this one and the N - 1 newest
    others stay."""
    folder = Path(folder)
    name = f"checkpoint_epoch_{math.floor(state['epoch']):07d}_step_{state['step']:09d}.pt"
    path = save_state(folder / name, state)
    (folder / ROLLING_NAME).unlink(missing_ok=True)  # it is older
    if keep != "all":
        others = [other for other in saved_checkpoints(folder) if other != path]
        for old in others[0 if keep == "last" else int(keep) - 1:]:
            old.unlink(missing_ok=True)
    return path


def save_state(path: Path, state: dict) -> Path:
    """Write a checkpoint to path; return path."""
    buffer = io.BytesIO()  # so that a full disk is an OSError and not an error of the zip writer
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())
    return path


def load_checkpoint(path: str | Path) -> dict:
    """Return the checkpoint in `path`, on the CPU. ValueError, in one line, if it cannot be read, is damaged or
    foreign, or holds more than data."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception:  # zipfile, zlib and pickle raise errors of their own for what is damaged or more than data
        state = None
    if not isinstance(state, dict) or not state.keys() >= PARTS:
        raise ValueError(f"{path} is damaged or not a checkpoint of this program")
    return state


def newest_checkpoint(folder: str | Path, note: Callable[[str], None], before: float = math.inf, finite: bool = True
                      ) -> tuple[dict, Path] | tuple[None, None]:
    """Return (state, path) of the sound checkpoint with the most steps, fewer than `before`, or (None, None). finite:
    pass over weights that are not finite. note is called with one line for each newer file passed over."""
    for path in all_checkpoints(folder):
        if (step_in_name(path) or 0) >= before:
            continue
        try:
            state = load_checkpoint(path)
            if finite and not all(weights.isfinite().all() for weights in state["model_state_dict"].values()):
                raise ValueError(f"{path}: its weights are not finite")
        except ValueError as error:
            note(f"{error}; passed over")
            continue
        if state["step"] < before:
            return state, path
    return None, None


def all_checkpoints(folder: str | Path) -> list[Path]:
    """Return the rolling checkpoint, if there is one, and those of the log steps, the newest first."""
    rolling = Path(folder) / ROLLING_NAME
    return [*([rolling] if rolling.exists() else []), *saved_checkpoints(folder)]


def saved_checkpoints(folder: str | Path) -> list[Path]:
    """Return the paths of the log steps' checkpoints, the newest first."""
    steps = {path: step_in_name(path) for path in Path(folder).glob(CHECKPOINT_PATTERN)}
    return sorted((path for path in steps if steps[path] is not None), key=lambda path: steps[path] or 0, reverse=True)


def step_in_name(path: Path) -> int | None:
    """Return the step in a checkpoint's name, None if this program does not give such names."""
    digits = path.stem.rpartition("_step_")[2]
    return int(digits) if digits.isdecimal() else None


def continue_from(config: Config, fingerprint: str, note: Callable[[str], None]) -> dict | None:
    """Return the newest sound checkpoint, with its "path" and "history" up to there, or None if --save_dir holds none.

    config: the complete flags. fingerprint: of this run's data. note is called with one line for each thing that the
    user should know. ValueError, or FileNotFoundError without a history, in one line, if the files are damaged, are of
    another experiment or other data, or do not go together, or if there are checkpoints and none can be used.
    """
    checkpoint, path = newest_checkpoint(config.save_dir, note, finite=config.on_nan == "stop")
    if checkpoint is None or path is None:
        if all_checkpoints(config.save_dir):
            raise ValueError(f"none of the checkpoints in {config.save_dir} can be used: repair or remove them, or "
                             "start anew without --resume")
        note(f"nothing to resume in {config.save_dir}: starting")
        return None
    history_path = Path(config.log_dir) / HISTORY_NAME
    history = read_history(history_path)
    check_experiment(path, checkpoint, config, fingerprint)
    check_experiment(history_path, history, config, fingerprint)
    planned = max(checkpoint["step"], checkpoint["config"].get("n_steps") or 0)
    if config.n_steps < planned:
        raise ValueError(f"--n_steps={config.n_steps} is less than the {planned} of {path}: a resumed run may only "
                         "become longer")
    if config.n_steps > planned and config.lr_schedule != "constant":
        raise ValueError(f"--lr_schedule={config.lr_schedule} spans the run: a resumed one keeps its --n_steps")
    check_history(history_path, history, path, checkpoint)
    note(f"continuing from {path} at step {checkpoint['step']}")
    return {**checkpoint, "history": history, "path": path}


def differences(before: dict, config: Config, names: Iterable[str]) -> list[str]:
    """Return one line for each of these flags that differs; a flag that `before` lacks had its default, and one that it
    does not decide, as earlier versions left it, what that stood for."""
    found = []
    for name in sorted(names):
        was, now = before.get(name, FIELDS[name].default), getattr(config, name)
        if now != was and (was is not None or now != implied(name, before)):
            found.append(f"--{name} was {was}, is {now}")
    return found


def is_of_data(source: Mapping[str, Any], fingerprint: str) -> bool:
    """Return whether a checkpoint or history is of the data with this fingerprint; an old one does not say."""
    return source.get("derived", {}).get("data", fingerprint) == fingerprint


def check_experiment(path: Path, source: Mapping[str, Any], config: Config, fingerprint: str) -> None:
    """Raise ValueError if source, the checkpoint or history in `path`, is not of this experiment and these data."""
    own = "give this run its own --log_dir and --save_dir"
    found = differences(source["config"], config, flags_of(EXPERIMENT, MEASUREMENT))
    if found:
        raise ValueError(f"{path} belongs to another experiment: {'; '.join(found)}; {own}")
    if not is_of_data(source, fingerprint):
        raise ValueError(f"{path} belongs to other data: the images or labels have changed (fingerprint "
                         f"{source['derived']['data']}, now {fingerprint}); restore them, or {own}")


def check_history(history_path: Path, history: History, path: Path, checkpoint: dict) -> None:
    """Cut history to the log points that the checkpoint knows; ValueError if the two are not of one run."""
    if len(history["step"]) < checkpoint["logged"]:
        raise ValueError(f"{history_path} is older than {path}: its log points are missing")
    forget_after(history, checkpoint["logged"])
    last = (history["step"][-1], history["seconds"][-1]) if history["step"] else (0, 0)
    its_own = checkpoint["step"], checkpoint["seconds"]
    # A log step's checkpoint repeats its row, and two runs never take the same time; a rolling one comes later.
    if last > its_own or (last != its_own and "train_loss" in checkpoint):
        raise ValueError(f"{history_path} and {path} are not of one run: log point {checkpoint['logged']} is at step "
                         f"{last[0]} after {last[1]} s, the checkpoint at step {its_own[0]} after {its_own[1]} s")


def load_optimizer_state(optimizer: torch.optim.Optimizer, checkpoint: dict) -> bool:
    """Load the optimizer's state from a checkpoint; return False, and change nothing, if it is of another optimizer,
    which PyTorch would only notice in the next step. The settings of the parameter group stay this run's: a GPU's
    optimizer needs others than a CPU's.
    """
    (group,) = optimizer.param_groups
    parameters, state = group["params"], checkpoint["optimizer_state_dict"]["state"]
    tensors = {"exp_avg", "exp_avg_sq"} if "betas" in group else {"momentum_buffer"} if group["momentum"] else set()
    wanted = [{name: (parameter.shape, parameter.dtype) for name in tensors} for parameter in parameters]
    found = [{name: (value.shape, value.dtype) for name, value in entries.items()
              if name != "step" and value is not None} for entries in state.values()]
    # There is no state before the first step, nor of SGD without momentum.
    if found != wanted and (state or (tensors and checkpoint["step"] > 0)):
        return False
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {
        k: {name: laid_out(value, parameters[k]) for name, value in entries.items()} for k, entries in state.items()}})
    return True


def laid_out(value: Any, parameter: torch.Tensor) -> Any:
    """Return value in the memory layout of its parameter: the fused optimizers assume that they are the same."""
    if value is None or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter).copy_(value)
