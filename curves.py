"""The numbers of a history: when the training set was fitted, what rises later and how surely, the phases of local
complexity, the outbreaks of the training loss; the summary of a run, the tables of many. Figures are in plot.py.

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

import json
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import runlog
from flags import epsilon_label, history_key

INTERPOLATION = 0.99  # training accuracy from which on the training set counts as fitted
HOLD = 3  # consecutive log points for which a level must last
CONFIDENCE = 0.95  # of the statement "no curve is called rising by sampling noise", for one run as a whole
OUTBREAK = 100  # factor by which the training loss rises in an outbreak
ROUNDING = 1e-9  # of a training loss: what lies below is no level to rise from
WIDTH = 80  # columns of the summary
# Flags that say where or how a run was computed, not what was trained or measured.
NOT_COMPARED = runlog.MAY_CHANGE | runlog.NO_FLAG_ANY_MORE | {"log_dir", "save_dir"}
# Flags that a figure shows without words, or that say how finely it was measured.
NOT_IN_TITLES = NOT_COMPARED | {"epsilons", "lc_radius", "adv_size", "lc_samples", "log_points", "log_interval", "seed"}


# ---- reading the columns --------------------------------------------------------------------------------------------

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


# ---- what rises after interpolation ---------------------------------------------------------------------------------

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


# ---- phases of local complexity -------------------------------------------------------------------------------------

def held(values):
    """The largest curve below `values` whose every level lasts for HOLD points; the first point has always lasted."""
    padded = np.pad(np.asarray(values, dtype=float), (HOLD - 1, 0), mode="edge")
    lows = np.pad(sliding_window_view(padded, HOLD).min(axis=1), HOLD - 1, constant_values=-np.inf)
    return sliding_window_view(lows, HOLD).max(axis=1)[HOLD - 1:]


def smoothed(values):
    """values without the peaks and dips shorter than HOLD points: first those within, then one at the end."""
    within = -held(-held(np.pad(values, (0, HOLD - 1), mode="edge")))[:len(values)]
    return -held(-held(within))


def turning_points(log, least, most=4):
    """Indices between which a curve rises and falls in turn, by at least `least` each time and at most `most` times.

    The smallest move is dropped until this is so. The first that is large enough stays: what follows a rise is not a
    first descent.
    """
    slopes = np.sign(np.diff(log))
    moving = np.flatnonzero(slopes)
    turns = moving[1:][slopes[moving][1:] != slopes[moving][:-1]]
    points = [0, *turns.tolist(), len(log) - 1]
    while len(points) > 1:
        moves = np.abs(np.diff(log[points]))
        enough = moves.min() >= least
        if enough and len(moves) <= most:
            return points
        weakest = int(np.argmin(moves[1:])) + 1 if enough else int(np.argmin(moves))
        if weakest == 0:
            del points[0]
        elif weakest == len(moves) - 1:
            del points[-1]
        else:
            del points[weakest:weakest + 2]  # the moves before and after become one
    return []


def without_plateaus(log, first, last):
    """The part of a descent or ascent from index first to last in which the curve moves."""
    near = min(0.15 * abs(log[last] - log[first]), np.log(1.1))
    part = log[first:last + 1]
    leaves = int(np.flatnonzero(abs(part - log[first]) <= near)[-1])
    arrives = leaves + int(np.flatnonzero(abs(part[leaves:] - log[last]) <= near)[0])
    return first + leaves, first + arrives


def phases(complexity):
    """[(name, first index, last index)] of the descents and ascents that a curve of local complexity goes through.

    complexity: one value a log point, finite, >= 0. Each phase is a change by a tenth and by five times the noise of
    the curve (from the second differences of its logarithm) whose level is held for HOLD log points; plateaus between
    phases belong to none. The paper's are "first descent", "ascent", "second descent", and a rise after them is a
    "second ascent"; where the curve rises first, they are "ascent", "descent", "second ascent", "second descent". The
    names speak of local complexity alone: whether anything else rises with it is another question.
    """
    complexity = np.asarray(complexity, dtype=float)
    if len(complexity) <= HOLD or complexity.max() <= 0:
        return []
    log = np.log(np.maximum(complexity, 0.02 * complexity.max()))
    noise = 1.4826 * np.median(np.abs(np.diff(log, 2))) / np.sqrt(6)
    log = smoothed(log)
    points = turning_points(log, max(np.log(1.1), 5 * noise))
    if not points:
        return []
    names = (("first descent", "ascent", "second descent", "second ascent") if log[points[1]] < log[points[0]] else
             ("ascent", "descent", "second ascent", "second descent"))
    return [(name, *without_plateaus(log, first, last))
            for name, first, last in zip(names, points, points[1:], strict=False)]


# ---- outbreaks of the training loss ---------------------------------------------------------------------------------

def outbreaks(history):
    """Indices i such that the training loss breaks out between the log points i - 1 and i, after interpolation.

    That is, it rises to OUTBREAK times the lowest value that it had at a log point since the last outbreak. Its peak
    between two log points is known from max_batch_loss: with a batch that makes up a share s of the training set, the
    loss of the whole set was at least s times that. Histories without that column show what is left of an outbreak at
    the next log point.
    """
    start = interpolation_index(history.get("train_acc", []))
    if start is None:
        return []
    loss = column_of(history, "train_loss")
    batch, images = history["config"].get("batch_size"), history["sizes"].get("train")
    share = min(1.0, batch / images) if batch and images else 1.0
    peak = np.fmax(loss, share * column_of(history, "max_batch_loss"))
    found, lowest = [], loss[start]
    for i in range(start + 1, len(loss)):
        if peak[i] >= OUTBREAK * max(lowest, ROUNDING):
            found.append(i)
            lowest = peak[i]
        lowest = np.fmin(lowest, loss[i])
    return found


# ---- what a run did, in words ---------------------------------------------------------------------------------------

def percent(value):
    return "-" if np.isnan(value) else f"{100 * value:.1f}%"


def factor(step, interpolation_step):
    return f"{step / interpolation_step:,.1f}x" if interpolation_step else "-"


def listing(words):
    *most, last = words  # a list of strings, or a dict's keys
    return f"{', '.join(most)} and {last}" if most else last


def summary(history):
    """Text for the end of a run: what generalised or became robust late, what local complexity and the loss did.

    history: dict of the history file (see README). The lines are made for 80 columns and stay within 100.
    """
    if not history["step"]:
        return "no log step yet"
    rises = rises_of(history)
    lines = [fitting_text(history), *accuracy_texts(history, rises), complexity_text(history), *outbreak_texts(history)]
    lines = [textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines if line]
    return "\n".join([*lines, "", *accuracy_table(history, rises), "",
                      *(textwrap.fill(note, WIDTH) for note in notes(history))])


def fitting_text(history):
    start, last = interpolation_index(history.get("train_acc", [])), history["step"][-1]
    planned = max(last, history["config"].get("n_steps") or 0)
    end = f"ends at step {last:,}" if last == planned else f"has come to step {last:,} of {planned:,}"
    if start is not None:
        return f"Interpolation: train accuracy reaches 99% at step {history['step'][start]:,} (the run {end})."
    return (f"Interpolation: train accuracy does not reach 99% within {last:,} steps, it is "
            f"{percent(last_value(column_of(history, 'train_acc')))} (the run {end}); so there is no delay to measure.")


def accuracy_texts(history, rises):
    """Sentences on delayed generalisation, on delayed robustness, and on what of the latter may be numerical."""
    steps, start = history["step"], interpolation_index(history.get("train_acc", []))
    test = rises["test"]
    reached = np.flatnonzero(column_of(history, "test_acc") >= 0.95 * test.final)
    settled = (f"test accuracy reaches 95% of its final value ({percent(test.final)}) at step {steps[reached[0]]:,}"
               if len(reached) else "test accuracy is unknown")
    if start is None:
        return [settled[0].upper() + settled[1:] + "."]
    late = len(reached) > 0 and reached[0] > start and test.half is not None
    return [f"Delayed generalisation: {'seen' if late else 'not seen'}; {settled} and is {percent(test.start)} at "
            "interpolation.", robustness_text(rises, steps, start), numerical_text(rises)]


def robustness_text(rises, steps, start):
    robust = of_measure("robust", rises)
    if not robust:
        return ""
    rising = {epsilon: rise.half for epsilon, rise in robust.items() if rise.half is not None}
    text = ("Delayed robustness: not seen; robust accuracy holds no level above its value at interpolation for "
            f"{HOLD} log points.")
    if rising:
        halves = list(rising.values())
        later = ", the later the larger ε" if halves == sorted(halves) and halves[0] < halves[-1] else ""
        first, last = (factor(steps[half], steps[start]) for half in (min(halves), max(halves)))
        text = (f"Delayed robustness: seen; after interpolation robust accuracy rises at ε {listing(rising)}. Half of "
                f"the rise is reached at {first if first == last else f'{first} to {last}'} the step of "
                f"interpolation{later}.")
    briefly = [epsilon for epsilon, rise in robust.items() if rise.brief]
    dipped = [epsilon for epsilon, rise in robust.items() if rise.half is None and rise.recovery is not None]
    return (text + (f" At ε {listing(briefly)} it lies above it for less." if briefly else "")
            + (f" At ε {listing(dipped)} it falls after interpolation and recovers." if dipped else ""))


def numerical_text(rises):
    robust, adv = of_measure("robust", rises), of_measure("adv", rises)
    numerical = [epsilon for epsilon, rise in adv.items()
                 if rise.half is not None and epsilon in robust and robust[epsilon].half is None]
    return numerical and (f"Numerical: at ε {listing(numerical)} adv rises and robust does not. PGD on cross-entropy "
                          "finds fewer attacks there; that can be rounding (a softmax of exactly 1), not robustness.")


def of_measure(measure, rises):
    """{epsilon: Rise} of the curves of "robust" or "adv"."""
    return {label.removeprefix(f"{measure} ε "): rise for label, rise in rises.items() if label.startswith(measure)}


def complexity_text(history):
    total = total_complexity(history)
    known = np.flatnonzero(np.isfinite(total))
    if not len(known):
        return ""
    steps, total = np.array(history["step"])[known], total[known]
    found, level = phases(total), smoothed(total)
    words = []
    for i, (name, first, last) in enumerate(found):
        end = found[i + 1][1] if i + 1 < len(found) else len(level)
        highest, lowest = (np.max, np.min) if name.endswith("ascent") else (np.min, np.max)
        start = f" from {lowest(level[:first + 1]):.2f}" if i == 0 else ""
        words.append(f"{name}{start} to {highest(level[first:end + 1]):.2f} by step {steps[last]:,}")
    text = ", ".join(words) or f"no phases, it stays between {total.min():.2f} and {total.max():.2f}"
    return f"Local complexity (training points, r = {next(iter(history['local_complexity']['train']))}): {text}."


def outbreak_texts(history):
    """Sentences on the outbreaks of the training loss, and on what the first three of them changed."""
    start = interpolation_index(history.get("train_acc", []))
    if start is None or not np.isfinite(column_of(history, "train_loss")[start:]).any():
        return []
    found = outbreaks(history)
    if not found:
        return [f"Training loss: no outbreak after interpolation (it never rises to {OUTBREAK} times its level)."]
    number = f"{len(found)} outbreaks" if len(found) > 1 else "1 outbreak"
    return [f"Training loss: {number} after interpolation (it rises to {OUTBREAK} times its level or more)"
            + (", the first three:" if len(found) > 3 else ":"), *(outbreak_text(history, i) for i in found[:3])]


def outbreak_text(history, i):
    """What an outbreak between the log points i - 1 and i changed, from the one to the other."""
    peak = column_of(history, "max_batch_loss")[i]
    changes = {f"loss {{}} to {{}}{'' if np.isnan(peak) else f' (up to {peak:.1e} in a batch)'}":
               [f"{value:.1e}" for value in column_of(history, "train_loss")[i - 1:i + 1]],
               "weight norm {} to {}": [f"{value:.1f}" for value in column_of(history, "weight_norm")[i - 1:i + 1]],
               "local complexity {} to {}": [f"{value:.2f}" for value in total_complexity(history)[i - 1:i + 1]],
               "test accuracy {} to {}": [percent(value) for value in column_of(history, "test_acc")[i - 1:i + 1]]}
    known = [form.format(*values) for form, values in changes.items() if not {"nan", "-"} & set(values)]
    return f"  Step {history['step'][i - 1]:,} to {history['step'][i]:,}: {', '.join(known)}."


def accuracy_table(history, rises):
    """Lines: each accuracy at interpolation, in the dip after it, at its highest later, at the end; and a verdict."""
    steps, start = history["step"], interpolation_index(history.get("train_acc", []))
    width = max(16, *map(len, rises))
    if start is None:
        return [f"{'accuracy':<{width}}{'end':>8}",
                *(f"{label:<{width}}{percent(rise.final):>8}" for label, rise in rises.items())]
    lines = [f"{'accuracy':<{width}}{'at 99%':>8}{'dip':>8}{'highest':>8}{'end':>8}  after interpolation"]
    for label, rise in rises.items():
        cells = "".join(f"{percent(value):>8}" for value in (rise.start, rise.dip, rise.level, rise.final))
        lines.append(f"{label:<{width}}{cells}  {verdict(rise, steps, steps[start])}")
    return lines


def verdict(rise, steps, interpolation_step):
    if np.isnan(rise.largest):
        return "-"
    if rise.half is not None:
        return f"half by step {steps[rise.half]:,}, {factor(steps[rise.half], interpolation_step)}"
    if rise.recovery is not None:
        return f"dips, recovers by step {steps[rise.recovery]:,}"
    if rise.brief:
        return "rises at the end, not held" if rise.final > (rise.start + rise.largest) / 2 else "rises, not held"
    return "no delayed rise"


def notes(history):
    images = history["sizes"].get("attacked") or history["sizes"].get("test") or 1
    low, high = wilson_interval(0.5, images)
    how = ("image by image (exact McNemar test" if any(history.get("outcomes", {}).values()) else
           "as if on new images (Wilson scores")
    return ["robust: right, and no attack on the exact objective succeeds. adv: right after PGD on cross-entropy as "
            "computed. at 99%: at interpolation. dip, highest: the lowest later level, if it is lower, and the "
            f"highest, held for {HOLD} log points. half: of the rise to highest; 1.5x: at 1.5 times the step of "
            "interpolation.",
            f"A rise or recovery counts if it is held and no chance of the images, compared {how}; with "
            f"{CONFIDENCE:.0%} confidence this is right for all lines together). Measured on {images:,} images, 50.0% "
            f"means {percent(low)} to {percent(high)}."]


# ---- names and titles -----------------------------------------------------------------------------------------------

def asked(history):
    """Names of the flags that the user gave; of an older history, which does not say, all."""
    return history.get("asked", list(history["config"]))


def differing_flags(histories, also_same=()):
    """Names of the flags that the user chose and in which the runs differ, places and the like aside."""
    names = dict.fromkeys(name for history in histories for name in asked(history))
    return [name for name in names if name not in NOT_COMPARED and name not in also_same
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


# ---- several runs ---------------------------------------------------------------------------------------------------

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


def middle_epsilon(history):
    """The label of the middle epsilon of a run's grid, or None."""
    labels = [epsilon_label(key) for key in history.get("robust_acc", {})]
    return labels[(len(labels) - 1) // 2] if labels else None


def table_row(history):
    """The cells of one run that do not depend on the other runs."""
    if not history["step"]:
        return ["0"] + ["-"] * 12
    steps, start, rises = history["step"], interpolation_index(history.get("train_acc", [])), rises_of(history)
    row = [f"{steps[-1]:,}", percent(last_value(column_of(history, "train_acc"))),
           percent(rises["test"].final), "-" if start is None else f"{steps[start]:,}"]
    epsilon = middle_epsilon(history)
    row.append(epsilon or "-")
    for measure in ("robust", "adv"):
        rise = rises.get(f"{measure} ε {epsilon}", Rise(np.nan, np.nan))
        delay = "-" if np.isnan(rise.largest) else "brief" if rise.brief else "none"
        row += [percent(rise.start), percent(rise.final),
                delay if rise.half is None else factor(steps[rise.half], steps[start])]
    totals = total_complexity(history)
    totals = totals[np.isfinite(totals)]
    return row + ([f"{min(totals):.2f}", f"{max(totals):.2f}"] if len(totals) else ["-", "-"])


def table(histories, names=None):
    """Text: one line a run, with the flags in which the runs differ.

    names: what to call each run, by default config["log_dir"]. Robust and adversarial accuracy are those of the middle
    epsilon of each run's grid, at interpolation and at the end; local complexity is the sum over the layers around
    training points at the first radius, its lowest and highest value in the run.
    """
    names = names or short_names([history["config"].get("log_dir", "-") for history in histories])
    flags = differing_flags(histories)
    rows = [["run", *flags, "steps", "train", "test", "99% at", "ε", "robust", "end", "delay", "adv", "end", "delay",
             "LC min", "max"]]
    rows += [[name, *(flag_text(flag, history["config"].get(flag)) for flag in flags), *table_row(history)]
             for name, history in zip(names, histories, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def markdown_table(histories, names=None, epsilon=None):
    """Markdown: one row a configuration, runs that differ in their seed only together, for results/README.md.

    names: what to call each run; a row has the name of its first. epsilon: a key of robust_acc, by default the middle
    one of each grid. "then" is the step of interpolation; dip and highest are the lowest later level, if it is lower,
    and the highest, held for HOLD log points. Of several seeds: mean (lowest to highest), and rises tested on all
    their images together.
    """
    names = names or short_names([history["config"].get("log_dir", "-") for history in histories])
    name_of = {id(history): name for history, name in zip(histories, names, strict=True)}
    groups, _ = grouped([history for history in histories if history["step"]])
    usual = usual_flags(histories)
    rows = [["run", "flags", "training 99% at step", "test accuracy then", "at the end", "ε",
             "`robust_acc` then", "dip", "highest later", "half of the rise by step",
             "`adv_acc` then", "highest later", "half of the rise by step"]]
    rows.append(["---"] * len(rows[0]))
    for group in groups:
        seeds = f" ({len(group)} seeds)" if len(group) > 1 else ""
        rows.append([name_of[id(group[0])] + seeds, chosen_flags(group, usual), *markdown_cells(group, epsilon)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown_cells(group, epsilon=None):
    """What the runs of one configuration did, as the cells of markdown_table."""
    label = epsilon_label(epsilon) if epsilon else middle_epsilon(group[0])
    starts = [interpolation_index(history.get("train_acc", [])) for history in group]
    fitted = [history["step"][start] for history, start in zip(group, starts, strict=True) if start is not None]
    runs, (steps, pooled) = [rises_of(history) for history in group], pooled_rises(group)

    def cells(curve, *fields):
        return [spread_text([getattr(run[curve], field) for run in runs if curve in run]) for field in fields]

    def rise(curve):
        found = pooled.get(curve, Rise(np.nan, np.nan))
        if found.half is not None:
            return f"{steps[found.half]:,} ({factor(steps[found.half], steps[0])})"
        return f"out of the dip: {steps[found.recovery]:,}" if found.recovery is not None else "-"

    robust, adv = f"robust ε {label}", f"adv ε {label}"
    return [spread_text(fitted, "{:,.0f}"), *cells("test", "start", "final"), label or "-",
            *cells(robust, "start", "dip", "level"), rise(robust), *cells(adv, "start", "level"), rise(adv)]


def usual_flags(histories):
    """{flag: the JSON of its most frequent value}."""
    values = {}
    for history in histories:
        for flag, value in history["config"].items():
            values.setdefault(flag, []).append(json.dumps(value))
    return {flag: max(texts, key=texts.count) for flag, texts in values.items()}


def chosen_flags(group, usual):
    """The flags that the user chose for these runs, as they are written, or '-'.

    Where a history does not say which they are: those that have not their usual value.
    """
    config = group[0]["config"]
    names = group[0].get("asked", [flag for flag, value in config.items() if json.dumps(value) != usual[flag]])
    aside = NOT_COMPARED - {"n_steps", "n_epochs"} | ({"seed"} if len(group) > 1 else set())
    text = command_flags(config, [name for name in names if name not in aside])
    return f"`{text}`" if text else "-"


def command_flags(config, names):
    """These flags as one writes them: '--depth=2 --batch_norm'."""
    given = {name: config[name] for name in names if not (config.get(name) is None or config[name] is False)}
    return " ".join(f"--{name}" if value is True else f"--{name}={flag_text(name, value, between=',')}"
                    for name, value in given.items())


def spread_text(values, form="{:.1%}"):
    """'15.9%' of one value or equal ones, '17.4% (15.9% to 20.3%)' of several, '-' of none."""
    values = [value for value in values if np.isfinite(value)]
    if not values:
        return "-"
    low, mean, high = (form.format(value) for value in (min(values), np.mean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"
