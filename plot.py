"""Figures and the delay in numbers, from the history files that train.py writes.

    python plot.py                                          # logs/training_history.json -> .png and .svg beside it
    python plot.py runs/*/logs/training_history.json        # a sweep in one figure; seeds become mean and range
    python plot.py --summary                                # where each curve rises after interpolation
    python plot.py --table runs/*/logs/training_history.json
    python plot.py --partition checkpoints/checkpoint_epoch_0.pt checkpoints/checkpoint_epoch_1000.pt
"""

import argparse
import io
import json
import os
import sys
import textwrap
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

import runlog
from flags import OneLineParser, epsilon_label

INTERPOLATION = 0.99  # training accuracy from which on the training set counts as fitted
HOLD = 3  # consecutive log points for which a rise must last
CONFIDENCE = 0.95  # of the statement "no curve is called rising by sampling noise", for one run as a whole
COLUMNS = {"train_acc": list, "test_acc": list, "adv_acc": dict, "robust_acc": dict, "local_complexity": dict}
SIZES = {"train": int, "test": int, "attacked": int}
# Flags that say where or how a run was computed, not what was trained or measured.
NOT_COMPARED = runlog.MAY_CHANGE | {"log_dir", "save_dir"}

TRAIN, TEST, RANDOM = "black", "#D55E00", "#0072B2"  # Okabe and Ito's colours: told apart by colour-blind readers
SMALL = 7.5  # points; the smallest text
DPI = 200
STRIP = 0.9  # of a panel's height: above it are the names of the phases, below it the curves


# ---------------------------------------------------------------------------------------------- reading the columns

def as_array(column):
    """A column of the history as floats; null becomes NaN."""
    return np.array(column, dtype=float)


def accuracy_curves(history):
    """[(label, values, number of images)] of test, robust_acc and adv_acc at each epsilon."""
    sizes = history["sizes"]
    curves = [("test", as_array(history["test_acc"]), sizes["test"])]
    for measure in ("robust", "adv"):
        for key, values in history[f"{measure}_acc"].items():
            curves.append((f"{measure} ε {epsilon_label(key)}", as_array(values), sizes["attacked"]))
    return curves


def last_value(values):
    finite = values[np.isfinite(values)]
    return finite[-1] if len(finite) else np.nan


def interpolation_index(train_acc):
    """Index of the first log point with training accuracy of at least 99%, or None."""
    reached = np.flatnonzero(as_array(train_acc) >= INTERPOLATION)
    return int(reached[0]) if len(reached) else None


def differing_flags(histories, also_same=()):
    """Names of the flags in which the runs' configurations differ, places and the like aside."""
    names = dict.fromkeys(name for history in histories for name in history["config"])
    return [name for name in names if name not in NOT_COMPARED and name not in also_same
            and len({json.dumps(history["config"].get(name)) for history in histories}) > 1]


def flag_text(value):
    if isinstance(value, list):
        return " ".join(map(flag_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------ the delay in numbers

def wilson_interval(fraction, images, confidence=CONFIDENCE):
    """(low, high): Wilson's score interval of a proportion measured on so many images (Wilson 1927)."""
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2 / images
    centre = (fraction + z2 / 2) / (1 + z2)
    half = np.sqrt(z2 * (fraction * (1 - fraction) + z2 / 4)) / (1 + z2)
    return centre - half, centre + half


class Rise(NamedTuple):
    start: float  # value at interpolation
    largest: float  # largest later value
    final: float
    half: int | None = None  # index of the log point at which half of the later rise is reached; None: no delayed rise
    brief: bool = False  # none, but a log point that sampling noise does not explain


def delayed_rise(values, start, images, confidence=CONFIDENCE):
    """What an accuracy curve does after the log point `start` (None: the training set was never fitted): a Rise.

    values: fractions, NaN where unknown. images: on how many images they were measured.

    The largest of many noisy values always lies above the first one. So a rise counts only if a level is *held*, that
    is, if the lowest of HOLD consecutive log points has a Wilson interval wholly above the interval at `start`; and
    half of the rise is reached where the next log point is still above that half. The caller divides the error rate
    1 - confidence among the curves that it looks at; to tell whether a value that is not held is more than noise, it is
    here divided among the log points, too.
    """
    known = np.flatnonzero(np.isfinite(values))
    final = values[known[-1]] if len(known) else np.nan
    base = np.nan if start is None else values[start]
    points = known[known > start] if np.isfinite(base) else known[:0]
    if not len(points):
        return Rise(base, np.nan, final)
    later = values[points]
    held = np.lib.stride_tricks.sliding_window_view(later, min(HOLD, len(later))).min(axis=1).max()

    def beyond_noise(level, confidence):
        return wilson_interval(level, images, confidence)[0] > wilson_interval(base, images, confidence)[1]

    if not beyond_noise(held, confidence):
        return Rise(base, later.max(), final, brief=beyond_noise(later.max(), 1 - (1 - confidence) / len(later)))
    above = later >= base + (later.max() - base) / 2 - 1e-9  # less than one image, more than rounding
    stays = above & np.append(above[1:], True)
    return Rise(base, later.max(), final, int(points[np.argmax(stays if stays.any() else above)]))


def rises_of(history):
    """{label: Rise} of every accuracy curve; the confidence holds for all of them together (Bonferroni)."""
    start = interpolation_index(history["train_acc"])
    curves = accuracy_curves(history)
    confidence = 1 - (1 - CONFIDENCE) / len(curves)
    return {label: delayed_rise(values, start, images, confidence) for label, values, images in curves}


def percent(value):
    return "-" if np.isnan(value) else f"{100 * value:.1f}%"


def factor(step, interpolation_step):
    return f"{step / interpolation_step:,.1f}x" if interpolation_step else "-"


def summary(history):
    """Text: when the training set was fitted, and what test, robust and adversarial accuracy did afterwards.

    history: dict of the history file (see README). Each line fits into 100 columns.
    """
    steps, sizes = history["step"], history["sizes"]
    if not steps:
        return "no log step yet"
    start, rises = interpolation_index(history["train_acc"]), rises_of(history)
    final_test = rises["test"].final
    reached = np.flatnonzero(as_array(history["test_acc"]) >= 0.95 * final_test)
    test_line = (f"test accuracy reaches 95% of its final value ({percent(final_test)}) at step {steps[reached[0]]:,}"
                 if len(reached) else "test accuracy is unknown")
    if start is None:
        final_train = last_value(as_array(history["train_acc"]))
        return "\n".join([f"train accuracy does not reach 99% within {steps[-1]:,} steps (it ends at "
                          f"{percent(final_train)}), so there is no delay to measure", test_line, "",
                          f"{'accuracy':<18}{'final':>8}",
                          *(f"{label:<18}{percent(rise.final):>8}" for label, rise in rises.items())])

    lines = [f"train accuracy reaches 99% at step {steps[start]:,} (interpolation)", test_line, "",
             f"{'accuracy':<18}{'at interpolation':>16}{'largest later':>16}{'final':>9}"
             f"{'half of the rise':>21}{'delay factor':>15}"]
    for label, rise in rises.items():
        line = f"{label:<18}{percent(rise.start):>16}{percent(rise.largest):>16}{percent(rise.final):>9}"
        if rise.half is None:
            line += f"{'rise not held' if rise.brief else 'no delayed rise':>21}"
        else:
            line += f"{'step ' + format(steps[rise.half], ','):>21}{factor(steps[rise.half], steps[start]):>15}"
        lines.append(line)
    notes = ("robust: right, and no attack on the exact objective succeeds. adv: right after PGD on cross-entropy as "
             "computed. The part of a climb that adv shows and robust does not is numerical.",
             f"A rise counts if it is held for {HOLD} log points and beyond sampling noise (Wilson intervals of "
             f"{sizes['test']:,} test and {sizes['attacked']:,} attacked images, {100 * CONFIDENCE:.0f}% for all lines "
             "together). Delay factor: step at half of the rise / step of interpolation.")
    return "\n".join([*lines, "", *(textwrap.fill(note, 98) for note in notes)])


def short_names(paths):
    """The parts in which paths differ: 'runs/a/logs/h.json', 'runs/b/logs/h.json' -> 'a', 'b'."""
    parts = [Path(path).parts for path in paths]
    if len(set(parts)) == 1:
        return [str(path) for path in paths]
    head = len(os.path.commonprefix(parts))
    tail = len(os.path.commonprefix([part[head:][::-1] for part in parts]))
    return ["/".join(part[head:len(part) - tail]) or "." for part in parts]


def table_row(history):
    """The cells of one run that do not depend on the other runs."""
    if not history["step"]:
        return ["0"] + ["-"] * 12
    steps, start, rises = history["step"], interpolation_index(history["train_acc"]), rises_of(history)
    row = [f"{steps[-1]:,}", percent(last_value(as_array(history["train_acc"]))),
           percent(rises["test"].final), "-" if start is None else f"{steps[start]:,}"]

    epsilons = list(map(epsilon_label, history["robust_acc"]))
    epsilon = epsilons[(len(epsilons) - 1) // 2] if epsilons else "-"
    row.append(epsilon)
    for measure in ("robust", "adv"):
        rise = rises.get(f"{measure} ε {epsilon}", Rise(np.nan, np.nan, np.nan))
        delay = "-" if np.isnan(rise.largest) else "brief" if rise.brief else "none"
        row += [percent(rise.start), percent(rise.final),
                delay if rise.half is None else factor(steps[rise.half], steps[start])]

    radii = list(history["local_complexity"].get("train", {}).values())
    totals = [sum(layers) for layers in radii[0] if None not in layers] if radii else []
    return row + ([f"{min(totals):.2f}", f"{max(totals):.2f}"] if totals else ["-", "-"])


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
    rows += [[name, *(flag_text(history["config"].get(flag)) for flag in flags), *table_row(history)]
             for name, history in zip(names, histories, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


# ------------------------------------------------------------------------------------------------------------- phases

def smoothed(values):
    """Running median of three; the ends stay as they are."""
    if len(values) < 3:
        return values
    inner = np.median(np.lib.stride_tricks.sliding_window_view(values, 3), axis=1)
    return np.concatenate([values[:1], inner, values[-1:]])


def without_plateaus(log, first, last):
    """The part of a descent or ascent from index first to last in which the curve moves."""
    near = min(0.15 * abs(log[last] - log[first]), np.log(1.1))
    part = log[first:last + 1]
    return first + int(np.flatnonzero(abs(part - log[first]) <= near)[-1]), \
        first + int(np.flatnonzero(abs(part - log[last]) <= near)[0])


def phases(complexity):
    """[(name, first index, last index)] of the paper's phases that a curve of local complexity goes through.

    complexity: one value a log point, finite, >= 0. The ascent is the largest relative rise that follows a descent;
    the first descent leads to its foot, the second starts from its top; plateaus between them belong to none. Each
    must be a change by a tenth and five times the noise of the curve (from the second differences of its logarithm),
    or it is not there.
    """
    if len(complexity) < 4 or complexity.max() <= 0:
        return []
    log = np.log(np.maximum(complexity, 0.02 * complexity.max()))
    noise = 1.4826 * np.median(np.abs(np.diff(log, 2))) / np.sqrt(6)
    least = max(np.log(1.1), 5 * noise)
    log = smoothed(log)

    fallen = np.maximum.accumulate(log) - log
    if fallen.max() < least:
        return []
    feet = np.where(fallen >= least, log, np.inf)  # what an ascent can start from
    rise = log - np.minimum.accumulate(feet)
    top = int(np.argmax(rise))
    ascends = rise[top] >= least
    foot = int(np.argmin(feet[:top + 1])) if ascends else int(np.argmax(fallen))
    found = [("first descent", int(np.argmax(log[:foot + 1])), foot)]
    if ascends:
        found.append(("ascent", foot, top))
        end = top + int(np.argmin(log[top:]))
        if log[top] - log[end] >= least:
            found.append(("second descent", top, end))
    return [(name, *without_plateaus(log, first, last)) for name, first, last in found]


# ------------------------------------------------------------------------------------------------------------ figures
# Axes are placed by hand, in inches: a layout engine takes longer than the drawing, and here nothing can be clipped.

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


def spread(wanted, gap, low, high):
    """Positions nearest to the wanted ones (least squares) that lie `gap` apart, in the same order, in [low, high]."""
    order = np.argsort(wanted, kind="stable")
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    slots = gap * np.arange(len(wanted))
    blocks = []  # isotonic regression of wanted - slots: neighbours in the wrong order are pooled
    for value in np.asarray(wanted)[order] - slots:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    placed = np.repeat([value for value, _ in blocks], [count for _, count in blocks])
    result = np.empty(len(wanted))
    result[order] = np.clip(placed, low, high - slots[-1]) + slots
    return result


def label_ends(ax, ends):
    """Name curves right of their ends, without overlap. ends: [(text, colour, steps, values)]."""
    ends = [(text, colour, steps[np.isfinite(values)], values[np.isfinite(values)])
            for text, colour, steps, values in ends]
    ends = [(text, colour, steps[-1], values[-1]) for text, colour, steps, values in ends if len(steps)]
    if not ends:
        return
    to_axes = ax.transData + ax.transAxes.inverted()
    points = to_axes.transform([end[2:] for end in ends])
    gap = 1.2 * SMALL / 72 / height_inches(ax)
    for (text, colour, *_), (x, y), place in zip(ends, points, spread(points[:, 1], gap, 0.02, 0.98), strict=True):
        line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 0,
                "relpos": (0, 0.5)}
        ax.annotate(text, (x, y), (x + 0.18 / width_inches(ax), place), "axes fraction", "axes fraction",
                    va="center", color=colour, fontsize=SMALL, annotation_clip=False, arrowprops=line)


def width_inches(ax):
    return ax.get_position().width * ax.figure.get_figwidth()


def height_inches(ax):
    return ax.get_position().height * ax.figure.get_figheight()


def step_axis(ax, first, last, labelled):
    """A logarithmic axis for steps from `first` to `last`, with step 0 at its left edge."""
    ax.set_xscale("symlog", linthresh=first, linscale=0.3)
    ax.set_xlim(0, last)
    grid = [m * 10**k for k in range(12) for m in range(1, 10) if first <= m * 10**k <= last]
    decades = [step for step in grid if str(step).strip("0") == "1"]
    ticks = decades if len(decades) > 2 else [step for step in grid if str(step)[0] in "125"]
    ticks = [0, *ticks[(len(ticks) - 1) % 2::2]] if len(ticks) * 0.45 > width_inches(ax) else [0, *ticks]
    ax.set_xticks(ticks, [step_label(tick) if labelled else "" for tick in ticks])
    ax.set_xticks(grid, minor=True, labels=[""] * len(grid))
    ax.tick_params(labelsize=SMALL)
    if labelled:
        ax.set_xlabel("step", fontsize=SMALL + 1)


def step_label(step):
    """Steps up to 10 and those that are no power of ten as they are, 100 and more as a power."""
    power = len(str(step)) - 1
    return f"$10^{power}$" if step == 10**power and power > 1 else f"{step:,}"


def draw_curve(ax, group, column, colour, width, dashes="-", band=True):
    """Draw the mean of a column over the group, with its range; returns (steps, mean)."""
    steps, mean, low, high = together(group, column)
    # A line through one point is not seen.
    lone = {"marker": "o", "markersize": 3, "clip_on": False} if len(steps) < 3 else {}
    ax.plot(steps, mean, color=colour, lw=width, ls=dashes, **lone)
    if band and len(group) > 1:
        ax.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
    return steps, mean


def accuracy_panel(ax, group):
    """Train, test, robust_acc (full lines) and adv_acc (dashed, in the same colours) against the step."""
    import matplotlib

    def accuracy(name, key=None):
        return lambda history: as_array(history[name] if key is None else history[name][key])

    keys = [key for key in group[0]["robust_acc"] if all(key in history["robust_acc"] for history in group)]
    shades = matplotlib.colormaps["viridis"](np.linspace(0.75, 0.0, len(keys)))
    ends = [("train", TRAIN, *draw_curve(ax, group, accuracy("train_acc"), TRAIN, 1.0))]
    for key, shade in zip(keys, shades, strict=True):
        draw_curve(ax, group, accuracy("adv_acc", key), shade, 1.0, dashes=(0, (3, 1.5)), band=False)
        curve = draw_curve(ax, group, accuracy("robust_acc", key), shade, 1.6)
        ends.append((f"ε {epsilon_label(key)}", shade, *curve))
    ends.append(("test", TEST, *draw_curve(ax, group, accuracy("test_acc"), TEST, 1.6)))
    ax.set_ylim(-0.02, 1.02)
    ax.set_yticks(np.linspace(0, 1, 6), [f"{tick}%" for tick in range(0, 101, 20)])
    label_ends(ax, ends)


def point_sets(history, radius):
    return [points for points in ("random", "test", "train") if radius in history["local_complexity"].get(points, {})]


def complexity_panel(ax, group, radius, top):
    """Local complexity around random, test and train points, the layers of train stacked, its phases named."""
    import matplotlib

    def layers_of(points):
        return lambda history: as_array(history["local_complexity"][points][radius])

    ax.set_ylim(0, 1.04 * top / STRIP)
    steps, layers, _, _ = together(group, layers_of("train"))
    edges = np.cumsum(np.pad(layers, ((0, 0), (1, 0))), axis=1)
    greys = matplotlib.colormaps["Greys"](np.linspace(0.4, 0.08, layers.shape[1]))
    for below, above, grey in zip(edges.T, edges.T[1:], greys, strict=False):
        ax.fill_between(steps, below, above, color=grey, lw=0)

    ends = []
    for points in point_sets(group[0], radius):
        def total(history, points=points):
            return layers_of(points)(history).sum(axis=1)
        colour = {"random": RANDOM, "test": TEST, "train": TRAIN}[points]
        ends.append((points, colour, *draw_curve(ax, group, total, colour, 1.8)))
    label_ends(ax, ends)
    mark_phases(ax, steps, layers.sum(axis=1))


def mark_phases(ax, steps, complexity):
    """Name the phases in the strip above the curves, shortly or by an arrow alone where there is no room."""
    known = np.isfinite(complexity)
    steps = steps[known]
    found = phases(complexity[known])
    to_axes = ax.transData + ax.transAxes.inverted()
    spans = [to_axes.transform([(steps[first], 0), (steps[last], 0)])[:, 0] for _, first, last in found]
    for i, ((name, first, last), (left, right)) in enumerate(zip(found, spans, strict=True)):
        grey, arrow = ("0.86", "↗") if name == "ascent" else ("0.94", "↘")
        ax.axvspan(steps[first], steps[last], STRIP, color=grey, lw=0)
        ax.vlines([steps[first], steps[last]], 0, STRIP, color="0.55", lw=0.6, ls=":",
                  transform=ax.get_xaxis_transform())
        middle = (left + right) / 2
        before, after = spans[i - 1][1] if i > 0 else 0, spans[i + 1][0] if i + 1 < len(spans) else 1
        room = 2 * min(middle - before, after - middle) * width_inches(ax)
        texts = [text for text in (f"{name} {arrow}", f"{name.split()[0]} {arrow}", arrow)
                 if 0.6 * SMALL / 72 * len(text) < room]
        if texts:
            ax.text(middle, (1 + STRIP) / 2, texts[0], transform=ax.transAxes, ha="center", va="center_baseline",
                    fontsize=SMALL)


def mark_interpolation(axes, group):
    """A line through all panels where training accuracy reaches 99%, with the step above it."""
    steps, train, _, _ = together(group, lambda history: as_array(history["train_acc"]))
    index = interpolation_index(train)
    if index is None:
        return
    for ax in axes:
        ax.axvline(steps[index], ymax=1 if ax is axes[0] else STRIP, color="0.35", lw=0.8, ls=(0, (1, 1.5)))
    axes[0].text(steps[index], 1.01, f"train 99% at step {steps[index]:,}", transform=axes[0].get_xaxis_transform(),
                 ha="center", va="bottom", fontsize=SMALL, color="0.35")


def grouped(histories):
    """(groups, flags): the histories in groups of equal configuration, the seed aside, and the flags that differ."""
    flags = differing_flags(histories, also_same={"seed"})
    groups = {}
    for history in histories:
        groups.setdefault(json.dumps([history["config"].get(flag) for flag in flags]), []).append(history)
    return list(groups.values()), flags


def run_title(history, flags):
    """What was trained on what, the flags that differ between the runs left out."""
    config, sizes = history["config"], history["sizes"]
    same = {name: value for name, value in config.items() if name not in flags and value is not None}
    shape = ", ".join(f"{name} {same[name]}" for name in ("depth", "width") if name in same)
    text = same.get("model", "several models") + (f" ({shape})" if shape else "")
    text += f" on {same.get('dataset', 'several data sets')}"
    return text if {"dataset", "train_size"} & set(flags) else f"{text}, {sizes['train']:,} training images"


def group_title(group, flags):
    """What sets this group off from the others, in lines that a small panel has room for."""
    config = group[0]["config"]
    pairs = [f"{flag.replace('_', ' ')} {flag_text(config.get(flag))}" for flag in flags]
    return textwrap.fill(", ".join(pair.replace(" ", "\N{NO-BREAK SPACE}") for pair in pairs), 42)


def runs_text(group):
    if len(group) == 1:
        return ""
    end = max(history["step"][-1] for history in group)
    unfinished = sum(history["step"][-1] < end for history in group)
    return f"mean and range of {len(group)} runs" + (f", {unfinished} of them not at the end" if unfinished else "")


def complexity_top(group, radius):
    """The highest local complexity that a panel has to show."""
    totals = [as_array(history["local_complexity"][points][radius]).sum(axis=1)
              for history in group for points in point_sets(history, radius)]
    totals = np.concatenate(totals)
    return max(totals[np.isfinite(totals)], default=1) or 1


def draw_block(fig, x, y, size, group, radii, tops, first, last):
    """The panels of one configuration, one below the other; (x, y): their upper left corner, inches from the figure's.

    Returns the axes from top to bottom.
    """
    width, *heights = size
    axes = []
    for height in heights:
        place = np.array([x, fig.get_figheight() - y - height, width, height])
        ax = fig.add_axes(place / np.tile(fig.get_size_inches(), 2))
        ax.spines[["top", "right"]].set_visible(False)
        step_axis(ax, first, last, labelled=len(axes) == len(radii))
        axes.append(ax)
        y += height + 0.16
    accuracy_panel(axes[0], group)
    for ax, radius, top in zip(axes[1:], radii, tops, strict=True):
        complexity_panel(ax, group, radius, top)
    mark_interpolation(axes, group)
    return axes


def figure(histories):
    """Return the matplotlib figure of one run, of one configuration's seeds, or of several configurations.

    histories: list of history dicts, finished or not; one without a log step is left out. Raises ValueError if no
    history is left.
    """
    from matplotlib.figure import Figure

    histories = [history for history in histories if history["step"]]
    if not histories:
        raise ValueError("nothing to draw: no history holds a log step yet")
    groups, flags = grouped(histories)
    alone = len(groups) == 1
    radii = [radius for radius in histories[0]["local_complexity"].get("train", {})
             if all("train" in point_sets(history, radius) for history in histories)]
    radii = radii if alone else radii[:1]
    tops = np.array([[complexity_top(group, radius) for radius in radii] for group in groups])
    if radii and tops.max() < 5 * tops.min():  # one scale, as long as it hides nothing
        tops[:] = tops.max(axis=0)

    titles = ["\n".join(filter(None, [group_title(group, flags), runs_text(group)])) for group in groups]
    head = 0.35 + 0.15 * max(title.count("\n") + bool(title) for title in titles)
    size = (5.6, 3.1, *[1.9] * len(radii)) if alone else (2.5, 1.9, *[1.3] * len(radii))
    columns = 1 if alone else min(len(groups), 3 if len(groups) <= 9 else 5)
    rows = -(-len(groups) // columns)
    block_width, block_height = size[0] + 1.45, head + sum(size[1:]) + 0.16 * len(radii) + 0.45
    fig = Figure((columns * block_width, 0.3 + rows * block_height + 0.5))
    last = max(max(history["step"][-1] for history in histories), 1)
    first = min((step for history in histories for step in history["step"] if step > 0), default=1)
    for i, (group, title) in enumerate(zip(groups, titles, strict=True)):
        x, y = (i % columns) * block_width + 0.75, 0.3 + (i // columns) * block_height + head
        axes = draw_block(fig, x, y, size, group, radii, tops[i], first, last)
        axes[0].set_title(title, fontsize=SMALL + 1, pad=13)
        if i % columns == 0:
            end = ", " if alone else "\n"
            for ax, text in zip(axes, ["accuracy", *(f"local complexity{end}r = {r}" for r in radii)], strict=True):
                ax.set_ylabel(text, fontsize=SMALL + 1)
    fig.text(0.5, 1 - 0.2 / fig.get_figheight(), run_title(histories[0], flags), ha="center", va="center",
             fontsize=SMALL + 2.5)
    add_legend(fig, bool(radii))
    return fig


def add_legend(fig, with_complexity):
    """Say below the panels what kind of line is what."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Line2D([], [], color="0.3", lw=1.6, label="robust_acc at ε: attacks on the exact objective"),
               Line2D([], [], color="0.3", lw=1.0, ls=(0, (3, 1.5)),
                      label="adv_acc at ε: PGD on cross-entropy as computed")]
    if with_complexity:
        handles.append(Patch(color="0.75", label="train points, layer upon layer (first at the bottom)"))
    fig.legend(handles=handles, loc="lower center", ncols=2, fontsize=SMALL, frameon=False)


def save(fig, path):
    """Write a figure to path.png and path.svg; returns the two paths.

    Each file is replaced in one go, so that a viewer never meets half a picture.
    """
    import matplotlib

    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "plot"}):  # the same figure gives the same file
        for suffix, options in ((".png", {}), (".svg", {"metadata": {"Date": None}})):
            buffer = io.BytesIO()
            fig.savefig(buffer, format=suffix[1:], dpi=DPI, **options)
            written.append(stem.with_name(stem.name + suffix))
            runlog.write_atomically(written[-1], buffer.getvalue())
    return written


def draw(histories, path):
    """Draw histories (dicts) into path.png and path.svg; see figure() and save()."""
    return save(figure(histories), path)


# ------------------------------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = OneLineParser(prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("histories", nargs="*", metavar="HISTORY.json", default=["logs/training_history.json"],
                        help="history files of train.py (default: logs/training_history.json)")
    parser.add_argument("--out", metavar="PATH", help="write PATH.png and PATH.svg (default: beside the history; "
                        "'sweep' in the folder that several have in common; 'partition' beside the first checkpoint)")
    parser.add_argument("--summary", action="store_true", help="print where each curve rises after interpolation")
    parser.add_argument("--table", action="store_true", help="print one line a run")
    parser.add_argument("--partition", nargs="+", metavar="CHECKPOINT", help="draw the network's partition of a plane "
                        "through three test images, side by side for these checkpoints")
    return parser.parse_args(argv)


def default_path(histories):
    if len(histories) == 1:
        return Path(histories[0]).with_suffix("")
    return Path(os.path.commonpath([Path(path).resolve().parent for path in histories])) / "sweep"


def run(args):
    if args.partition:
        import partition

        written = save(partition.figure(args.partition), args.out or Path(args.partition[0]).parent / "partition")
        print("wrote", *written)
        return
    histories = [runlog.read_history(path) for path in args.histories]
    if args.table:
        print(table(histories, short_names(args.histories)))
    if args.summary:
        texts = [summary(history) for history in histories]
        print("\n\n".join(texts if len(texts) == 1 else
                          [f"{path}\n{text}" for path, text in zip(args.histories, texts, strict=True)]))
    if args.out or not (args.table or args.summary):
        print("wrote", *draw(histories, args.out or default_path(args.histories)))


def main(argv=None):
    try:
        run(parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
