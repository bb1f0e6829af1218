"""When a training set was fitted, and which accuracies rise after that beyond chance.

The same images are attacked at every log step, so two log points are compared image by image: `gains` were wrong and
are now right, `losses` the reverse. If the network is not better, the number of gains is at most binomial with
probability 1/2: the exact one-sided sign test (McNemar's). A level counts only if it is held: each of HOLD consecutive
log points must be better than the reference, so the p-value of such a stretch is the largest of its points'.
Bonferroni's correction multiplies it by all that was searched: the stretches (for a recovery those before it, too), the
curves, and QUESTIONS. So with a probability of CONFIDENCE no statement about a run is due to the choice of test images.
The test says nothing about chance in training: HOLD is for that.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from flags import epsilon_label, history_key

INTERPOLATION = 0.99  # training accuracy from which on the training set counts as fitted
HOLD = 3  # consecutive log points for which a level must last
CONFIDENCE = 0.95  # that no statement about a run is due to the choice of test images
QUESTIONS = 3  # for each curve: does it rise, does it recover from a dip, does it rise at any log point at all


def column_of(history: dict, name: str) -> np.ndarray:
    """Return a column of one number for each log step as floats, NaN where the history does not have it."""
    return np.array(history.get(name) or [None] * len(history["step"]), dtype=float)


def interpolation_of(history: dict) -> int | None:
    """Return the index of the first log point with a training accuracy of at least 99%. None if there is none, or if it
    is the first of a run measured again from a later step on: nobody knows when that was fitted."""
    reached = np.flatnonzero(column_of(history, "train_acc") >= INTERPOLATION)
    known = len(reached) and (reached[0] > 0 or history["step"][0] == 0)
    return int(reached[0]) if known else None


def complexity_of(history: dict, points: str = "train", radius: str | None = None) -> np.ndarray:
    """Return local complexity, (log points, layers), with NaN where it is unknown.

    points: "train", "test" or "random". radius: a key of the history, by default its first.
    """
    radii = history["local_complexity"].get(points, {})
    entries = radii.get(radius or next(iter(radii), None), [None] * len(history["step"]))
    layers = max((len(entry) for entry in entries if entry), default=1)
    return np.array([entry or [None] * layers for entry in entries], dtype=float).reshape(-1, layers)


def total_complexity(history: dict, points: str = "train", radius: str | None = None) -> np.ndarray:
    """Return local complexity summed over the layers: one value for each log point."""
    return complexity_of(history, points, radius).sum(axis=1)


class Curve(NamedTuple):
    """An accuracy at the log points of a run."""

    values: np.ndarray  # fractions, NaN where unknown
    outcomes: Sequence[Any]  # for each log point which images were right, bool (images,), None where unknown


def accuracy_curves(history: dict) -> dict[str, Curve]:
    """Return {label: Curve} of test accuracy, and of robust_acc and adv_acc at each epsilon."""
    outcomes, unknown = history.get("outcomes", {}), [None] * len(history["step"])

    def right(texts: Sequence | None, images: str) -> list[np.ndarray | None]:
        return [text and from_hex(text, history["sizes"][images]) for text in texts or unknown]

    curves = {"test": Curve(column_of(history, "test_acc"), right(outcomes.get("test"), "test"))}
    # The outcomes are on the run's own grid; a branch also has columns for its parent's epsilons.
    own = {*map(history_key, history["config"].get("epsilons", ()))} or {*history["robust_acc"]}
    grid = sorted({0.0, *map(float, own)})
    ranks = [text and np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in outcomes.get("robust") or unknown]
    for key in history["robust_acc"]:
        withstood = ord("0") + grid.index(float(key)) if key in own else None  # the code of "0" plus the rank
        curves[f"robust ε {epsilon_label(key)}"] = Curve(column_of(history["robust_acc"], key), [
            None if codes is None or withstood is None else codes > withstood for codes in ranks])
    for key in history["adv_acc"]:
        curves[f"adv ε {epsilon_label(key)}"] = Curve(column_of(history["adv_acc"], key),
                                                      right(outcomes.get("adv", {}).get(key), "attacked"))
    return curves


def from_hex(text: str, images: int) -> np.ndarray:
    """Return bool (images,) from hexadecimal digits: one bit for each image, the first in the highest."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text + "0" * (len(text) % 2)), np.uint8), count=images) > 0


class Rise(NamedTuple):
    """What an accuracy curve does after interpolation. Log points are given by index, None where there is none."""

    start: float  # value at interpolation
    final: float  # value at the last log point
    largest: float = np.nan  # largest later value
    level: float = np.nan  # highest later level that is held for HOLD log points
    dip: float = np.nan  # lowest later level that is held, NaN unless it lies below start
    half: int | None = None  # from here on the curve holds half of the rise to level, if that is beyond chance
    recovery: int | None = None  # from here on it holds half of the way out of the dip, if that is beyond chance
    brief: bool = False  # whether no rise is held, but a log point lies above start beyond chance
    p: float = 1.0  # of "no level is held above start"; with Bonferroni's correction these can exceed 1
    p_recovery: float = 1.0  # of "none is held above the lowest one"
    p_once: float = 1.0  # of "no log point lies above start"


def delayed_rise(curve: Curve, start: int | None, statements: int = 1) -> Rise:
    """Return the Rise of one curve after the log point `start` (None: the training set was never fitted).

    Log points whose outcomes are unknown are passed over. statements: how many are made about the run, for which the
    p-values are corrected as for the search within this curve.
    """
    rise = Rise(np.nan if start is None else curve.values[start], curve.values[-1])
    known = {i: right for i, right in enumerate(curve.outcomes) if right is not None and np.isfinite(curve.values[i])}
    later = np.array([i for i in known if start is not None and i > start])
    if start not in known or not len(later):
        return rise
    values, right = curve.values[later], np.stack([known[i] for i in later])
    p = p_values(known[start][None], right)
    p_once = statements * len(later) * p.min()
    rise = rise._replace(largest=values.max(), p_once=p_once, brief=bool(p_once <= 1 - CONFIDENCE))
    if len(later) < HOLD:
        return rise
    windows = sliding_window_view(values, HOLD)
    stretches = len(windows)
    held_above, held_below = windows.min(axis=1), windows.max(axis=1)

    def half_of(bottom: float, p: float, first: int = 0) -> int | None:
        middle = (bottom + held_above[first:].max()) / 2 - 1e-9  # less than one image, more than rounding
        return int(later[first + np.argmax(held_above[first:] >= middle)]) if p <= 1 - CONFIDENCE else None

    p_rise = statements * stretches * sliding_window_view(p, HOLD).max(axis=1).min()
    half = half_of(rise.start, p_rise)
    rise = rise._replace(level=held_above.max(), half=half, p=p_rise, brief=half is None and rise.brief)
    foot = int(np.argmin(held_below))
    after = foot + HOLD
    if held_below[foot] < rise.start:
        rise = rise._replace(dip=held_below[foot])
        if after < stretches:
            p = sliding_window_view(p_values(right[foot:after], right[after:]), HOLD).max(axis=1)
            p_recovery = statements * stretches * len(p) * p.min()
            rise = rise._replace(recovery=half_of(rise.dip, p_recovery, after), p_recovery=p_recovery)
    return rise


def p_values(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return for each row of `after` the p-value of "not better than each row of `before`" (bool, rows of images)."""
    from scipy import stats  # it takes longer to import than the rest of a program's start

    gains = (~before).astype(np.float32) @ after.T.astype(np.float32)  # exact up to 16 million images
    losses = before.astype(np.float32) @ (~after).T.astype(np.float32)
    return stats.binom.sf(gains - 1, gains + losses, 0.5).max(axis=0)


def rises_of(history: dict) -> dict[str, Rise]:
    """Return {label: Rise} of every accuracy curve of a run, the p-values corrected for all of them together."""
    curves, start = accuracy_curves(history), interpolation_of(history)
    return {label: delayed_rise(curve, start, QUESTIONS * len(curves)) for label, curve in curves.items()}


def poolable(histories: Sequence[dict]) -> list[dict]:
    """Return the runs that fitted their training set and have come as far as the furthest of all."""
    end = max(history["step"][-1] for history in histories)
    return [history for history in histories if history["step"][-1] == end and interpolation_of(history) is not None]


def pooled_rises(histories: Sequence[dict]) -> tuple[list[int], dict[str, Rise]]:
    """Return (steps, {label: Rise}) of the poolable() runs among these, which differ only in the seed.

    Each run is compared with its own interpolation, and gains and losses are summed over the runs. The indices of the
    rises are those of `steps`: the median interpolation step, then the log steps that all runs have after theirs.
    Curves that not all runs have are left out. Where runs share images (all do in test accuracy), this takes what two
    networks learn of one image as independent.
    """
    runs = poolable(histories)
    if not runs:
        return [], {}
    started = [(history["step"], interpolation_of(history) or 0) for history in runs]
    common = sorted(set.intersection(*(set(steps[start + 1:]) for steps, start in started)))
    first = int(np.median([steps[start] for steps, start in started]))
    rows = [[start, *np.searchsorted(steps, common)] for steps, start in started]
    curves = [accuracy_curves(history) for history in runs]
    labels = [label for label in curves[0] if all(label in run for run in curves)]
    rises = {}
    for label in labels:
        parts = ([run[label].outcomes[i] for i in row] for run, row in zip(curves, rows, strict=True))
        right = [None if any(part is None for part in point) else np.concatenate(point)
                 for point in zip(*parts, strict=True)]
        values = np.array([np.nan if images is None else images.mean() for images in right])
        rises[label] = delayed_rise(Curve(values, right), 0, QUESTIONS * len(labels))
    return [first, *common], rises
