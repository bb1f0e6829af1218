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

from flags import EXPERIMENT, FIELDS, MEASUREMENT, Config, flags_of
from runtime.files import CHECKPOINT_PATTERN, ROLLING_NAME, check_regular, write_atomically
from runtime.history import HISTORY_NAME, fault_in_origin, forget_after, is_number, read_history, strict

# Flags that do not change what is computed, but how, and with it the last bits of the results.
ROUNDING = ("device", "threads", "products", "compile", "eval_batch_size")
ROW = ("epoch", "seconds", "train_loss", "train_acc", "test_loss", "test_acc")  # what a log step's checkpoint repeats


def save_checkpoint(folder: str | Path, state: dict, keep: str | int = "all") -> Path:
    """Write the checkpoint of a log step; return its path.

    keep: "all", "last", or N: this one and the N - 1 newest undamaged others stay.
    """
    name = f"checkpoint_epoch_{math.floor(state['epoch']):07d}_step_{state['step']:09d}.pt"
    path = save_state(Path(folder) / name, state)
    (Path(folder) / ROLLING_NAME).unlink(missing_ok=True)  # it is older
    if keep != "all":
        left = 0 if keep == "last" else int(keep) - 1
        for old in saved_checkpoints(folder):
            if old == path:
                continue
            if left == 0:
                old.unlink(missing_ok=True)
            else:
                with contextlib.suppress(OSError):  # what cannot be read today may be sound tomorrow: it stays
                    left -= intact(old)
    return path


def save_rolling(folder: str | Path, state: dict) -> Path:
    """Write the one checkpoint that is replaced between log steps; return its path."""
    return save_state(Path(folder) / ROLLING_NAME, state)


def save_state(path: Path, state: dict) -> Path:
    # Through memory, so that a full disk is an OSError and not an error of the zip writer.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())
    return path


def intact(path: Path) -> bool:
    """Whether the checksums of a checkpoint's file are right; torch.load does not look at them."""
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, MemoryError):
        raise
    except Exception:  # zipfile, zlib and struct raise errors of their own for a damaged file
        return False


def load_checkpoint(path: str | Path) -> dict:
    """Return the checkpoint in `path`, on the CPU.

    Raises ValueError, in one line, if it is damaged or foreign, holds more than data, or cannot be read.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if intact(path) else None
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
    fault = fault_in(state)
    if fault:
        raise ValueError(f"{path} is not a checkpoint of this program: {fault}")
    return state


def fault_in(state: Any) -> str | None:
    """Return in words what is wrong with the content of a checkpoint, or None."""
    parts = ("config", "sizes", "model_state_dict", "optimizer_state_dict")
    if not isinstance(state, dict) or not all(isinstance(state.get(name), dict) for name in parts):
        return "a part is missing"
    if not (all(type(state.get(name)) is int and state[name] >= 0 for name in ("step", "logged"))
            and all(is_number(state.get(name)) for name in ("epoch", "seconds"))
            and type(state.get("largest_loss", 0.0)) in (int, float)):
        return "its step, epoch, seconds, logged or largest_loss is not a number"
    weights, moments = state["model_state_dict"], state["optimizer_state_dict"].get("state")
    if not isinstance(moments, dict) or not all(isinstance(entries, dict) for entries in moments.values()):
        return "it holds no state of an optimizer"
    kept = [value for entries in moments.values() for value in entries.values() if isinstance(value, torch.Tensor)]
    if not weights or not all(map(is_plain, [*weights.values(), *kept])) or {*map(type, weights)} != {str}:
        return "its weights or its optimizer's state are not plain tensors"
    largest = max(value.numel() for value in weights.values())
    return fault_in_origin(state) or ("its weights are fewer than its config says" if (
        (state["config"].get("depth") or 0) > len(weights) or (state["config"].get("width") or 0) > largest) else None)


def is_plain(value: Any) -> bool:
    """Whether value is a dense tensor that has each of its elements in memory."""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
            and not value.is_quantized and value.untyped_storage().nbytes() >= value.numel() * value.element_size())


def newest_checkpoint(folder: str | Path, note: Callable[[str], None], before: float = math.inf, finite: bool = True
                      ) -> tuple[dict, Path] | tuple[None, None]:
    """Return (state, path) of the sound checkpoint with the most steps, fewer than `before`, or (None, None).

    finite: pass over weights that are not finite. note is called with one line for each newer file passed over.
    """
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
    """Return the checkpoint to continue from, or None if --save_dir holds none.

    It is the newest sound one, with its "path" and, as "history", the one in --log_dir up to its last log point.
    config: the complete flags. fingerprint: of this run's data. note is called with one line for each thing that the
    user should know.

    Raises ValueError, or FileNotFoundError without a history, in one line, if the files are damaged, belong to another
    experiment or other data, do not go together, or if there are checkpoints and none can be used.
    """
    checkpoint, path = newest_checkpoint(config.save_dir, note, finite=config.on_nan == "stop")
    if checkpoint is None or path is None:
        names = [path.name for path in all_checkpoints(config.save_dir)]
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise ValueError(f"none of the checkpoints in {config.save_dir} can be used ({listed}): mend or "
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
    check_history(history_path, history, path, checkpoint)
    note(f"continuing from {path} at step {checkpoint['step']}")
    if config.n_steps > planned:
        note(f"--n_steps was {planned}, is {config.n_steps}: later log points, and a learning rate schedule, are those "
             "of the longer run")
    used = {**checkpoint["config"], "threads": checkpoint.get("derived", {}).get("threads")}
    found = differences(used, config, [name for name in ROUNDING if name != "threads" or config.threads])
    if found:
        note(f"{'; '.join(found)}: the last bits of the results may differ from those of an uninterrupted run")
    return {**checkpoint, "history": history, "path": path}


def differences(before: dict, config: Config, names: Iterable[str]) -> list[str]:
    """Return one line for each of these flags that differs; a flag that `before` lacks had its default."""
    values = [(name, before.get(name, FIELDS[name].default), getattr(config, name)) for name in sorted(names)]
    return [f"--{name} was {was}, is {now}" for name, was, now in values if was != now]


def check_experiment(path: Path, source: dict, config: Config, fingerprint: str) -> None:
    """Raise ValueError if source, the checkpoint or history in `path`, is not of this experiment and these data."""
    own = "give this run its own --log_dir and --save_dir"
    found = differences(source["config"], config, flags_of(EXPERIMENT, MEASUREMENT))
    if found:
        raise ValueError(f"{path} belongs to another experiment: {'; '.join(found)}; {own}")
    before = source.get("derived", {}).get("data", fingerprint)
    if before != fingerprint:
        raise ValueError(f"{path} belongs to other data: the images or labels have changed (fingerprint {before}, now "
                         f"{fingerprint}); restore them, or {own}")


def check_history(history_path: Path, history: dict, path: Path, checkpoint: dict) -> None:
    """Cut history to the log points that the checkpoint knows; ValueError if the two are not of one run."""
    if len(history["step"]) < checkpoint["logged"]:
        raise ValueError(f"{history_path} is older than {path}: its log points are missing")
    forget_after(history, checkpoint["logged"])
    step = history["step"][-1] if history["step"] else 0
    logged = [name for name in ROW if "train_loss" in checkpoint and history["step"]]  # not in a rolling checkpoint
    if step > checkpoint["step"] or logged and step < checkpoint["step"] or any(
            history[name][-1] != strict(checkpoint.get(name)) for name in logged):
        raise ValueError(f"{history_path} and {path} are not of one run: log point {checkpoint['logged']} is at step "
                         f"{step}, the checkpoint at step {checkpoint['step']}, or their values differ")


def load_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: dict) -> None:
    """Load a checkpoint (with its "path") into model and optimizer. The settings of the parameter groups stay this
    run's: a GPU's optimizer needs others than a CPU's.

    Raises ValueError, and changes nothing, if names, shapes or dtypes do not fit the model and the optimizer. (PyTorch
    does not check the optimizer's and crashes in the next step.)
    """
    weights, state = checkpoint["model_state_dict"], checkpoint["optimizer_state_dict"]["state"]
    group = optimizer.param_groups[0]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if "betas" in group:
        names = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if group["amsgrad"] else set())
    else:
        names = {"momentum_buffer"} if group.get("momentum") else set()

    def fits(entries: dict, parameter: torch.Tensor) -> bool:
        kept = {name: value for name, value in entries.items() if value is not None}
        return kept.keys() == names and all(
            isinstance(value, torch.Tensor) and value.is_floating_point() and (
                value.ndim == 0 if name == "step" else (value.shape, value.dtype) == (parameter.shape, parameter.dtype))
            for name, value in kept.items())

    begun = state or checkpoint["step"] > 0 and names
    if begun and not (state.keys() == set(range(len(parameters)))
                      and all(fits(state[k], parameter) for k, parameter in enumerate(parameters))):
        raise ValueError(f"{checkpoint['path']}: its state does not fit the optimizer that its config describes")
    expected = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    if expected != {name: (value.shape, value.dtype) for name, value in weights.items()}:
        raise ValueError(f"{checkpoint['path']}: its weights do not fit the network that its config describes")
    model.load_state_dict(weights)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {
        k: {name: laid_out(value, parameters[k]) for name, value in entries.items()} for k, entries in state.items()}})


def laid_out(value: Any, parameter: torch.Tensor) -> Any:
    """Return value in the memory layout of its parameter: the fused optimizers assume that they are the same."""
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
