"""The history of a run: columns that grow by one entry a log step, and the files that hold them.

While a run lasts there are two: training_history.json holds the columns without each image's outcomes and is rewritten
at most once a second; training_history.rows.jsonl holds one line for each log step and is appended to. read_history()
joins them, so that a kill at any moment loses nothing.
"""

import itertools
import json
import math
import re
import sys
import time
import typing
from pathlib import Path
from typing import Any

from flags import Config
from runtime.files import append_line, write_atomically

HISTORY_NAME = "training_history.json"
HISTORY_VERSION = 1
# What a history holds apart from its columns.
BESIDE = {"version", "config", "asked", "derived", "environment", "sizes", "layers", "warnings", "branch"}
ALWAYS_KNOWN = ["step", "epoch", "train_acc", "test_acc", "seconds"]
COLUMNS = {*ALWAYS_KNOWN, "train_loss", "test_loss", "adv_acc", "robust_acc", "local_complexity", "weight_norm"}
NUMBERS = ["train_loss", "test_loss", "weight_norm", "adv_acc/*", "robust_acc/*", "saturated", "zero_gradient",
           "train_saturated", "max_batch_loss"]
ORIGIN = {"config": typing.get_type_hints(Config), "derived": {"data": str, "threads": int, "eval_threads": int},
          "sizes": {"train": int, "test": int, "attacked": int, "num_classes": int, "in_shape": list[int]}}


def append(history: dict, row: dict) -> None:
    """Append a log step's row to the history's columns; nested objects line up with nested columns.

    A column that the row lacks gets None, a new column is None up to here, and so is a number that is not finite.
    """
    columns = {key: history[key] for key in history if key not in BESIDE}
    extend(columns, strict(row), len(history["step"]))
    history.update(columns)


def extend(columns: dict, row: dict, length: int) -> None:
    for key in [*columns, *(key for key in row if key not in columns)]:
        value = row.get(key)
        if isinstance(value, dict) or isinstance(columns.get(key), dict):
            extend(columns.setdefault(key, {}), value or {}, length)
        else:
            columns.setdefault(key, [None] * length).append(value)


def row_at(columns: Any, k: int) -> Any:
    """Return entry k of each column, nested as the columns are."""
    return {key: row_at(column, k) for key, column in columns.items()} if isinstance(columns, dict) else columns[k]


def columns_of(value: Any, names: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Return (names, column) for each column of a history, with all the names that lead to it.

    The second is a list unless the history is damaged: three names lead to a column at most.
    """
    if isinstance(value, dict) and len(names) < 3:
        return [found for name, inner in value.items() if names or name not in BESIDE
                for found in columns_of(inner, (*names, name))]
    return [(names, value)]


def forget_after(history: dict, logged: int) -> None:
    """Keep the first `logged` log points: the others were made between the last checkpoint and the run's end."""
    for _, column in columns_of(history):
        del column[logged:]
    last = history["step"][-1] if history["step"] else -1
    history["warnings"] = [warning for warning in history["warnings"] if warning["step"] <= last]


def strict(value: Any) -> Any:
    """Return value with every float that is not finite replaced by None, as strict JSON demands."""
    if isinstance(value, dict):
        return {key: strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def encoded(value: dict) -> bytes:
    try:
        return json.dumps(value, allow_nan=False).encode()
    except ValueError:  # a number is not finite; a copy of a long history would take longer than writing it
        return json.dumps(strict(value), allow_nan=False).encode()


def write_history(path: str | Path, history: dict) -> None:
    """Write the whole history, outcomes included, as one strict JSON object (a number not finite becomes null)."""
    write_atomically(path, encoded(history))


class HistoryFile:
    """The two files of a running history. The cost of a log step does not grow with their number."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows_path = self.path.with_suffix(".rows.jsonl")
        self.written_at, self.took, self.behind = -math.inf, 0.0, False

    def begin(self, history: dict) -> None:
        """Write both files anew, and their folder if it is missing: a run starts or continues."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns = {key: column for key, column in history.items() if key not in BESIDE}
        lines = [self.line(history, row_at(columns, k)) + b"\n" for k in range(len(history["step"]))]
        # The rows come first: until the JSON is replaced, an earlier one with its own outcomes is whole without them.
        write_atomically(self.rows_path, b"".join(lines))
        self.write(history)

    def log(self, history: dict, row: dict) -> None:
        """Store a row that has just been appended to history. Rewriting the JSON takes at most a tenth of the time."""
        append_line(self.rows_path, self.line(history, row))
        self.behind = True
        if time.monotonic() - self.written_at > max(1.0, 10 * self.took):
            self.write(history)

    def flush(self, history: dict) -> None:
        """Bring the JSON up to date."""
        if self.behind:
            self.write(history)

    def line(self, history: dict, row: dict) -> bytes:
        return encoded({**row, "warnings": [entry for entry in history["warnings"] if entry["step"] == row["step"]]})

    def write(self, history: dict) -> None:
        began = time.monotonic()
        write_history(self.path, {key: value for key, value in history.items() if key != "outcomes"})
        self.written_at = time.monotonic()
        self.took, self.behind = self.written_at - began, False


def read_history(path: str | Path) -> dict:
    """Return the history in the file `path`, joined with the rows file next to it if there is one.

    Raises FileNotFoundError if there is no such file, ValueError, in one line, if it is not a history of this version
    or is damaged. Columns that an older program did not write may be missing.
    """
    path = Path(path)
    rows_path = path.with_suffix(".rows.jsonl")
    if not path.is_file():
        raise FileNotFoundError(f"no history at {path}")
    try:
        history = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not a JSON file") from None
    if not (isinstance(history, dict) and history.keys() >= {"version", "step", "warnings", "config"}):
        raise ValueError(f"{path} is not a training history")
    if history["version"] != HISTORY_VERSION:
        raise ValueError(f"{path} is a history of version {history['version']!r:.20}, not {HISTORY_VERSION}")
    fault = fault_in(history)
    if not fault and "outcomes" not in history and rows_path.is_file():
        try:
            join_rows(history, rows_path.read_bytes().split(b"\n")[:-1])
            fault = fault_in(history)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            fault = f"{rows_path.name}; remove that file to go on without it"
    if fault:
        raise ValueError(f"{path} is damaged: {fault}")
    history.setdefault("environment", {})
    return history


def join_rows(history: dict, lines: list[bytes]) -> None:
    """Add to history the outcomes in the lines of a rows file, and the rows that it lacks.

    The lines of another run are ignored, and so is a last one that was not written to its end.
    """
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            if line is not lines[-1]:
                raise
    known = list(zip(history["step"], history.get("seconds", []), strict=False))
    if any((row["step"], row["seconds"]) != pair for row, pair in zip(rows, known, strict=False)):
        return
    outcomes: dict = {}
    for k in range(len(known)):
        extend(outcomes, {"outcomes": rows[k].get("outcomes", {})} if k < len(rows) else {}, k)
    history.update(outcomes)
    for row in rows[len(known):]:
        history["warnings"] += row.pop("warnings")
        append(history, row)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def has_type(value: Any, kind: Any) -> bool:
    """Whether value is of a kind: {name: kind}, or None or one of a type, a list, a union, a text's pattern."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(has_type(value.get(name), inner) for name, inner in kind.items())
    if value is None:
        return True
    if isinstance(kind, str):
        return isinstance(value, str) and re.fullmatch(kind, value, re.DOTALL) is not None
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(has_type(entry, inner[0]) for entry in value)
    if inner:
        return any(has_type(value, one) for one in inner)
    return is_number(value) if kind is float else type(value) is kind


def fault_in_origin(source: dict) -> str | None:
    """Return in words what is wrong with the config, sizes and derived values of a history or checkpoint, or None."""
    for name, kind in ORIGIN.items():
        if not has_type(source.get(name, {}), kind):
            return f"its {name} holds values of the wrong type"
    sizes = dict(source.get("sizes", {}))
    counts = [*(sizes.pop("in_shape", None) or []), *map(sizes.get, ("train", "test", "attacked", "num_classes"))]
    if len(counts) != 7 or not all(0 < (size or 0) < 2**63 for size in counts):
        return "its sizes are incomplete, or less than 1"
    threads = [source.get("derived", {}).get(name) for name in ("threads", "eval_threads")]
    return None if all(1 <= n <= 1024 for n in threads if n is not None) else "its threads are not from 1 to 1024"


def fault_in(history: dict) -> str | None:
    """Return in words what is wrong with a history, or None."""
    fault = fault_in_origin(history)
    if fault:
        return fault
    if not isinstance(history["warnings"], list) or not all(
            has_type(entry, {"step": int, "text": str, "kind": str}) and entry.get("step") is not None
            and entry.get("text") is not None for entry in history["warnings"]):
        return "its warnings are not steps, kinds and texts"
    layers = history.get("layers", {})
    if not has_type(layers, {"names": list[str]}) or not has_type(history.get("environment", {}), {}):
        return "its layers or environment hold values of the wrong type"
    types, columns = column_types(history), columns_of(history)
    for names, column in columns:
        name = "/".join("*" if is_radius(name) else name for name in names)
        newer = None if names[0] in COLUMNS | {"outcomes"} else float | str | list[float]
        kind = types.get(name, newer)
        if not (isinstance(column, list) and kind and all(has_type(entry, kind) for entry in column)
                and not (name in ALWAYS_KNOWN and None in column)):
            return f"its {names[0]!r:.40} holds what this program does not write there"
    if len({len(column) for _, column in columns}) > 1:
        return "its columns differ in length"
    if any(later <= earlier for earlier, later in itertools.pairwise([-1, *history["step"]])):
        return "its step does not rise"
    counts = [entry for names, column in columns if names[0] == "local_complexity" for entry in column if entry]
    if len({len(entry) for entry in [*counts, layers.get("names")] if entry}) > 1:
        return "its local_complexity has another number of layers"
    missing = COLUMNS - history.keys() if history["step"] else None
    return f"it has no {', '.join(sorted(missing))}" if missing else None


def column_types(history: dict) -> dict[str, Any]:
    """Return {the names that lead to a column, a radius written as *: the type of its entries}."""
    tested, attacked = (-(-history["sizes"][name] // 4) for name in ("test", "attacked"))  # hexadecimal digits
    return {**dict.fromkeys([*ALWAYS_KNOWN, *NUMBERS], float), "step": int,
            **{f"local_complexity/{points}/*": list[float] for points in ("train", "test", "random")},
            "outcomes/test": f"[0-9a-f]{{{tested}}}", "outcomes/adv/*": f"[0-9a-f]{{{attacked}}}",
            "outcomes/robust": f".{{{history['sizes']['attacked']}}}"}


def is_radius(name: str) -> bool:
    try:
        return is_number(float(name))
    except ValueError:
        return False
