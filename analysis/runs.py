"""Several runs: which belong together, what sets them apart, and what to call them."""

import json
import os
import textwrap
from pathlib import Path

import numpy as np

from flags import EXECUTION, FIELDS, LENGTH, epsilon_label, flags_of, history_key

# Flags that say where or how a run was computed, not what was trained or measured.
NOT_COMPARED = flags_of(EXECUTION)
# Flags that a figure shows without words, or that say how finely it was measured.
NOT_IN_TITLES = NOT_COMPARED | flags_of(LENGTH) | {"epsilons", "lc_radius", "adv_size", "lc_samples", "log_points",
                                                   "log_interval", "seed"}


def asked(history):
    """Names of the flags that the user gave; of an older history, which does not say, all."""
    return history.get("asked", list(history["config"]))


def differing_flags(histories, also_same=()):
    """Names of the flags that the user chose and in which the runs differ, places and the like aside."""
    names = dict.fromkeys(name for history in histories for name in asked(history))
    return [name for name in names if name in FIELDS.keys() - NOT_COMPARED and name not in also_same
            and len({json.dumps(history["config"].get(name)) for history in histories}) > 1]


def flag_text(name, value, between=" "):
    """A flag's value as one writes it: an epsilon of 0.0313725 as 8/255."""
    if isinstance(value, list):
        return between.join(flag_text(name, entry) for entry in value)
    if name == "epsilons" and value is not None:
        return epsilon_label(history_key(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def in_title(name, value):
    """A flag and its value in words that no line break parts."""
    words = name.replace("_", " ")
    if isinstance(value, bool):
        words = words if value else f"no {words}"
    else:
        words = f"{words} {flag_text(name, value)}"
    return words.replace(" ", "\N{NBSP}")


def short_names(paths):
    """The parts in which paths differ: 'runs/a/logs/h.json', 'runs/b/logs/h.json' -> 'a', 'b'."""
    parts = [Path(path).parts for path in paths]
    if len(set(parts)) == 1:
        return [str(path) for path in paths]
    head = len(os.path.commonprefix(parts))
    tail = len(os.path.commonprefix([part[head:][::-1] for part in parts]))
    return ["/".join(part[head:len(part) - tail]) or "." for part in parts]


def run_title(history, flags=()):
    """What was trained on what and what else the user chose, the flags that differ between the runs left out."""
    config, sizes = history["config"], history["sizes"]
    same = {name: value for name, value in config.items() if name not in flags and value is not None}
    shape = ", ".join(f"{name} {same[name]}" for name in ("depth", "width") if name in same)
    text = same.get("model", "several models") + (f" ({shape})" if shape else "")
    text += f" on {same.get('dataset', 'several data sets')}"
    if not {"dataset", "train_size"} & set(flags) and "train" in sizes:
        text += f", {sizes['train']:,} training images"
    said = {"model", "depth", "width", "dataset", "train_size"} | NOT_IN_TITLES
    chosen = [name for name in history.get("asked", []) if name in same and name not in said]
    return ", ".join([text, *(in_title(name, same[name]) for name in chosen)])


def group_title(group, flags):
    """What sets this group off from the others, in lines that a small panel has room for."""
    config = group[0]["config"]
    return textwrap.fill(", ".join(in_title(flag, config.get(flag)) for flag in flags), 42)


def runs_text(group):
    if len(group) == 1:
        return ""
    ends = [history["step"][-1] if history["step"] else 0 for history in group]
    unfinished = sum(end < max(ends) for end in ends)
    return f"mean and range of {len(group)} runs" + (f", {unfinished} of them not at the end" if unfinished else "")


def grouped(histories):
    """(groups, flags): the histories in groups of equal configuration, the seed aside, and the flags that differ."""
    flags = differing_flags(histories, also_same={"seed"})
    groups = {}
    for history in histories:
        groups.setdefault(json.dumps([history["config"].get(flag) for flag in flags]), []).append(history)
    return list(groups.values()), flags


def together(group, column):
    """(steps, mean, low, high) of one column over runs that differ in their seed only.

    column: function of a history that returns an array, log points first. A run whose log steps differ from the others'
    is interpolated in log(step); beyond the last step of a run the others are averaged without it.
    """
    if len(group) == 1:
        values = column(group[0])
        return np.array(group[0]["step"]), values, values, values
    steps = np.unique(np.concatenate([history["step"] for history in group]))
    stack = []
    for history in group:
        values = column(history)
        flat = [np.interp(np.log1p(steps), np.log1p(history["step"]), entry, left=np.nan, right=np.nan)
                for entry in values.reshape(len(values), -1).T]
        stack.append(np.stack(flat, axis=1).reshape(len(steps), *values.shape[1:]))
    stack = np.ma.masked_invalid(stack)
    return steps, *(np.ma.filled(fold(axis=0), np.nan) for fold in (stack.mean, stack.min, stack.max))
