"""The phases of local complexity, and the spikes of the training loss."""

from typing import Any

import numpy as np

from analysis.statistics import HOLD, column_of, interpolation_of
from records.history import History

SPIKE = 100  # factor by which the training loss rises in a spike
NO_LOSS = 1e-9  # training losses below this are treated as equal
TENTH = float(np.log(1.1))


def held(values: Any) -> np.ndarray:
    """Return the largest curve below `values` whose every level lasts for HOLD points; the first may be shorter."""
    from scipy import ndimage

    padded = np.pad(np.asarray(values, dtype=float), (HOLD - 1, 0), mode="edge")
    return ndimage.grey_opening(padded, HOLD, mode="constant", cval=-np.inf)[HOLD - 1:]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return values without peaks and dips shorter than HOLD points: first those within, then one at the end."""
    within = -held(-held(np.pad(values, (0, HOLD - 1), mode="edge")))[:len(values)]
    return -held(-held(within))


def turning_points(log: np.ndarray, least: float, most: int = 4) -> list[int]:
    """Return indices between which a curve rises and falls in turn: `most` moves or fewer, each of `least` or more.

    The smallest move is dropped until this holds. The first move that is large enough stays: what follows a rise is
    not a first descent.
    """
    moving = np.flatnonzero(np.diff(log))
    slopes = np.sign(np.diff(log))[moving]
    points = [0, *moving[1:][slopes[1:] != slopes[:-1]].tolist(), len(log) - 1]
    while len(points) > 1:
        moves = np.abs(np.diff(log[points]))
        enough = moves.min() >= least
        if enough and len(moves) <= most:
            break
        weakest = int(np.argmin(moves[1:])) + 1 if enough else int(np.argmin(moves))
        if weakest == 0:
            del points[0]
        elif weakest == len(moves) - 1:
            del points[-1]
        else:
            del points[weakest:weakest + 2]  # the moves before and after become one
    return points


def plateau(log: np.ndarray, first: int, last: int) -> float:
    """Return how far from its ends a descent or ascent from index first to last still counts as a plateau."""
    return min(0.15 * abs(log[last] - log[first]), TENTH)


def without_plateaus(log: np.ndarray, first: int, last: int) -> tuple[int, int]:
    """Return the part of a descent or ascent from index first to last in which the curve moves."""
    near = plateau(log, first, last)
    leaves = first + int(np.flatnonzero(abs(log[first:last + 1] - log[first]) <= near)[-1])
    return leaves, leaves + int(np.flatnonzero(abs(log[leaves:last + 1] - log[last]) <= near)[0])


def phases(complexity: Any) -> list[tuple[str, int, int]]:
    """Return [(name, first index, last index)] of the descents and ascents of a curve of local complexity.

    complexity: one value for each log point, finite, >= 0. Each phase is a change by a tenth or more and by five times
    the curve's noise (estimated from the second differences of its logarithm) whose level is held for HOLD log points.
    Plateaus between phases belong to none. A last phase that still goes on reaches to the last log point. The paper's
    phases are "first descent", "ascent" and "second descent"; a "second ascent" may follow. Where the curve rises
    first, they are "ascent", "descent", "second ascent", "second descent".
    """
    complexity = np.asarray(complexity, dtype=float)
    if len(complexity) <= HOLD or complexity.max() <= 0:
        return []
    measured = np.log(np.maximum(complexity, 0.02 * complexity.max()))
    noise = 1.4826 * np.median(np.abs(np.diff(measured, 2))) / np.sqrt(6)
    log = smoothed(measured)
    points = turning_points(log, max(TENTH, 5 * noise))
    names = ("first descent", "ascent", "second descent", "second ascent")
    if len(points) > 1 and log[points[1]] > log[points[0]]:
        names = ("ascent", "descent", "second ascent", "second descent")
    found = [(name, *without_plateaus(log, first, last))
             for name, first, last in zip(names, points, points[1:], strict=False)]
    if len(found) == len(points) - 1 > 0 and points[-1] == len(log) - 1:
        name, first, last = found[-1]
        beyond = (measured[-1] - log[-1]) * np.sign(log[-1] - log[first])
        if beyond > plateau(log, points[-2], points[-1]):
            found[-1] = name, first, len(log) - 1
    return found


def spikes(history: History) -> list[int]:
    """Return the indices i such that the training loss has a spike between log points i - 1 and i, after interpolation.

    That is, it rises to SPIKE times its lowest value at a log point since the last spike. Its peak between log points
    is known from max_batch_loss: if a batch is a share s of the training set, the loss of the whole set was at least s
    times the batch's. Losses before and after a branch changed the loss function (older branches do not say whether
    they did) are not compared.
    """
    start = interpolation_of(history)
    if start is None:
        return []
    loss, branch = column_of(history, "train_loss"), history.get("branch")
    changed = branch.get("loss_changed", [branch["step"]]) if branch else []
    part = min(1.0, history["config"]["batch_size"] / history["sizes"]["train"])
    peak = np.fmax(loss, part * column_of(history, "max_batch_loss"))
    found, lowest = [], loss[start]
    for i in range(start + 1, len(loss)):
        if any(history["step"][i - 1] <= step < history["step"][i] for step in changed):
            lowest = np.inf
        if peak[i] >= SPIKE * max(lowest, NO_LOSS):
            found.append(i)
            lowest = peak[i]
        lowest = np.fmin(lowest, loss[i])
    return found
