"""Checkpoints: written whole, read without trust, and what a resumed run needs of them."""

import contextlib
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from flags import EXPERIMENT, FIELDS, MEASUREMENT, Config, flags_of, implied
from records.files import CHECKPOINT_PATTERN, ROLLING_NAME, write_atomically
from records.history import HISTORY_NAME, forget_after, read_history

# Flags that do not change what is computed, but how, and with it the last bits of the results.
CHANGES_LAST_BITS = ("device", "threads", "compile", "eval_batch_size")
PARTS = {"config", "sizes", "model_state_dict", "optimizer_state_dict", "epoch", "step", "logged", "seconds"}


def save_checkpoint(folder: str | Path, state: dict, keep: str | int = "all") -> Path:
    """Write the checkpoint of a log step; return its path. keep: "all", "last", or N: this one and the N - 1 newest
    undamaged others stay."""
    folder = Path(folder)
    name = f"checkpoint_epoch_{math.floor(state['epoch']):07d}_step_{state['step']:09d}.pt"
    path = save_state(folder / name, state)
    (folder / ROLLING_NAME).unlink(missing_ok=True)  # it is older
    if keep == "all":
        return path
    left = 0 if keep == "last" else int(keep) - 1
    for old in saved_checkpoints(folder):
        if old != path and left > 0:
            with contextlib.suppress(OSError):  # what cannot be read today may be sound tomorrow: it stays
                left -= is_intact(old)
        elif old != path:
            old.unlink(missing_ok=True)
    return path


def save_state(path: Path, state: dict) -> Path:
    """Write a checkpoint to path; return path."""
    buffer = io.BytesIO()  # so that a full disk is an OSError and not an error of the zip writer
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())
    return path


def is_intact(path: Path) -> bool:
    """Return whether the checksums of a checkpoint's file are right; torch.load does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except OSError:
        raise
    except Exception:  # zipfile, zlib and struct raise errors of their own for a damaged file
        return False


def load_checkpoint(path: str | Path) -> dict:
    """Return the checkpoint in `path`, on the CPU. ValueError, in one line, if it cannot be read, is damaged or
    foreign, or holds more than data."""
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if is_intact(path) else None
    except MemoryError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it is not a checkpoint, or its pickle holds more than data") from None
    except Exception:
        state = None
    if state is None:
        raise ValueError(f"{path} is damaged or not a checkpoint")
    if not isinstance(state, dict) or not state.keys() >= PARTS:
        raise ValueError(f"{path} is not a checkpoint of this program")
    return state


def newest_checkpoint(folder: str | Path, note: Callable[[str], None], before: float = math.inf, finite: bool = True
                      ) -> tuple[dict, Path] | tuple[None, None]:
    """Return (state, path) of the sound checkpoint with the most steps, fewer than `before`, or (None, None). finite:
    pass over weights that are not finite. note is called with one line for each newer file passed over."""
    newest: tuple[dict, Path] | tuple[None, None] = None, None
    for path in all_checkpoints(folder):
        step = step_in_name(path)  # None: the rolling file, which is looked into first
        if step is not None and (step >= before or newest[0] and newest[0]["step"] >= step):
            continue
        try:
            state = load_checkpoint(path)
            if finite and not all(weights.isfinite().all() for weights in state["model_state_dict"].values()):
                raise ValueError(f"{path}: its weights are not finite")
        except ValueError as error:
            note(f"{error}; passed over")
            continue
        if state["step"] < before:
            newest = state, path
            if step is not None:
                break
    return newest


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
        names = [path.name for path in all_checkpoints(config.save_dir)]
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise ValueError(f"none of the checkpoints in {config.save_dir} can be used ({listed}): repair or "
                             "remove them, or start anew without --resume")
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
    if config.n_steps > planned:
        note(f"--n_steps was {planned}, is {config.n_steps}: later log points are those of the longer run")
    used = {**checkpoint["config"], "threads": checkpoint.get("derived", {}).get("threads")}
    found = differences(used, config, [name for name in CHANGES_LAST_BITS if name != "threads" or config.threads])
    if found:
        note(f"{'; '.join(found)}: the last bits of the results may differ from those of an uninterrupted run")
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


def is_of_data(source: dict, fingerprint: str) -> bool:
    """Return whether a checkpoint or history is of the data with this fingerprint; an old one does not say."""
    return source.get("derived", {}).get("data", fingerprint) == fingerprint


def check_experiment(path: Path, source: dict, config: Config, fingerprint: str) -> None:
    """Raise ValueError if source, the checkpoint or history in `path`, is not of this experiment and these data."""
    own = "give this run its own --log_dir and --save_dir"
    found = differences(source["config"], config, flags_of(EXPERIMENT, MEASUREMENT))
    if found:
        raise ValueError(f"{path} belongs to another experiment: {'; '.join(found)}; {own}")
    if not is_of_data(source, fingerprint):
        raise ValueError(f"{path} belongs to other data: the images or labels have changed (fingerprint "
                         f"{source['derived']['data']}, now {fingerprint}); restore them, or {own}")


def check_history(history_path: Path, history: dict, path: Path, checkpoint: dict) -> None:
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


def load_weights(model: torch.nn.Module, checkpoint: dict, path: Path) -> None:
    """Load the weights of the checkpoint in path; ValueError, in one line, if they do not fit the model."""
    try:
        model.load_state_dict(checkpoint["model_state_dict"])
    except (RuntimeError, AttributeError):
        raise ValueError(f"{path}: its weights do not fit the network that its config describes") from None


def load_optimizer_state(optimizer: torch.optim.Optimizer, checkpoint: dict) -> bool:
    """Load the optimizer's state from a checkpoint; return False, and change nothing, if it is of another optimizer,
    which PyTorch would only notice in the next step. The settings of the parameter group stay this run's: a GPU's
    optimizer needs others than a CPU's.
    """
    (group,) = optimizer.param_groups
    parameters, state = group["params"], checkpoint["optimizer_state_dict"]["state"]
    tensors = {"exp_avg", "exp_avg_sq"} if "betas" in group else {"momentum_buffer"} if group["momentum"] else set()

    def fits(entries: dict, parameter: torch.Tensor) -> bool:
        found = {name: value for name, value in entries.items() if name != "step" and value is not None}
        return found.keys() == tensors and all(
            (value.shape, value.dtype) == (parameter.shape, parameter.dtype) for value in found.values())

    if state:
        fitting = [*state] == [*range(len(parameters))] and all(fits(state[k], p) for k, p in enumerate(parameters))
    else:  # there is none before the first step, nor of SGD without momentum
        fitting = checkpoint["step"] == 0 or not tensors
    if fitting:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {
            k: {name: laid_out(value, parameters[k]) for name, value in entries.items()}
            for k, entries in state.items()}})
    return fitting


def laid_out(value: Any, parameter: torch.Tensor) -> Any:
    """Return value in the memory layout of its parameter: the fused optimizers assume that they are the same."""
    if value is None or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
