"""The history of a run: columns that grow by one entry a log step, and the files that hold them.

While a run lasts there are two: training_history.json holds the columns without each image's outcomes and is rewritten
at most once a second; training_history.rows.jsonl holds one line for each log step and is appended to. read_history()
joins them, so that a kill at any moment loses nothing.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from records.files import append_line, write_atomically

HISTORY_NAME = "training_history.json"
HISTORY_VERSION = 1
# What a history holds apart from its columns.
BESIDE = {"version", "config", "asked", "derived", "environment", "sizes", "layers", "warnings", "branch",
          "interpolation"}


class History(TypedDict, total=False):
    """A run's history, as docs/files.md describes it. Its columns are those of measure.Row, with an entry for each log
    step and None where nothing is known; what stands before `epoch` is said once."""

    version: int
    config: dict[str, Any]
    asked: list[str]
    derived: dict[str, Any]
    environment: dict[str, Any]
    sizes: dict[str, Any]
    layers: dict[str, list]
    warnings: list[dict[str, Any]]
    branch: dict[str, Any]
    interpolation: int | None
    epoch: list[float]
    step: list[int]
    train_loss: list[float | None]
    train_acc: list[float]
    train_saturated: list[float]
    test_loss: list[float | None]
    test_acc: list[float]
    adv_acc: dict[str, list[float]]
    rounding: dict[str, list[float]]
    robust_acc: dict[str, list[float]]
    certified_acc: dict[str, list[float]]
    saturated: list[float]
    zero_gradient: list[float]
    local_complexity: dict[str, dict[str, list[list[float] | None]]]
    weight_norm: list[float]
    max_batch_loss: list[float | None]
    lr: list[float]
    seconds: list[float]
    outcomes: dict[str, Any]


def append(history: History, row: Mapping[str, Any]) -> None:
    """Append a log step's row to the history's columns; nested objects line up with nested columns. A column that the
    row lacks gets None, a new column is None up to here, and so is a number that is not finite."""
    columns = columns_of(history)
    extend(columns, strict(row), len(history["step"]))
    cast(dict, history).update(columns)


def extend(columns: dict, row: dict, length: int) -> None:
    for key in [*columns, *(key for key in row if key not in columns)]:
        value = row.get(key)
        if isinstance(value, dict) or isinstance(columns.get(key), dict):
            extend(columns.setdefault(key, {}), value or {}, length)
        else:
            columns.setdefault(key, [None] * length).append(value)


def columns_of(history: History) -> dict:
    return {name: column for name, column in history.items() if name not in BESIDE}


def rows_of(history: History) -> list[dict]:
    """Return the row of each log step, nested as the columns are."""
    return [row_at(columns_of(history), k) for k in range(len(history["step"]))]


def row_at(columns: Any, k: int | slice) -> Any:
    return {name: row_at(column, k) for name, column in columns.items()} if isinstance(columns, dict) else columns[k]


def flat(row: Mapping[str, Any], layers: Sequence[str] = (), within: str = "") -> dict[str, Any]:
    """Return {name: value} of a row, such as robust_acc/0.1 and local_complexity/train/0.05/layer1, without outcomes.

    layers: what to call the layers in place of layer1, layer2, ... within: begins each name.
    """
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, list):
            value = {layers[i] if i < len(layers) else f"layer{i + 1}": entry for i, entry in enumerate(value)}
        if name != "outcomes":
            found |= flat(value, layers, f"{within}{name}/") if isinstance(value, dict) else {within + name: value}
    return found


def forget_after(history: History, logged: int) -> None:
    """Keep the first `logged` log points: the others were made between the last checkpoint and the run's end."""
    history.update(row_at(columns_of(history), slice(logged)))
    last = history["step"][-1] if history["step"] else -1
    history["warnings"] = [warning for warning in history["warnings"] if warning["step"] <= last]


def strict(value: Any) -> Any:
    """Return value with every float that is not finite replaced by None, as strict JSON demands."""
    if isinstance(value, dict):
        return {key: strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_nan(value: Any) -> Any:
    """The inverse of strict(): value with NaN for None."""
    if isinstance(value, dict):
        return {key: with_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [with_nan(entry) for entry in value]
    return math.nan if value is None else value


def encoded(value: Mapping[str, Any]) -> bytes:
    return json.dumps(strict(value), allow_nan=False).encode()


def write_history(path: str | Path, history: Mapping[str, Any]) -> None:
    """Write the whole history as one strict JSON object."""
    write_atomically(path, encoded(history))


class HistoryFile:
    """The two files of a running history. A log step costs the same however many came before it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows_path = self.path.with_suffix(".rows.jsonl")
        self.written_at, self.took = -math.inf, 0.0

    def begin(self, history: History) -> None:
        """Write both files anew: a run starts or continues."""
        lines = [self.line(history, row) + b"\n" for row in rows_of(history)]
        # The rows come first: until the JSON is replaced, an earlier one with its own outcomes is whole without them.
        write_atomically(self.rows_path, b"".join(lines))
        self.flush(history)

    def log(self, history: History, row: Mapping[str, Any]) -> None:
        """Store a row that has just been appended to history. Rewriting the JSON takes at most a tenth of the time."""
        append_line(self.rows_path, self.line(history, row))
        if time.monotonic() - self.written_at > max(1.0, 10 * self.took):
            self.flush(history)

    def line(self, history: History, row: Mapping[str, Any]) -> bytes:
        return encoded({**row, "warnings": [entry for entry in history["warnings"] if entry["step"] == row["step"]]})

    def flush(self, history: History) -> None:
        """Bring the JSON up to date."""
        began = time.monotonic()
        write_history(self.path, {key: value for key, value in history.items() if key != "outcomes"})
        self.written_at = time.monotonic()
        self.took = self.written_at - began


def read_history(path: str | Path) -> History:
    """Return the history in the file `path`, joined with the rows file next to it if there is one.

    FileNotFoundError if there is none; ValueError, in one line, if it is damaged or not a history of this program.
    Columns that an older program did not write may be missing.
    """
    path = Path(path)
    rows_path = path.with_suffix(".rows.jsonl")
    if not path.is_file():
        raise FileNotFoundError(f"no history at {path}")
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is damaged or not a JSON file") from None
    if not (isinstance(found, dict) and found.keys() >= {"version", "step", "warnings", "config", "sizes"}):
        raise ValueError(f"{path} is not a history of this program")
    history = cast(History, found)
    if history["version"] != HISTORY_VERSION:
        raise ValueError(f"{path} is a history of another version of this program")
    if "outcomes" not in history and rows_path.is_file():
        try:
            join_rows(history, rows_path.read_bytes().split(b"\n")[:-1])  # without a last line that is cut off
        except (ValueError, TypeError, LookupError, AttributeError):
            raise ValueError(f"{rows_path} is damaged; remove it to go on without it") from None
    history.setdefault("environment", {})
    return history


def join_rows(history: History, lines: list[bytes]) -> None:
    """Add to history the outcomes in the lines of a rows file, and the rows that it lacks. The lines of another run are
    ignored."""
    rows = [json.loads(line) for line in lines]
    known = list(zip(history["step"], history.get("seconds", []), strict=False))
    if any((row["step"], row["seconds"]) != pair for row, pair in zip(rows, known, strict=False)):
        return
    outcomes: dict = {}
    for k in range(len(known)):
        extend(outcomes, {"outcomes": rows[k].get("outcomes", {})} if k < len(rows) else {}, k)
    cast(dict, history).update(outcomes)
    for row in rows[len(known):]:
        history["warnings"] += row.pop("warnings")
        append(history, row)
