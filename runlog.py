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
import zipfile
from pathlib import Path

import torch

HISTORY_VERSION = 1
HISTORY_NAME = "training_history.json"
CHECKPOINT_PATTERN = "checkpoint_epoch_*.pt"
ROLLING_NAME = "rolling.pt"
HISTORY_PATTERN = "training_history.*"  # the history and its figures
HISTORY_TYPES = {"step": list, "warnings": list, "config": dict}
CHECKPOINT_TYPES = {"epoch": (int, float), "step": int, "seconds": (int, float), "logged": int, "config": dict,
                    "sizes": dict, "model_state_dict": dict, "optimizer_state_dict": dict}
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


def has_types(value, types):
    """Whether value is a dict with at least the keys of types, each of its type."""
    return isinstance(value, dict) and all(isinstance(value.get(key), types[key]) for key in types)


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


def forget_after(history, logged):
    """Keep the first `logged` log points: a run made the others between its last checkpoint and its end."""
    for column in column_lists(history):
        del column[logged:]
    history["warnings"] = [warning for warning in history["warnings"] if warning["step"] in history["step"]]


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
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no JSON file") from None
    if not has_types(history, HISTORY_TYPES):
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
        for old in saved_checkpoints(folder)[1 if keep == "last" else keep:]:
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
        with zipfile.ZipFile(path) as archive:
            intact = archive.testzip() is None  # torch.load does not look at the checksums
        state = torch.load(path, map_location="cpu", weights_only=True) if intact else None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it is no checkpoint, or its pickle holds more than data") from None
    except Exception:  # zipfile, zlib, struct and PyTorch have each their own errors for a damaged file
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged or no checkpoint")
    if not has_types(state, CHECKPOINT_TYPES):
        raise ValueError(f"{path} is no checkpoint of this program")
    return state


def newest_checkpoint(folder, warn, before=math.inf):
    """Return (state, path) of the sound checkpoint with the most steps, fewer than `before`, or (None, None).

    warn is called with one line for each newer file that had to be passed over.
    """
    def sound(path):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            warn(f"{error}; passed over")
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / ".lock", "w")
        except OSError as error:
            raise OSError(f"cannot write to {folder}: {os.strerror(error.errno)}; choose another --log_dir or "
                          "--save_dir") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ValueError(
                f"another run is writing to {folder}: wait for it, or give this one its own --log_dir and --save_dir"
            ) from None
        held.append(file)
        for pattern in (CHECKPOINT_PATTERN, ROLLING_NAME, HISTORY_PATTERN):
            for part in folder.glob(f".{pattern}.part"):  # a killed run was writing it
                part.unlink()
    return held


def move_aside(log_dir, save_dir):
    """Move an earlier run's files into folders earlier-TIME beside them; returns the folders made."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    made = []
    # The history goes last: without its checkpoints it is no run to resume, while they without it could not be used.
    for folder, patterns in ((save_dir, [CHECKPOINT_PATTERN, ROLLING_NAME]), (log_dir, [HISTORY_PATTERN])):
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
