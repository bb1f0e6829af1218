"""What a run leaves on disk: the history, the checkpoints, and what is needed to continue from them.

Every file is written beside its final name, synced and renamed, so that a reader never meets half a file and a crash,
a full disk or a kill at any moment leaves the earlier file whole.
"""

import datetime
import errno
import fcntl
import io
import json
import math
import os
import pickle
from pathlib import Path

import torch

HISTORY_VERSION = 1
HISTORY_NAME = "training_history.json"
CHECKPOINT_PATTERN = "checkpoint_epoch_*.pt"
ROLLING_NAME = "rolling.pt"
CHECKPOINT_KEYS = {"epoch", "step", "seconds", "model_state_dict", "optimizer_state_dict", "config", "sizes"}
# Flags that may differ between a run and its continuation: where things lie and how the work is done, not what is
# computed. Everything else in the config is the experiment.
MAY_CHANGE = {"n_steps", "n_epochs", "data_dir", "log_dir", "save_dir", "resume", "device", "threads", "eval_threads",
              "eval_batch_size", "cuda_graph", "deterministic", "checkpoint_minutes", "keep_checkpoints", "plot",
              "on_nan"}


def write_atomically(path, content):
    """Write bytes to path: beside it, fsync, rename. OSError (no room, no permission) leaves what was there."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ---- the history ----------------------------------------------------------------------------------------------------

def append(columns, row):
    """Append each value of row to the list of the same name; nested objects line up with nested columns."""
    for key, value in row.items():
        if isinstance(value, dict):
            append(columns.setdefault(key, {}), value)
        else:
            columns.setdefault(key, []).append(value)


def column_lists(history):
    """Return the lists of a history that have one entry a log step."""
    def lists(value):
        return [value] if isinstance(value, list) else [entry for v in value.values() for entry in lists(v)]

    beside = {"version", "config", "environment", "sizes", "layers", "warnings"}
    return [column for key, value in history.items() if key not in beside for column in lists(value)]


def forget_after(history, step):
    """Drop the log points after `step`: those a run made between its last checkpoint and its end."""
    keep = sum(s <= step for s in history["step"])
    for column in column_lists(history):
        del column[keep:]
    history["warnings"] = [warning for warning in history["warnings"] if warning["step"] <= step]


def finite(value):
    """Return value with every float that is not finite replaced by None, as strict JSON wants it."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_history(path, history):
    """Write a history as one strict JSON object (a number that is not finite becomes null)."""
    write_atomically(path, json.dumps(finite(history), allow_nan=False).encode())


def read_history(path):
    """Return the history in the file `path`.

    Raises FileNotFoundError if there is none, ValueError if the file is empty, no JSON, no history of this program or
    a history of another version; the message is one line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no history at {path}")
    text = path.read_bytes()
    if not text.strip():
        raise ValueError(f"{path} is empty")
    try:
        history = json.loads(text)
    except ValueError:
        raise ValueError(f"{path} is no JSON file") from None
    if not isinstance(history, dict) or not isinstance(history.get("step"), list) or "config" not in history:
        raise ValueError(f"{path} is no training history")
    if history.get("version") != HISTORY_VERSION:
        raise ValueError(f"{path} is a history of version {history.get('version')}, not {HISTORY_VERSION}")
    try:
        lengths = {len(column) for column in column_lists(history)}
    except AttributeError:
        lengths = {}
    if len(lengths) != 1:
        raise ValueError(f"{path} is damaged: its columns differ in length")
    return history


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def save_checkpoint(folder, state, keep="all"):
    """Write the checkpoint of a log step; keep "all", the "last", or the last N of them."""
    name = f"checkpoint_epoch_{math.floor(state['epoch']):07d}_step_{state['step']:09d}.pt"
    path = save_state(Path(folder) / name, state)
    # The newer log step's checkpoint holds all that the rolling file was for.
    (Path(folder) / ROLLING_NAME).unlink(missing_ok=True)
    if keep != "all":
        for old in sorted(Path(folder).glob(CHECKPOINT_PATTERN))[: -1 if keep == "last" else -keep]:
            old.unlink()
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


def load_checkpoint(path):
    """Return the checkpoint in `path`, on the CPU; ValueError if it is damaged, foreign or holds more than data."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it is no checkpoint, or its pickle holds more than data") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path} is damaged or no checkpoint") from None
    if not isinstance(state, dict) or not CHECKPOINT_KEYS <= state.keys():
        raise ValueError(f"{path} is no checkpoint of this program")
    return state


def newest_checkpoint(folder, warn):
    """Return (state, path) of the sound checkpoint with the most steps, or (None, None).

    warn is called with one line for each newer file that had to be passed over.
    """
    folder = Path(folder)

    def sound(path):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            warn(f"{error}; passed over")
            return None

    rolling = folder / ROLLING_NAME
    found = (sound(rolling), rolling) if rolling.exists() else (None, None)
    for path in sorted(folder.glob(CHECKPOINT_PATTERN), key=step_in_name, reverse=True):
        if found[0] is not None and found[0]["step"] >= step_in_name(path):
            break
        state = sound(path)
        if state is not None:
            return state, path
    return found


def step_in_name(path):
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def differences(before, now):
    """Return one line for each flag of the experiment that differs between two configs."""
    keys = sorted((before.keys() | now.keys()) - MAY_CHANGE)
    return [f"--{key} was {before.get(key)}, is {now.get(key)}" for key in keys if before.get(key) != now.get(key)]


# ---- the folders ----------------------------------------------------------------------------------------------------

def lock_folders(*folders):
    """Make the folders and lock them against a second run; returns what must be kept open while the run lasts.

    The lock is the kernel's (flock): it ends with the process, however that ends. Raises OSError if a folder cannot
    be written, ValueError if another run holds it.
    """
    held = []
    for folder in sorted({Path(folder).resolve() for folder in folders}):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ValueError(
                f"another run is writing to {folder}: wait for it, or give this one its own --log_dir and --save_dir"
            ) from None
        held.append(file)
    return held


def move_aside(log_dir, save_dir):
    """Move an earlier run's files into folders earlier-TIME beside them; returns the folders made."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    made = []
    for folder, patterns in ((log_dir, ["training_history.*"]), (save_dir, [CHECKPOINT_PATTERN, ROLLING_NAME])):
        files = [path for pattern in patterns for path in sorted(Path(folder).glob(pattern))]
        if not files:
            continue
        aside, number = Path(folder) / f"earlier-{stamp}", 1
        while aside in made or aside.exists():
            number += 1
            aside = Path(folder) / f"earlier-{stamp}-{number}"
        aside.mkdir()
        for path in files:
            path.rename(aside / path.name)
        made.append(aside)
    return made
