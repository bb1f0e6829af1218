"""Several runs: which belong together, how they differ, and what to call them."""

import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flags import EXECUTION, FIELDS, LENGTH, epsilon_label, flags_of, history_key
from records.history import History

NOT_COMPARED = flags_of(EXECUTION)
FINENESS = {"adv_size", "certify", "lc_samples", "log_points", "log_from", "log_interval"}  # how finely it is measured
# Flags that need no words: a figure shows them, or they do not say what was trained.
NOT_IN_TITLES = NOT_COMPARED | flags_of(LENGTH) | FINENESS | {"epsilons", "lc_radius", "seed"}


def asked(history: History) -> list[str]:
    """Return the names of the flags that the user gave, or of all if the history does not say; only today's flags."""
    return [name for name in history.get("asked", history["config"]) if name in FIELDS]


def value_of(history: History, name: str) -> Any:
    """Return a flag's value, the default if an older program did not have the flag."""
    return history["config"].get(name, FIELDS[name].default)


def differing_flags(histories: Sequence[History], also_same: Collection[str] = ()) -> list[str]:
    """Return the names of the flags that the user chose and in which the runs differ.

    Flags of kind EXECUTION are not compared, except for data_dir where it says what the data are. How long a run is
    counts as n_steps.
    """
    configs = [history["config"] for history in histories]
    names = dict.fromkeys(name for history in histories for name in asked(history)
                          if name not in NOT_COMPARED | flags_of(LENGTH))
    length = "n_epochs" if all(config.get("n_epochs") for config in configs) else "n_steps"
    if len({config.get(length) for config in configs}) > 1:
        names["n_steps"] = None
    if len({config.get("data_dir") for config in configs if config.get("dataset") in ("imagefolder", "npz")}) > 1:
        names["data_dir"] = None
    return [name for name in names
            if name not in also_same and len({repr(value_of(history, name)) for history in histories}) > 1]


def grouped(histories: Sequence[History]) -> tuple[list[list[History]], list[str]]:
    """Return (groups, flags): the runs in groups that differ only in the seed, and the flags that set groups apart.

    A second run of the same seed and flags begins a group of its own, which is told apart by its log_dir.
    """
    flags = differing_flags(histories, also_same={"seed"})
    groups: dict[tuple, list[History]] = {}
    seen: Counter = Counter()
    for history in histories:
        values = tuple(repr(value_of(history, flag)) for flag in flags)
        run = (*values, value_of(history, "seed"))
        groups.setdefault((*values, seen[run]), []).append(history)
        seen[run] += 1
    return list(groups.values()), flags + ["log_dir"] * (max(seen.values(), default=1) > 1)


def together(group: Sequence[History], column: Callable[[History], np.ndarray]
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (steps, mean, low, high) of one column over runs that differ only in the seed.

    column: maps a history to an array, log points first. Runs with other log steps are interpolated in log(step) and
    count up to their last step.
    """
    if len(group) == 1:
        values = column(group[0])
        return np.array(group[0]["step"]), values, values, values
    steps = np.unique(np.concatenate([history["step"] for history in group]))

    def resampled(values: np.ndarray, known: list[int]) -> np.ndarray:
        return np.interp(np.log1p(steps), np.log1p(known), values, left=np.nan, right=np.nan)

    stack = np.ma.masked_invalid([np.apply_along_axis(resampled, 0, column(history), history["step"])
                                  for history in group])
    mean, low, high = (np.ma.filled(fold(axis=0), np.nan) for fold in (stack.mean, stack.min, stack.max))
    return steps, mean, low, high


def shown_value(name: str, value: Any, between: str = " ") -> str:
    """Return a flag's value as one writes it: an epsilon of 0.0313725 as 8/255."""
    if isinstance(value, list):
        return between.join(shown_value(name, entry) for entry in value)
    if name in ("epsilons", "pgd_step_size") and value is not None:
        return epsilon_label(history_key(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def in_title(name: str, value: Any) -> str:
    """Return a flag and its value in words that are not broken over two lines."""
    words = name.replace("_", " ")
    if name == "branch_from":  # .../RUN/checkpoints/checkpoint_epoch_0000005_step_000003970.pt
        path = Path(value or "")
        step = re.sub(r"^checkpoint_epoch_\d+_step_0*(\d+)$", r"step \1", path.stem)
        of = f" of {path.parent.parent.name}" if path.parent.parent.name else ""
        words, value = "branch", value is not None and f"from {step}{of}"
    text = words if value is True else f"no {words}" if value is False else f"{words} {shown_value(name, value)}"
    return text.replace(" ", "\N{NBSP}")


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """Return the parts in which paths differ: 'runs/a/logs/h.json', 'runs/b/logs/h.json' -> 'a', 'b'."""
    parts = [Path(path).parts for path in paths]
    if len(set(parts)) == 1:
        return [str(path) for path in paths]
    head = len(os.path.commonprefix(parts))
    tail = len(os.path.commonprefix([part[head:][::-1] for part in parts]))
    return [str(Path(*part[head:len(part) - tail] or part[head - 1:head])) for part in parts]


def run_title(history: History, flags: Collection[str] = ()) -> str:
    """Return what was trained on what, and what else the user chose, without the flags in which the runs differ."""
    same = {name: value for name, value in history["config"].items() if name not in flags and value is not None}
    shape = ", ".join(f"{name} {same[name]}" for name in ("depth", "width") if name in same)
    dataset = same.get("dataset", "several data sets")
    if dataset in ("imagefolder", "npz") and "data_dir" in same:
        dataset = Path(same["data_dir"]).stem
    text = same.get("model", "several models") + (f" ({shape})" if shape else "") + f" on {dataset}"
    if not {"dataset", "train_size"} & set(flags):
        text += f", {history['sizes']['train']:,} training images"
    said = {"model", "depth", "width", "dataset", "train_size"} | NOT_IN_TITLES
    again = ", measured again" if "interpolation" in history else ""
    named = [*history.get("asked", []), *["loss"] * ("branch" in history)]  # it may have changed to the default
    chosen = [name for name in dict.fromkeys(named) if name in {*FIELDS} & {*same} and name not in said]
    return ", ".join([text + again, *(in_title(name, same[name]) for name in chosen)])


def group_title(group: Sequence[History], flags: Sequence[str]) -> str:
    """Return the values of these flags in a group of runs, in lines that fit a small panel, and how many runs its mean
    is of; not how finely it was measured, if more sets it apart."""
    flags = [flag for flag in flags if flag not in FINENESS] or flags
    words = ", ".join(in_title(flag, value_of(group[0], flag)) for flag in flags)
    lines = textwrap.wrap(words, 42, break_long_words=False)
    if len(group) > 1:
        ends = [history["step"][-1] for history in group]
        unfinished = sum(end < max(ends) for end in ends)
        not_all = f", {unfinished} of them not at the end" if unfinished else ""
        lines.append(f"mean and range of {len(group)} runs{not_all}")
    return "\n".join(lines)
