"""When a training set was fitted, and which accuracies rise after that beyond chance.

How a rise is told from chance. The same images are attacked at every log step, so two log points are compared image by
image: `gains` were wrong and are now right, `losses` the reverse. If the network is not better, gains are at most as
likely as losses, so their number is at most binomial with probability 1/2: the exact one-sided sign test (McNemar's).
A level counts only if it is held: each of HOLD consecutive log points must be better than the reference, so the p-value
of such a stretch is the largest of its points'. Bonferroni's correction multiplies it by all that was searched: the
stretches (for a recovery those before it, too), the curves, and QUESTIONS. So with a probability of CONFIDENCE no
statement about a run is due to the choice of test images. The test says nothing about chance in training: what a
network does to all images at one log step and not at the next is real to the test. HOLD is for that.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from flags import epsilon_label

INTERPOLATION = 0.99  # training accuracy from which on the training set counts as fitted
HOLD = 3  # consecutive log points for which a level must last
CONFIDENCE = 0.95  # that no statement about a run is due to the choice of test images
QUESTIONS = 3  # for each curve: does it rise, does it recover from a dip, does it rise at any log point at all

Outcomes = Sequence[np.ndarray | None]  # for each log point which images were right, bool (images,), None if unknown


def as_array(column: Any) -> np.ndarray:
    """Return a column of the history as floats; null becomes NaN."""
    return np.array(column, dtype=float)


def column_of(history: dict, name: str) -> np.ndarray:
    """Return a column of one number for each log step as floats, NaN where the history does not have it."""
    return as_array(history.get(name) or [None] * len(history["step"]))


def last_value(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return finite[-1] if len(finite) else np.nan


def interpolation_index(train_acc: Any) -> int | None:
    """Return the index of the first log point with a training accuracy of at least 99%, or None."""
    reached = np.flatnonzero(as_array(train_acc) >= INTERPOLATION)
    return int(reached[0]) if len(reached) else None


def interpolation_of(history: dict) -> int | None:
    return interpolation_index(history.get("train_acc", []))


def total_complexity(history: dict, points: str = "train", radius: str | None = None) -> np.ndarray:
    """Return local complexity summed over the layers: one value for each log step, NaN where it is unknown.

    points: "train", "test" or "random". radius: a key of the history, by default its first.
    """
    radii = history.get("local_complexity", {}).get(points, {})
    radius = next(iter(radii), None) if radius is None else radius
    if radius not in radii:
        return np.full(len(history["step"]), np.nan)
    return np.array([np.nan if not layers or None in layers else sum(layers) for layers in radii[radius]], dtype=float)


# ---- the outcomes of single images ----------------------------------------------------------------------------------

class Curve(NamedTuple):
    """An accuracy at the log points of a run: fractions, NaN where unknown, and which images were right."""

    values: np.ndarray
    outcomes: Outcomes


def accuracy_curves(history: dict) -> dict[str, Curve]:
    """Return {label: Curve} of test accuracy, and of robust_acc and adv_acc at each epsilon."""
    found = history.get("outcomes", {})
    tested, attacked = (history["sizes"].get(name) or 1 for name in ("test", "attacked"))
    unknown = [None] * len(history["step"])

    def decoded(texts: Sequence | None, decode: Callable) -> list:
        return [None if text is None else decode(text) for text in texts or unknown]

    curves = {"test": Curve(column_of(history, "test_acc"),
                            decoded(found.get("test"), lambda text: from_hex(text, tested)))}
    robust = history.get("robust_acc", {})
    grid = sorted({0.0, *map(float, robust)})
    ranks = decoded(found.get("robust"), lambda text: from_ranks(text, attacked))
    for key, values in robust.items():
        rank = grid.index(float(key))
        curves[f"robust ε {epsilon_label(key)}"] = Curve(
            as_array(values), [None if row is None else row > rank for row in ranks])
    for key, values in history.get("adv_acc", {}).items():
        right = decoded(found.get("adv", {}).get(key), lambda text: from_hex(text, attacked))
        curves[f"adv ε {epsilon_label(key)}"] = Curve(as_array(values), right)
    return curves


def from_hex(text: str, images: int) -> np.ndarray:
    """Return bool (images,) from hexadecimal digits: one bit for each image, the first in the highest.

    Raises ValueError if there are more or fewer digits than the images take.
    """
    if len(text) != -(-images // 4):
        raise ValueError(f"the history's outcomes are damaged: {len(text)} hexadecimal digits for {images} images")
    return np.unpackbits(np.frombuffer(bytes.fromhex(text + "0" * (len(text) % 2)), np.uint8), count=images) > 0


def from_ranks(text: str, images: int) -> np.ndarray:
    """Return int (images,) from characters, chr(48 + rank); raises ValueError if there is not one for each image."""
    if len(text) != images:
        raise ValueError(f"the history's outcomes are damaged: {len(text)} characters for {images} images")
    return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(int) - 48


# ---- rises ----------------------------------------------------------------------------------------------------------

class Rise(NamedTuple):
    """What an accuracy curve does after interpolation. Log points are given by index, None where there is none."""

    start: float  # value at interpolation
    final: float
    largest: float = np.nan  # largest later value
    level: float = np.nan  # highest later level that is held for HOLD log points
    lowest: float = np.nan  # lowest later level that is held
    half_at: int | None = None  # from here on the curve holds half of the rise from start to level
    recovery_at: int | None = None  # from here on it holds half of the rise from the lowest level
    p: float = 1.0  # p-values: no level is held above start;
    p_recovery: float = 1.0  # none is held above the lowest one;
    p_once: float = 1.0  # no log point lies above start

    @property
    def half(self) -> int | None:
        """The log point at which half of a rise is reached that is held and beyond chance, or None."""
        return self.half_at if self.p <= 1 - CONFIDENCE else None

    @property
    def recovery(self) -> int | None:
        """The log point at which half of the recovery from a dip below start is reached, or None."""
        return self.recovery_at if self.p_recovery <= 1 - CONFIDENCE and self.lowest < self.start else None

    @property
    def dip(self) -> float:
        """The lowest later level that is held, NaN unless it lies below start."""
        return self.lowest if self.lowest < self.start else np.nan

    @property
    def brief(self) -> bool:
        """Whether no rise is held, but a log point lies above start beyond chance."""
        return self.half is None and self.p_once <= 1 - CONFIDENCE


def delayed_rise(curve: Curve, start: int | None) -> Rise:
    """Return the Rise of one curve after the log point `start` (None: the training set was never fitted).

    Log points whose outcomes are unknown are passed over. The p-values are corrected for the search within this curve
    alone; rises_of() corrects them for all curves of a run.
    """
    base = np.nan if start is None else curve.values[start]
    rise = Rise(base, last_value(curve.values))
    known = {i: right for i, right in enumerate(curve.outcomes) if right is not None and np.isfinite(curve.values[i])}
    later = np.array([i for i in known if start is not None and i > start])
    if start not in known or not len(later):
        return rise
    values, right = curve.values[later], np.stack([known[i] for i in later])
    hold = min(HOLD, len(later))
    windows = sliding_window_view(values, hold)
    held_above, held_below = windows.min(axis=1), windows.max(axis=1)

    def half_of(bottom: float, first: int = 0) -> int:
        middle = (bottom + held_above[first:].max()) / 2 - 1e-9  # less than one image, more than rounding
        return int(later[first + np.argmax(held_above[first:] >= middle)])

    p = p_values(known[start][None], right)
    stretches = len(windows)
    rise = rise._replace(largest=values.max(), level=held_above.max(), half_at=half_of(base),
                         p=stretches * sliding_window_view(p, hold).max(axis=1).min(), p_once=len(later) * p.min())
    foot = int(np.argmin(held_below))
    rise = rise._replace(lowest=held_below[foot])
    after = foot + hold
    if after < stretches:
        p = sliding_window_view(p_values(right[foot:after], right[after:]), hold).max(axis=1)
        rise = rise._replace(recovery_at=half_of(rise.lowest, after), p_recovery=stretches * len(p) * p.min())
    return rise


def p_values(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return for each row of `after` the p-value of "not better than each row of `before`" (bool, rows of images)."""
    from scipy import stats  # it takes longer to import than the rest of a program's start

    gains = (~before).astype(np.float32) @ after.T.astype(np.float32)  # exact up to 16 million images
    losses = before.astype(np.float32) @ (~after).T.astype(np.float32)
    return stats.binom.sf(gains - 1, gains + losses, 0.5).max(axis=0)


def rises_of(history: dict) -> dict[str, Rise]:
    """Return {label: Rise} of every accuracy curve of a run, the p-values corrected for all of them together."""
    start = interpolation_of(history)
    return corrected({label: delayed_rise(curve, start) for label, curve in accuracy_curves(history).items()})


def corrected(rises: dict[str, Rise]) -> dict[str, Rise]:
    """Multiply the p-values of a run's curves by the number of statements that are made about them."""
    statements = QUESTIONS * len(rises)
    return {label: rise._replace(**{name: min(1.0, statements * getattr(rise, name))
                                    for name in ("p", "p_recovery", "p_once")}) for label, rise in rises.items()}


# ---- several seeds --------------------------------------------------------------------------------------------------

def poolable(histories: Sequence[dict]) -> list[dict]:
    """Return the runs that fitted their training set and have come as far as the furthest of all."""
    end = max((history["step"][-1] for history in histories if history["step"]), default=0)
    return [history for history in histories
            if interpolation_of(history) is not None and history["step"][-1] == end]


def pooled_rises(histories: Sequence[dict]) -> tuple[list[int], dict[str, Rise]]:
    """Return (steps, {label: Rise}) of the poolable() runs among these, which differ only in the seed.

    Each run is compared with its own interpolation, and gains and losses are summed over the runs. The indices of the
    rises are those of `steps`: the median interpolation step, then the log steps that all runs have after theirs.
    Curves that not all runs have are left out. Each run's images count as its own: where runs share images (all do in
    test accuracy), this takes what two networks learn of one image as independent.

    Raises ValueError if two runs have the same seed: their outcomes repeat each other.
    """
    runs = poolable(histories)
    if not runs:
        return [], {}
    seeds = [history["config"].get("seed") for history in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"two of the runs to be tested together have the same seed (seeds: {seeds}): leave one out")
    started = [(history["step"], interpolation_of(history) or 0) for history in runs]
    common = sorted(set.intersection(*(set(steps[start + 1:]) for steps, start in started)))
    first = int(np.median([steps[start] for steps, start in started]))
    rows = [[start, *np.searchsorted(steps, common)] for steps, start in started]
    curves = [accuracy_curves(history) for history in runs]
    labels = [label for label in curves[0] if all(label in run for run in curves)]
    return [first, *common], corrected({label: delayed_rise(joined([run[label] for run in curves], rows), 0)
                                        for label in labels})


def joined(curves: Sequence[Curve], rows: Sequence[Sequence[int]]) -> Curve:
    """Return the images of several runs as one Curve, each run at its rows; NaN where not all outcomes are known."""
    outcomes: list[np.ndarray | None] = []
    values = []
    for row in zip(*rows, strict=True):
        point = [curve.outcomes[i] for curve, i in zip(curves, row, strict=True)]
        known = [right for right in point if right is not None]
        outcomes.append(np.concatenate(known) if len(known) == len(point) else None)
        values.append(np.nan if outcomes[-1] is None else outcomes[-1].mean())
    return Curve(np.array(values), outcomes)
