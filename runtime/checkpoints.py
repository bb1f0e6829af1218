"""Checkpoints: written whole, read without trust, and what a resumed run needs of them."""

import collections
import contextlib
import copy
import io
import math
import pickle
import zipfile
from pathlib import Path

import torch

from runtime.files import CHECKPOINT_PATTERN, HISTORY_NAME, ROLLING_NAME, write_atomically
from runtime.history import (
    MAY_CHANGE,
    NO_FLAG_ANY_MORE,
    count,
    fits,
    forget_after,
    mapping,
    number,
    read_history,
    tensor,
    text,
)

CHECKPOINT = {"epoch": number, "step": count, "seconds": number, "logged": count, "config": mapping, "sizes": mapping,
              "model_state_dict": {text: tensor}, "optimizer_state_dict": mapping}
NEWER_IN_CHECKPOINT = {"derived": mapping, "largest_loss": lambda value: type(value) in (int, float)}  # or infinite


def save_checkpoint(folder, state, keep="all"):
    """Write the checkpoint of a log step; keep "all", the "last", or the last N of them: this one and the N - 1 newest
    undamaged others, whatever their names."""
    name = f"checkpoint_epoch_{math.floor(state['epoch']):07d}_step_{state['step']:09d}.pt"
    path = save_state(Path(folder) / name, state)
    # The newer log step's checkpoint holds all that the rolling file was for.
    (Path(folder) / ROLLING_NAME).unlink(missing_ok=True)
    if keep != "all":
        left = 0 if keep == "last" else keep - 1
        for old in saved_checkpoints(folder):
            if old == path:
                continue
            if left == 0:
                old.unlink(missing_ok=True)
            else:
                with contextlib.suppress(OSError):  # what cannot be read today may be sound tomorrow: it stays
                    left -= intact(old)
    return path


def save_rolling(folder, state):
    """Write the one checkpoint that is replaced between log steps."""
    return save_state(Path(folder) / ROLLING_NAME, state)


def save_state(path, state):
    # Through memory, so that a full disk is the OSError that it is and not an error of the zip writer.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())
    return path


def intact(path):
    """Whether the checksums of a checkpoint's file, at which torch.load does not look, are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, MemoryError):
        raise
    except Exception:  # zipfile, zlib and struct have each their own errors for a damaged file
        return False


def load_checkpoint(path):
    """Return the checkpoint in `path`, on the CPU; ValueError if it is damaged, foreign or holds more than data."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if intact(path) else None
    except MemoryError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it is no checkpoint, or its pickle holds more than data") from None
    except Exception:
        state = None
    if state is None:
        raise ValueError(f"{path} is damaged or no checkpoint")
    if not (mapping(state) and state.keys() >= CHECKPOINT.keys()
            and all(fits(state[key], CHECKPOINT[key]) for key in CHECKPOINT)
            and all(fits(state[key], NEWER_IN_CHECKPOINT[key]) for key in NEWER_IN_CHECKPOINT.keys() & state.keys())):
        raise ValueError(f"{path} is no checkpoint of this program")
    return state


def newest_checkpoint(folder, note, before=math.inf, finite=True):
    """Return (state, path) of the sound checkpoint with the most steps, fewer than `before`, or (None, None).

    finite: one whose weights are not finite is not sound. note is called with one line for each newer file that had to
    be passed over.
    """
    def sound(path):
        try:
            state = load_checkpoint(path)
            if finite and not all(weights.isfinite().all() for weights in state["model_state_dict"].values()):
                raise ValueError(f"{path}: its weights are not finite")
            return state
        except ValueError as error:
            note(f"{error}; passed over")
            return None

    rolling = Path(folder) / ROLLING_NAME
    newest = sound(rolling) if rolling.exists() else None
    if newest is None or newest["step"] >= before:
        newest, rolling = None, None
    for path in saved_checkpoints(folder):
        if newest is not None and newest["step"] >= step_in_name(path):
            break
        state = sound(path) if step_in_name(path) < before else None
        if state is not None:
            return state, path
    return newest, rolling


def saved_checkpoints(folder):
    """Return the paths of the log steps' checkpoints, the newest first."""
    paths = [path for path in Path(folder).glob(CHECKPOINT_PATTERN) if step_in_name(path) is not None]
    return sorted(paths, key=step_in_name, reverse=True)


def step_in_name(path):
    """Return the step in a checkpoint's name, None if the name is not one that this program gives."""
    digits = path.stem.rpartition("_step_")[2]
    return int(digits) if digits.isdecimal() else None


def differences(before, now, defaults):
    """Return one line for each flag of the experiment that differs between two configs.

    defaults: the flags' defaults, which count for a flag that a config lacks because its program did not know it.
    """
    keys = (before.keys() | now.keys()) - MAY_CHANGE - NO_FLAG_ANY_MORE
    values = [(key, *(config.get(key, defaults.get(key)) for config in (before, now))) for key in sorted(keys)]
    return [f"--{key} was {was}, is {is_now}" for key, was, is_now in values if was != is_now]


def continue_from(log_dir, save_dir, config, defaults, data, note, finite=True):
    """Return the checkpoint to continue from, or None if there is none: the newest sound one in save_dir, with its
    "path", and as "history" the one in log_dir, cut to what the checkpoint knows.

    config, defaults: dicts of this run's flags as they are used, and of the flags' defaults. data: the fingerprint of
    this run's data. note is called with one line for each thing that the user should know. finite: pass over
    checkpoints whose weights are not finite.

    Raises ValueError, or FileNotFoundError without a history, with one line, if the files are damaged, belong to
    another experiment or to other data, or do not go together.
    """
    checkpoint, path = newest_checkpoint(save_dir, note, finite=finite)
    if checkpoint is None:
        note(f"nothing to resume in {save_dir}: starting")
        return None
    history_path = Path(log_dir) / HISTORY_NAME
    history = read_history(history_path)
    check_experiment(path, checkpoint, config, defaults, data)
    check_experiment(history_path, history, config, defaults, data)
    if config["n_steps"] < checkpoint["step"]:
        raise ValueError(f"{path} is at step {checkpoint['step']}, past --n_steps={config['n_steps']}")
    if len(history["step"]) < checkpoint["logged"]:
        raise ValueError(f"{history_path} is older than {path}: its log points are missing")
    forget_after(history, checkpoint["logged"])
    if history["step"] and history["step"][-1] > checkpoint["step"]:
        raise ValueError(f"{history_path} and {path} are not of one run: the history is {checkpoint['logged']} log "
                         f"points long at step {history['step'][-1]}, the checkpoint at step {checkpoint['step']}")
    note(f"continuing from {path} at step {checkpoint['step']}")
    return {**checkpoint, "history": history, "path": path}


def check_experiment(path, source, config, defaults, data):
    """Raise ValueError if source, the checkpoint or history in `path`, is not of this experiment and these data."""
    n_test, asked = source.get("sizes", {}).get("test"), config["adv_size"]
    if "derived" not in source and count(n_test):  # an older program kept the number of images in place of the flag
        attacked = n_test if asked == "all" else min(asked, n_test)
        config = {**config, "adv_size": attacked if source["config"].get("adv_size") == attacked else asked}
    found = differences(source["config"], config, defaults)
    if found:
        raise ValueError(f"{path} belongs to another experiment: {'; '.join(found)}; give this one its own --log_dir "
                         "and --save_dir")
    before = source.get("derived", {}).get("data", data)
    if before != data:
        raise ValueError(f"{path} belongs to other data: the images or labels have changed (fingerprint {before}, now "
                         f"{data}); bring the old ones back, or give this run its own --log_dir and --save_dir")


def load_state(model, optimizer, checkpoint):
    """Load a checkpoint (with its "path") into model and optimizer; the settings of the parameter groups stay this
    run's: a GPU's optimizer needs others than a CPU's.

    Raises ValueError, and changes nothing, if names, shapes or dtypes are not those of the model and of what the
    optimizer keeps for each parameter. (PyTorch does not look at the latter, and crashes in the next step.)
    """
    weights, state = checkpoint["model_state_dict"], checkpoint["optimizer_state_dict"].get("state")
    if not fits(state, {count: mapping}):
        raise ValueError(f"{checkpoint['path']} holds no state of an optimizer")
    expected, found = described(expected_state(optimizer)), described(state)
    if found or checkpoint["step"] > 0:
        check_fit(checkpoint["path"], "optimizer", expected, found)
    check_fit(checkpoint["path"], "network", described({"": model.state_dict()}), described({"": weights}))
    model.load_state_dict(weights)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {
        index: {name: laid_out(value, parameters[index]) for name, value in entries.items()}
        for index, entries in state.items()}})


def check_fit(path, what, expected, found):
    misfits = {key for key, _ in expected.items() ^ found.items()}
    if misfits:
        index, name = min(misfits, key=str)
        raise ValueError(f"{path}: its state does not fit the {what} that its config describes: see {name} {index}")


def described(state):
    """Return {(index, name): what a tensor has to agree in} of {index: {name: tensor}}."""
    return {(index, name): (tuple(value.shape), value.dtype, value.layout) if tensor(value) else type(value)
            for index, entries in state.items() for name, value in entries.items() if value is not None}


def expected_state(optimizer):
    """Return the state that the optimizer will keep: that of a twin after one step on tensors without content."""
    def blank(parameter):
        twin = torch.nn.Parameter(torch.empty_like(parameter, device="meta"))
        twin.grad = torch.empty_like(twin)
        return twin

    twin = copy.copy(optimizer)
    twin.state = collections.defaultdict(dict)
    twin.param_groups = [{**group, "params": [*map(blank, group["params"])], "fused": False, "foreach": False,
                          "capturable": False} for group in optimizer.param_groups]
    twin.step()
    return twin.state_dict()["state"]


def laid_out(value, parameter):
    """Return value in the memory layout of its parameter: the fused optimizers take the same for both for granted."""
    if not tensor(value) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
