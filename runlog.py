"""What a run leaves on disk: the history, the checkpoints, and what is needed to continue from them.

Every file is written beside its final name, synced and renamed, so that a reader never meets half a file and a crash,
a full disk or a kill at any moment leaves the earlier file whole.
"""

import collections
import contextlib
import copy
import datetime
import errno
import io
import json
import math
import os
import pickle
import re
import socket
import sys
import tempfile
import warnings
import weakref
import zipfile
from pathlib import Path

import filelock
import torch

HISTORY_VERSION = 1
HISTORY_NAME = "training_history.json"
CHECKPOINT_PATTERN = "checkpoint_epoch_*.pt"
ROLLING_NAME = "rolling.pt"
HISTORY_PATTERN = "training_history.*"  # the history and its figures
# Flags that may differ between a run and its continuation: where things lie and how the work is done, not what is
# computed. Everything else in the config is the experiment.
MAY_CHANGE = {"n_steps", "n_epochs", "data_dir", "log_dir", "save_dir", "resume", "device", "threads",
              "eval_batch_size", "cuda_graph", "deterministic", "checkpoint_minutes", "keep_checkpoints", "plot",
              "on_nan", "quiet", "products", "compile"}
SECONDS_TO_SAY_WHO = 1  # after which a run that has just locked a folder has written its name there
NO_FLAG_ANY_MORE = {"eval_threads"}  # older configs hold it
# How a file system says that it has no locks, or does not sync folders.
NOT_THERE = {errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


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
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise naming(path, error) from None
        raise
    sync_folder(path.parent)


def sync_folder(folder):
    """Let a rename in folder reach the disk, where the system can: Windows does not open folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some network file systems do not sync folders
            if error.errno not in NOT_THERE:
                raise naming(folder, error) from None
        finally:
            os.close(descriptor)


def naming(path, error):
    """Return the OSError with path in its message: that of a full disk names no file."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def check_room(folder, size):
    """Raise OSError if folder cannot take `size` more bytes: to be called before an earlier run's files are moved."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise naming(folder, error) from None


# ---- what may stand in a file, which somebody may have edited -------------------------------------------------------

def number(value):
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def count(value):
    return type(value) is int and 0 <= value < 2**63


def text(value):
    return isinstance(value, str)


def hexadecimal(value):
    return text(value) and re.fullmatch("[0-9a-f]*", value) is not None


def numeral(value):
    try:
        return number(float(value))
    except ValueError:
        return False


def mapping(value):
    return isinstance(value, dict)


def tensor(value):
    return isinstance(value, torch.Tensor)


def rising(value):
    return isinstance(value, list) and all(map(count, value)) and value == sorted(set(value))


def warnings_list(value):
    return isinstance(value, list) and all(
        mapping(entry) and count(entry.get("step")) and text(entry.get("text")) for entry in value)


def sizes(value):
    return mapping(value) and all(count(value.get(name)) for name in ("train", "test", "attacked"))


def fits(value, shape):
    """Whether value has the shape: a check; [the entries' shape], None among them; {name, or check of it: shape}."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(entry is None or fits(entry, shape[0]) for entry in value)
    if isinstance(shape, dict):
        return mapping(value) and all(
            any((key(name) if callable(key) else key == name) and fits(entry, inner) for key, inner in shape.items())
            for name, entry in value.items())
    return shape(value)


# What a history holds beside its columns, the columns that every program wrote, and those of newer ones.
BESIDE = {"version": count, "config": mapping, "asked": [text], "derived": mapping, "environment": mapping,
          "sizes": sizes, "layers": mapping, "warnings": warnings_list}
COLUMNS = {"step": rising, "epoch": [number], "train_loss": [number], "train_acc": [number], "test_loss": [number],
           "test_acc": [number], "adv_acc": {numeral: [number]}, "robust_acc": {numeral: [number]},
           "local_complexity": {text: {numeral: [[number]]}}, "weight_norm": [number], "seconds": [number]}
NEWER_COLUMNS = {"saturated": [number], "zero_gradient": [number], "train_saturated": [number],
                 "max_batch_loss": [number],
                 "outcomes": {"test": [hexadecimal], "robust": [text], "adv": {numeral: [hexadecimal]}}}
CHECKPOINT = {"epoch": number, "step": count, "seconds": number, "logged": count, "config": mapping, "sizes": mapping,
              "model_state_dict": {text: tensor}, "optimizer_state_dict": mapping}
NEWER_IN_CHECKPOINT = {"derived": mapping, "largest_loss": lambda value: type(value) in (int, float)}  # or infinite


# ---- the history ----------------------------------------------------------------------------------------------------

def append(history, row):
    """Append a log step's row to the history's columns; nested objects line up with nested columns.

    A column that the row lacks gets None, and one that the history lacked is None up to here.
    """
    columns = {key: history[key] for key in history if key not in BESIDE}
    extend(columns, row, len(history["step"]))
    history.update(columns)


def extend(columns, row, length):
    for key in [*columns, *(key for key in row if key not in columns)]:
        value = row.get(key)
        if isinstance(value, dict) or isinstance(columns.get(key), dict):
            extend(columns.setdefault(key, {}), value or {}, length)
        else:
            columns.setdefault(key, [None] * length).append(value)


def column_lists(history):
    """Return the lists of a history that have one entry a log step."""
    def lists(value):
        return [value] if isinstance(value, list) else [entry for v in value.values() for entry in lists(v)]

    return [column for key, value in history.items() if key not in BESIDE for column in lists(value)]


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
    """Return the history in the file `path`; one without "environment" gets an empty one.

    Raises FileNotFoundError if there is none, ValueError if the file is empty, no JSON, no history of this program, a
    history of another version, or damaged: columns of different lengths, values of the wrong type. The message is one
    line. Columns that an older program did not write may be missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no history at {path}")
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path} is empty")
    try:
        history = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no JSON file") from None
    if not (mapping(history) and history.keys() >= {"version", "step", "warnings", "config"}
            and mapping(history["config"])):
        raise ValueError(f"{path} is no training history")
    if history["version"] != HISTORY_VERSION:
        raise ValueError(f"{path} is a history of version {history['version']}, not {HISTORY_VERSION}")
    fault = fault_in(history)
    if fault:
        raise ValueError(f"{path} is damaged: {fault}")
    history.setdefault("environment", {})
    return history


def fault_in(history):
    """Return in words what is wrong with a history, or None."""
    for name, shape in {**BESIDE, **COLUMNS, **NEWER_COLUMNS}.items():
        if name in history and not fits(history[name], shape):
            return f"its {name} holds what this program does not write there"
    try:
        lengths = {len(column) for column in column_lists(history)}
    except AttributeError:
        lengths = {}
    if len(lengths) != 1:
        return "its columns differ in length"
    missing = {"sizes", *(COLUMNS if history["step"] else [])} - history.keys()
    if missing:
        return f"it has no {', '.join(sorted(missing))}"
    layers = [entry for radii in history.get("local_complexity", {}).values() for column in radii.values()
              for entry in column if entry is not None]
    if len({len(entry) for entry in layers}) > 1:
        return "its local_complexity changes the number of layers"
    return None


# ---- checkpoints ----------------------------------------------------------------------------------------------------

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


# ---- continuing -----------------------------------------------------------------------------------------------------

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


# ---- the folders ----------------------------------------------------------------------------------------------------

def lock_folders(*folders, note=print):
    """Make the folders and lock them against a second run; returns what must be kept while the run lasts.

    The lock is the kernel's: it ends with the process, however that ends. Where the file system has no locks, or one
    was left behind by a process that is gone, note is called with one line. Raises OSError if a folder cannot be
    written, ValueError if another run holds it.
    """
    held = []
    for folder in sorted({Path(os.path.realpath(folder)) for folder in folders}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.append(lock(folder, note))
            for pattern in (CHECKPOINT_PATTERN, ROLLING_NAME, HISTORY_PATTERN):
                for part in folder.glob(f".{pattern}.part"):  # a killed run was writing it
                    part.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise naming(folder, error) from None
            raise OSError(f"cannot write to {folder}: {error.strerror or error}; choose another --log_dir or "
                          "--save_dir") from None
    return held


def lock(folder, note):
    """Lock one folder and leave a note of who holds it; return what must be kept."""
    held, holder_path = filelock.FileLock(folder / ".lock"), folder / ".holder.lock"
    try:
        with warnings.catch_warnings():
            # Without locks filelock falls back on files, which a killed run would leave behind for good.
            warnings.simplefilter("error", UserWarning)
            held.acquire(timeout=SECONDS_TO_SAY_WHO)
    except filelock.Timeout:
        holder = read_holder(holder_path)
        if not is_gone(holder):
            raise ValueError(f"another run is writing to {folder}{in_words(holder)}: wait for it, or give this one its "
                             "own --log_dir and --save_dir") from None
        note(f"{folder} is still locked by a run that is gone{in_words(holder)}; going on")
    except (NotImplementedError, UserWarning, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NOT_THERE:
            raise
        note(f"the file system of {folder} has no locks: see to it that no second run writes there")
    with contextlib.suppress(OSError):  # the lock holds without it
        holder_path.write_text(json.dumps(this_process()))
    weakref.finalize(held, remove, holder_path)
    return held


def remove(path):
    with contextlib.suppress(OSError):
        os.remove(path)


def this_process():
    """Return what tells this process from others, on this machine and in this job."""
    job = os.environ.get("SLURM_JOB_ID", "")
    # Containers on one host may number their processes each by itself.
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return {"host": f"{socket.gethostname()} {namespace}".strip(), "pid": os.getpid(), "job": job,
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0)}


def read_holder(path):
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    shape = {"host": text, "pid": count, "job": text, "restarts": count}
    return holder if fits(holder, shape) and holder.keys() == shape.keys() else None


def is_gone(holder):
    """Whether a lock's holder has certainly ended: it was this job before a requeue, or its process is no more."""
    if holder is None:
        return False
    me = this_process()
    if me["job"] and holder["job"] == me["job"] and holder["restarts"] < me["restarts"]:
        return True
    if holder["host"] != me["host"] or os.name != "posix":  # on Windows os.kill would do more than look
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it belongs to another user
        return False
    return False


def in_words(holder):
    if holder is None:
        return ""
    job = f", SLURM job {holder['job']}" if holder["job"] else ""
    return f" (process {holder['pid']} on {holder['host'].split()[0]}{job})"


def move_aside(log_dir, save_dir):
    """Move an earlier run's files into folders earlier-TIME beside them; returns the folders made."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    made = []
    # The history goes last: without its checkpoints it is no run to resume, while they without it could not be used.
    for folder, patterns in ((save_dir, [CHECKPOINT_PATTERN, ROLLING_NAME]), (log_dir, [HISTORY_PATTERN])):
        files = [path for pattern in patterns for path in sorted(Path(folder).glob(pattern))]
        if not files:
            continue
        aside, again = Path(folder) / f"earlier-{stamp}", 1
        while aside in made or aside.exists():
            again += 1
            aside = Path(folder) / f"earlier-{stamp}-{again}"
        aside.mkdir()
        for path in files:
            path.rename(aside / path.name)
        made.append(aside)
    return made
