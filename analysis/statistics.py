"""When a training set was fitted, and which accuracies rise after that beyond chance.

One criterion for every curve: a level counts if each of HOLD consecutive log points is better than the reference beyond
chance, and if it is higher by LEAST or more. The same images are attacked at every log step, so two log points are
compared image by image: `gains` were wrong and are now right, `losses` the reverse. If the network is not better, the
number of gains is at most binomial with probability 1/2: the exact one-sided sign test (McNemar's). The p-value of a
stretch is the largest of its points'. Bonferroni's correction multiplies it by all that was searched in this run: the
stretches (for a recovery those before it, too), the curves, and QUESTIONS. So with a probability of CONFIDENCE no
statement about a run is due to the choice of test images. This says nothing of chance in training.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from flags import epsilon_label, history_key
from records.history import History

INTERPOLATION = 0.99  # training accuracy from which on the training set counts as fitted
HOLD = 3  # consecutive log points for which a level must last
# By how much a level must be higher. With 10,000 test images a rise by 0.9 points is beyond chance, while the test
# accuracies of four seeds of the MNIST MLP are 1.1 points apart at interpolation and 1.4 at the end (results/mnist*).
LEAST = 0.02
CONFIDENCE = 0.95  # that no statement about a run is due to the choice of test images
stretches = functools.partial(sliding_window_view, window_shape=HOLD)  # every HOLD consecutive values
QUESTIONS = 3  # for each curve: does it rise, does it recover from a dip, does it rise at any log point at all


def column_of(history: History, name: str, key: str | None = None) -> np.ndarray:
    """Return a column of one number for each log step, or its part for the epsilon `key`, as floats; NaN where the
    history does not have it."""
    column = cast(dict, history).get(name)
    column = column if key is None else (column or {}).get(key)
    return np.array(column or [None] * len(history["step"]), dtype=float)


def interpolation_of(history: History) -> int | None:
    """Return the index of the log point of interpolation_step(), None if there is none there."""
    step, steps = interpolation_step(history), list(history["step"])
    return steps.index(step) if step in steps else None


def interpolation_step(history: History) -> int | None:
    """Return the first log step with a training accuracy of at least 99%, None if there is none or it is not known.

    Checkpoints measured again have it from their run's own history, as history["interpolation"]. Older programs did not
    write that: then the first step is not it, unless it is step 0.
    """
    if "interpolation" in history:
        return history["interpolation"]
    reached = np.flatnonzero(column_of(history, "train_acc") >= INTERPOLATION)
    known = len(reached) and (reached[0] > 0 or history["step"][0] == 0)
    return int(history["step"][reached[0]]) if known else None


def main_radius(history: History) -> str:
    """Return the key of the first radius of a run's own, "" if it has none; a branch also has its parent's."""
    keys = [*history["local_complexity"].get("train", {})]
    own = map(history_key, history["config"].get("lc_radius", ()))
    return next((key for key in own if key in keys), keys[0] if keys else "")


def complexity_of(history: History, points: str = "train", radius: str | None = None) -> np.ndarray:
    """Return local complexity, (log points, layers), with NaN where it is unknown.

    points: "train", "test" or "random". radius: a key of the history, by default main_radius().
    """
    radii = history["local_complexity"].get(points, {})
    entries = radii.get(radius or main_radius(history)) or [None] * len(history["step"])
    layers = max((len(entry) for entry in entries if entry), default=1)
    return np.array([entry or [np.nan] * layers for entry in entries], dtype=float).reshape(-1, layers)


def total_complexity(history: History, points: str = "train", radius: str | None = None) -> np.ndarray:
    """Return local complexity summed over the layers: one value for each log point."""
    return complexity_of(history, points, radius).sum(axis=1)


class Curve(NamedTuple):
    """An accuracy at the log points of a run."""

    values: np.ndarray  # fractions, NaN where unknown
    outcomes: Sequence[Any]  # for each log point which images were right, bool (images,), None where unknown


def own_epsilons(history: History) -> list[str]:
    """Return the keys of the epsilons of a run's own grid, which its outcomes are on; a branch also has columns for its
    parent's."""
    return [*map(history_key, history["config"].get("epsilons", ()))] or [*history["robust_acc"]]


def accuracy_curves(history: History) -> dict[str, Curve]:
    """Return {label: Curve} of test accuracy, and of robust_acc and adv_acc at each epsilon."""
    outcomes, unknown = history.get("outcomes", {}), [None] * len(history["step"])

    def right(texts: Sequence | None, images: str) -> list[np.ndarray | None]:
        # Hexadecimal digits: one bit for each image, the first in the highest.
        return [text and np.unpackbits(np.frombuffer(bytes.fromhex(text + "0" * (len(text) % 2)), np.uint8),
                                       count=history["sizes"][images]).astype(bool) for text in texts or unknown]

    curves = {"test": Curve(column_of(history, "test_acc"), right(outcomes.get("test"), "test"))}
    own = own_epsilons(history)
    grid = sorted({0.0, *map(float, own)})
    ranks = [text and np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in outcomes.get("robust") or unknown]
    for key in history["robust_acc"]:
        withstood = ord("0") + grid.index(float(key)) if key in own else None  # the code of "0" plus the rank
        curves[f"robust ε {epsilon_label(key)}"] = Curve(column_of(history, "robust_acc", key), [
            None if codes is None or withstood is None else codes > withstood for codes in ranks])
    for key in history["adv_acc"]:
        curves[f"adv ε {epsilon_label(key)}"] = Curve(column_of(history, "adv_acc", key),
                                                      right(outcomes.get("adv", {}).get(key), "attacked"))
    return curves


class Rise(NamedTuple):
    """What an accuracy curve does after interpolation. Log points are given by index, None where there is none."""

    start: float  # value at interpolation
    final: float  # value at the last log point
    compared: int = 0  # how many later log points could be compared with interpolation, image by image
    largest: float = np.nan  # largest later value
    level: float = np.nan  # highest later level that is held for HOLD log points
    dip: float = np.nan  # lowest later level that is held, NaN unless below start and not above level
    half: int | None = None  # from here on the curve holds half of the rise to level, if that rise counts
    recovery: int | None = None  # from here on it holds half of the way out of the dip, if that recovery counts
    brief: bool = False  # whether no rise counts, but a single log point is high enough and beyond chance


def delayed_rise(curve: Curve, start: int | None, statements: int = 1) -> Rise:
    """Return the Rise of one curve after the log point `start` (None: the training set was never fitted).

    Log points whose outcomes are unknown are passed over. statements: how many are made about the run, for which the
    p-values are corrected as for the search within this curve.
    """
    rise = Rise(np.nan if start is None else curve.values[start], curve.values[-1])
    known = [i for i, right in enumerate(curve.outcomes) if right is not None and np.isfinite(curve.values[i])]
    later = [i for i in known if start is not None and i > start]
    if start not in known or not later:
        return rise
    values, right = curve.values[later], np.stack([curve.outcomes[i] for i in later])
    p_points = p_values(curve.outcomes[start][None], right)
    rise = rise._replace(compared=len(later), largest=values.max(),
                         brief=one_counts(statements * len(later) * p_points, values - rise.start))
    if len(later) < HOLD:
        return rise

    # A stretch is HOLD consecutive log points: its floor is the level that it holds from below, its ceiling from above.
    floors, ceilings = stretches(values).min(axis=1), stretches(values).max(axis=1)
    foot, n = int(np.argmin(ceilings)), len(floors)
    rise = rise._replace(level=floors.max())
    if one_counts(statements * n * stretches(p_points).max(axis=1), floors - rise.start):
        rise = rise._replace(half=later[first_half(floors, rise.start)], brief=False)
    if ceilings[foot] < rise.start:
        rise = rise._replace(dip=ceilings[foot])
        after = foot + HOLD  # the first stretch that begins when the lowest one is over
        floors = floors[after:]
        if len(floors):
            p_stretches = stretches(p_values(right[foot:after], right[after:])).max(axis=1)
            if one_counts(statements * n * len(floors) * p_stretches, floors - rise.dip):
                rise = rise._replace(recovery=later[after + first_half(floors, rise.dip)])
    return rise


def one_counts(p: np.ndarray, heights: np.ndarray) -> bool:
    """Return whether one of the rises with these corrected p-values and heights is beyond chance and high enough."""
    return bool(np.any((p <= 1 - CONFIDENCE) & (heights >= LEAST - 1e-9)))


def first_half(floors: np.ndarray, bottom: float) -> int:
    """Return the index of the first of these levels in the upper half between bottom and the highest of them."""
    middle = (bottom + floors.max()) / 2 - 1e-9  # less than one image, more than rounding
    return int(np.argmax(floors >= middle))


def p_values(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return for each row of `after` the p-value of "not better than each row of `before`" (bool, rows of images)."""
    from scipy import stats  # it takes longer to import than the rest of a program's start

    gains = (~before).astype(np.float32) @ after.T.astype(np.float32)  # exact up to 16 million images
    losses = before.astype(np.float32) @ (~after).T.astype(np.float32)
    return stats.binom.sf(gains - 1, gains + losses, 0.5).max(axis=0)


def rises_of(history: History) -> dict[str, Rise]:
    """Return {label: Rise} of every accuracy curve of a run, the p-values corrected for all of them together."""
    curves, start = accuracy_curves(history), interpolation_of(history)
    return {label: delayed_rise(curve, start, QUESTIONS * len(curves)) for label, curve in curves.items()}
