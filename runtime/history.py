"""The history of a run: columns that grow by one entry a log step, and the file they are kept in."""

import json
import math
import re
import sys
from pathlib import Path

import torch

from runtime.files import write_atomically

HISTORY_VERSION = 1
# Flags that may differ between a run and its continuation: where things lie and how the work is done, not what is
# computed. Everything else in the config is the experiment.
MAY_CHANGE = {"n_steps", "n_epochs", "data_dir", "log_dir", "save_dir", "resume", "device", "threads",
              "eval_batch_size", "cuda_graph", "deterministic", "checkpoint_minutes", "keep_checkpoints", "plot",
              "on_nan", "quiet", "products", "compile"}
NO_FLAG_ANY_MORE = {"eval_threads"}  # older configs hold it


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
