"""When a training set was fitted, what rises later and how surely.

How a rise is told from noise. The same images are attacked at every log step, so two log points are compared image by
image: `gains` were wrong and are now right, `losses` the other way round. If the network is no better, a gain is as
likely as a loss among those that changed, whatever their number (McNemar's test, exact: binomial). A level is *held*
if each of HOLD consecutive log points is better than the reference; its p-value is the largest of theirs, which needs
no correction (an intersection-union test). The search through the run for a stretch that is held is paid for by Simes'
correction, which is right for tests that depend on each other positively, and these share images and reference; the
search for the lowest stretch, where that is the reference, by Bonferroni's; and all statements about a run together by
Holm's. So with a probability of CONFIDENCE or more none of them is made of a curve that does not rise. All this is
about which images happened to be drawn: what this very network does to all images at one log step is no chance to the
test, even if it is gone at the next. That is what HOLD is for.
"""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from flags import epsilon_label

INTERPOLATION = 0.99  # training accuracy from which on the training set counts as fitted
HOLD = 3  # consecutive log points for which a level must last
CONFIDENCE = 0.95  # of the statement "no curve is called rising by sampling noise", for one run as a whole


def as_array(column):
    """A column of the history as floats; null becomes NaN."""
    return np.array(column, dtype=float)


def column_of(history, name):
    """A column of one number a log step as floats, NaN where the history does not have it."""
    return as_array(history.get(name) or [None] * len(history["step"]))


def last_value(values):
    finite = values[np.isfinite(values)]
    return finite[-1] if len(finite) else np.nan


def interpolation_index(train_acc):
    """Index of the first log point with training accuracy of at least 99%, or None."""
    reached = np.flatnonzero(as_array(train_acc) >= INTERPOLATION)
    return int(reached[0]) if len(reached) else None


def total_complexity(history, points="train", radius=None):
    """Local complexity around these points, summed over the layers (one value a log step, NaN where it is unknown).

    radius: a key of the history, by default its first.
    """
    radii = history.get("local_complexity", {}).get(points, {})
    radius = next(iter(radii), None) if radius is None else radius
    if radius not in radii:
        return np.full(len(history["step"]), np.nan)
    return np.array([np.nan if not layers or None in layers else sum(layers) for layers in radii[radius]], dtype=float)


class Curve(NamedTuple):
    """An accuracy at the log points of a run: fractions (NaN: unknown) of so many images, and which they were."""

    values: np.ndarray
    images: int
    outcomes: list | None = None  # for each log point bool (images,), or None where that is not known


def accuracy_curves(history):
    """{label: Curve} of test accuracy, robust_acc and adv_acc at each epsilon."""
    outcomes = history.get("outcomes", {})
    tested, attacked = (history["sizes"].get(name) or 1 for name in ("test", "attacked"))
    curves = {"test": Curve(column_of(history, "test_acc"), tested,
                            decoded(outcomes.get("test"), lambda text: from_hex(text, tested)))}
    robust = history.get("robust_acc", {})
    grid = sorted({0.0, *map(float, robust)})
    ranks = decoded(outcomes.get("robust"), lambda text: from_ranks(text, attacked))
    for key, values in robust.items():
        rank = grid.index(float(key))
        withstood = ranks and [None if row is None else row > rank for row in ranks]
        curves[f"robust ε {epsilon_label(key)}"] = Curve(as_array(values), attacked, withstood)
    for key, values in history.get("adv_acc", {}).items():
        right = decoded(outcomes.get("adv", {}).get(key), lambda text: from_hex(text, attacked))
        curves[f"adv ε {epsilon_label(key)}"] = Curve(as_array(values), attacked, right)
    return curves


def decoded(texts, decode):
    return texts and [None if text is None else decode(text) for text in texts]


def from_hex(text, images):
    """bool (images,) from the history's hexadecimal digits: one bit an image, the first in the highest."""
    if len(text) != -(-images // 4):
        raise ValueError(f"the history's outcomes are damaged: {len(text)} hexadecimal digits for {images} images")
    return np.unpackbits(np.frombuffer(bytes.fromhex(text + "0" * (len(text) % 2)), np.uint8), count=images) > 0


def from_ranks(text, images):
    """int (images,) from the history's characters: chr(48 + rank)."""
    if len(text) != images:
        raise ValueError(f"the history's outcomes are damaged: {len(text)} characters for {images} images")
    return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(int) - 48


class Rise(NamedTuple):
    """What an accuracy curve does after interpolation. Log points are given by index, None where there is none."""

    start: float  # value at interpolation
    final: float
    largest: float = np.nan  # largest later value
    level: float = np.nan  # highest later level that is held for HOLD log points
    lowest: float = np.nan  # lowest later level that is held
    half_at: int | None = None  # from here on the curve holds half of the rise from start to level
    lowest_at: int | None = None  # from here on it holds the lowest level
    recovery_at: int | None = None  # from here on it holds half of the rise from the lowest level
    recovered: float = np.nan  # highest level that is held after the lowest
    p: float = 1.0  # p-values: no level is held above start;
    p_recovery: float = 1.0  # none is held above the lowest one;
    p_once: float = 1.0  # no log point lies above start

    @property
    def half(self):
        """Index of the log point at which half of a rise is reached that is held and beyond noise, or None."""
        return self.half_at if self.p <= 1 - CONFIDENCE else None

    @property
    def recovery(self):
        """Index of the log point at which half of the recovery from a dip below start is reached, or None."""
        return self.recovery_at if self.p_recovery <= 1 - CONFIDENCE and self.lowest < self.start else None

    @property
    def dip(self):
        """The lowest later level that is held, NaN unless it lies below start."""
        return self.lowest if self.lowest < self.start else np.nan

    @property
    def brief(self):
        """Whether no rise is held, but a log point lies above start beyond noise."""
        return self.half is None and self.p_once <= 1 - CONFIDENCE


def delayed_rise(values, start, images, outcomes=None):
    """The Rise of one accuracy curve after the log point `start` (None: the training set was never fitted).

    values: fractions, NaN where unknown. images: on how many images they were measured. outcomes: for each log point
    which images were right, bool (images,); without them the log points are compared as if each had images of its own.

    The p-values are those of this curve alone; see rises_of for the curves of a run together.
    """
    curve = Curve(np.asarray(values, dtype=float), images, outcomes)
    known = np.flatnonzero(np.isfinite(curve.values))
    base = np.nan if start is None else curve.values[start]
    later = known[known > start] if np.isfinite(base) else known[:0]
    rise = Rise(base, last_value(curve.values))
    if not len(later):
        return rise
    hold = min(HOLD, len(later))
    stretches = sliding_window_view(curve.values[later], hold)
    held_above, held_below = stretches.min(axis=1), stretches.max(axis=1)

    def half_of(bottom, first=0):
        """Index of the log point from which on the curve holds half of what it rises from the bottom."""
        middle = (bottom + held_above[first:].max()) / 2 - 1e-9  # less than one image, more than rounding
        return int(later[first + np.argmax(held_above[first:] >= middle)])

    p = p_values(curve, [start], later)
    rise = rise._replace(largest=curve.values[later].max(), level=held_above.max(), half_at=half_of(base),
                         p=simes(sliding_window_view(p, hold).max(axis=1)), p_once=simes(p))
    foot = int(np.argmin(held_below))
    rise = rise._replace(lowest=held_below[foot], lowest_at=int(later[foot]))
    after = foot + hold
    if after + hold <= len(later):
        p = p_values(curve, later[foot:after], later[after:])
        p = min(1.0, len(held_below) * simes(sliding_window_view(p, hold).max(axis=1)))
        rise = rise._replace(recovered=held_above[after:].max(), recovery_at=half_of(rise.lowest, after), p_recovery=p)
    return rise


def p_values(curve, base, later):
    """For each of the log points `later` the p-value of "not better than each of the log points `base`"."""
    from scipy import stats  # here and below: it takes longer to import than the rest of a program's start

    right = curve.outcomes
    if not right or any(right[i] is None for i in (*base, *later)):
        return unpaired_p_values(curve, base, later)
    gains = np.array([[np.count_nonzero(right[t] & ~right[b]) for t in later] for b in base])
    losses = np.array([[np.count_nonzero(right[b] & ~right[t]) for t in later] for b in base])
    return stats.binom.sf(gains - 1, gains + losses, 0.5).max(axis=0)  # binomtest(gains, gains + losses), one-sided


def unpaired_p_values(curve, base, later):
    """p_values() for want of outcomes, as if each log point had images of its own.

    The Wilson intervals of the fractions a and b at z standard deviations touch where both end in the middle m,
    (b - m)^2 = z^2 m (1 - m) / images. To part like that, the difference of two independent fractions has to be
    sqrt(2) z of its own standard deviations.
    """
    from scipy import stats

    a, b = curve.values[base][:, None], curve.values[later]
    m = (a + b) / 2
    z = np.divide(b - m, np.sqrt(m * (1 - m) / curve.images), out=np.zeros_like(m), where=(m > 0) & (m < 1))
    return stats.norm.sf(np.sqrt(2) * z).max(axis=0)


def wilson_interval(fraction, images, confidence=CONFIDENCE):
    """(low, high): Wilson's score interval of a fraction of so many images (Wilson 1927)."""
    from scipy import stats

    return tuple(stats.binomtest(round(fraction * images), images).proportion_ci(confidence, method="wilson"))


def simes(p):
    """p-value of "all of these hypotheses are true" (Simes 1986), for tests that depend on each other positively."""
    from scipy import stats

    return float(stats.false_discovery_control(p).min())


def holm(p):
    """p-values corrected so that each can be held against the error rate of all together (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def rises_of(history):
    """{label: Rise} of every accuracy curve of a run, the p-values corrected for all of them together."""
    start = interpolation_index(history.get("train_acc", []))
    return corrected({label: delayed_rise(curve.values, start, curve.images, curve.outcomes)
                      for label, curve in accuracy_curves(history).items()})


def corrected(rises):
    """The rises of a run, their p-values corrected: those held and the recoveries together, the brief ones apart."""
    p = holm([rise.p for rise in rises.values()] + [rise.p_recovery for rise in rises.values()])
    once = holm([rise.p_once for rise in rises.values()])
    return {label: rise._replace(p=p[i], p_recovery=p[len(rises) + i], p_once=once[i])
            for i, (label, rise) in enumerate(rises.items())}


def pooled_rises(histories):
    """(steps, {label: Rise}) of runs that differ in their seed only, their images taken together.

    Each run is compared with its own interpolation, and gains and losses are summed over the runs. The indices of the
    rises are those of `steps`: the middle interpolation step, then the log steps that all runs have after theirs. Runs
    that have not come as far as the others, or did not fit their training set, are left out, and so are curves that
    not all runs have. Each run's images count as its own: where runs share images (all do in test accuracy), this
    takes what two networks learn of one image as independent.
    """
    end = max((history["step"][-1] for history in histories if history["step"]), default=0)
    starts = [interpolation_index(history.get("train_acc", [])) for history in histories]
    runs = [(history, start) for history, start in zip(histories, starts, strict=True)
            if start is not None and history["step"][-1] == end]
    if not runs:
        return [], {}
    common = sorted(set.intersection(*(set(history["step"][start + 1:]) for history, start in runs)))
    first = int(np.median([history["step"][start] for history, start in runs]))
    rows = [[start, *(history["step"].index(step) for step in common)] for history, start in runs]
    curves = [accuracy_curves(history) for history, _ in runs]
    labels = [label for label in curves[0] if all(label in run for run in curves)]
    return [first, *common], corrected({label: pooled_rise([run[label] for run in curves], rows) for label in labels})


def pooled_rise(curves, rows):
    """The Rise of several runs' Curves together, each at its rows: its interpolation, then the common log points."""
    images = [curve.images for curve in curves]
    values = [curve.values[i] for curve, i in zip(curves, rows, strict=True)]
    paired = all(curve.outcomes for curve in curves)
    joined = paired and [None if any(row is None for row in point) else np.concatenate(point)
                         for point in zip(*([curve.outcomes[k] for k in i]
                                            for curve, i in zip(curves, rows, strict=True)), strict=True)]
    return delayed_rise(np.average(values, axis=0, weights=images), 0, sum(images), joined or None)
