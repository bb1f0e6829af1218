"""What the figures share: colours and sizes, the axis of steps, curves named at their ends, the panel of accuracies.

Axes are placed by hand, in inches: a layout engine takes longer than the drawing, and here nothing can be clipped.
"""

import io
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.markers import TICKDOWN
from matplotlib.textpath import TextPath

from analysis.runs import together
from analysis.statistics import as_array, column_of, interpolation_index
from flags import epsilon_label
from runtime import files

TRAIN, TEST, RANDOM = "black", "#D55E00", "#0072B2"  # Okabe and Ito's colours: told apart by colour-blind readers
SMALL = 7.5  # points; the smallest text
LINE = 1.2 * SMALL / 72  # inches from one line of small text to the next
TITLE_SIZE = SMALL + 2
DPI = 200
STRIP = 0.15  # inches above the curves of local complexity: the names of the phases
SATURATED = {"color": "0.45", "lw": 0.8, "ls": (0, (1, 1))}


def add_axes(fig, left, top, width, height, **options):
    """Axes whose upper left corner lies at (left, top), all in inches from the figure's upper left corner."""
    place = np.array([left, fig.get_figheight() - top - height, width, height])
    return fig.add_axes(place / np.tile(fig.get_size_inches(), 2), **options)


def width_inches(ax):
    return ax.get_position().width * ax.figure.get_figwidth()


def height_inches(ax):
    return ax.get_position().height * ax.figure.get_figheight()


def text_inches(text):
    """How wide a line of small text is, with a little room around it."""
    return TextPath((0, 0), text, size=SMALL).get_extents().width / 72 + 0.05


def add_title(fig, text):
    """Write the title of a figure in as many lines as it needs; see title_inches."""
    lines = wrapped(text, fig.get_figwidth())
    fig.text(0.5, 1 - 0.1 / fig.get_figheight(), lines, ha="center", va="top", fontsize=TITLE_SIZE)


def title_inches(text, width):
    """How high the title of a figure of this width is, the space around it included."""
    return 0.15 + 1.25 * TITLE_SIZE / 72 * (wrapped(text, width).count("\n") + 1)


def wrapped(text, width):
    return textwrap.fill(text, int((width - 0.4) / (0.6 * TITLE_SIZE / 72)))


# ---- the axis of steps ----------------------------------------------------------------------------------------------

def step_axis(ax, first, last, labelled=True):
    """A logarithmic axis for steps from `first` to `last`, with step 0 at its left edge."""
    ax.set_xscale("symlog", linthresh=first, linscale=0.3)
    ax.set_xlim(0, last)
    grid = [m * 10**k for k in range(12) for m in range(1, 10) if first <= m * 10**k <= last]
    decades = [step for step in grid if str(step).strip("0") == "1"]
    ticks = decades if len(decades) > 2 else [step for step in grid if str(step)[0] in "125"] or grid[-1:]
    ticks = [0, *ticks[(len(ticks) - 1) % 2::2]] if len(ticks) * 0.45 > width_inches(ax) else [0, *ticks]
    ax.set_xticks(ticks, [step_label(tick) if labelled else "" for tick in ticks])
    ax.minorticks_off()
    ax.plot(grid, [0] * len(grid), "k", ls="", marker=TICKDOWN, ms=2, mew=0.6, clip_on=False,
            transform=ax.get_xaxis_transform())  # one artist in place of dozens of minor ticks, which take a second
    ax.tick_params(labelsize=SMALL)
    ax.spines[["top", "right"]].set_visible(False)
    if labelled:
        ax.set_xlabel("step", fontsize=SMALL + 1)


def step_label(step):
    """Steps up to 10 and those that are no power of ten as they are, 100 and more as a power."""
    power = len(str(step)) - 1
    return f"$10^{power}$" if step == 10**power and power > 1 else f"{step:,}"


def span(histories):
    """(first, last): the first step after 0 and the last one of all the histories, for step_axis."""
    steps = [step for history in histories for step in history["step"]]
    return min((step for step in steps if step > 0), default=1), max(1, *steps)


# ---- curves ---------------------------------------------------------------------------------------------------------

def draw_curve(ax, group, column, band=True, **style):
    """Draw the mean of a column over the group, with its range; returns (steps, mean).

    column: function of a history that returns an array, log points first; NaN is a gap.
    """
    steps, mean, low, high = together(group, column)
    known = np.pad(np.isfinite(mean), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]  # a line through one point is not seen
    ax.plot(steps, mean, marker="o", markersize=3, markevery=alone, clip_on=not alone.any(), **style)
    if band and len(group) > 1:
        ax.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)
    return steps, mean


def spaced(wanted, gap, low, high):
    """Positions nearest to the wanted ones (least squares) that lie `gap` apart, in the same order, in [low, high]."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(wanted, kind="stable")
    slots = min(gap, (high - low) / max(len(wanted) - 1, 1)) * np.arange(len(wanted))
    places = isotonic_regression(np.asarray(wanted)[order] - slots).x
    result = np.empty(len(wanted))
    result[order] = np.clip(places, low, high - slots[-1]) + slots
    return result


def label_ends(ax, ends):
    """Name curves right of their last known values, without overlap. ends: [(text, colour, steps, values)]."""
    known = [(text, colour, steps[np.isfinite(values)], values[np.isfinite(values)])
             for text, colour, steps, values in ends]
    known = [(text, colour, steps[-1], values[-1]) for text, colour, steps, values in known if len(steps)]
    if not known:
        return
    points = (ax.transData + ax.transAxes.inverted()).transform([end[2:] for end in known])
    places = spaced(points[:, 1], LINE / height_inches(ax), 0.02, 0.98)
    for (text, colour, *_), point, place in zip(known, points, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 0,
                "relpos": (0, 0.5)}
        ax.annotate(text, point, (1 + 0.18 / width_inches(ax), place), "axes fraction", "axes fraction", va="center",
                    color=colour, fontsize=SMALL, annotation_clip=False, arrowprops=line)


def room_for(names):
    """(width, height) in inches that the names of so many curves take beside a panel."""
    return 0.25 + max(map(text_inches, [*names, "random"])), len(names) * LINE / 0.96


# ---- the panel of accuracies ----------------------------------------------------------------------------------------

def shared(group, name):
    """The keys (epsilons) of a column that every run of the group has."""
    return [key for key in group[0][name] if all(key in history[name] for history in group)]


def saturates(group):
    """Whether the group's column train_saturated is there and says something."""
    return all(np.nanmax([0, *column_of(history, "train_saturated")]) > 0 for history in group)


def accuracy_names(group):
    """The names of the curves that accuracy_panel draws."""
    return ["train", "test", *["saturated"] * saturates(group),
            *(f"ε {epsilon_label(key)}" for key in shared(group, "robust_acc"))]


def accuracy_panel(ax, group):
    """Train, test, robust_acc (full lines) and adv_acc (dashed, in the same colours) against the step."""
    def values(name, key=None):
        return lambda history: column_of(history, name) if key is None else as_array(history[name][key])

    ends = [("train", TRAIN, *draw_curve(ax, group, values("train_acc"), color=TRAIN, lw=1.0))]
    if saturates(group):
        curve = draw_curve(ax, group, values("train_saturated"), band=False, **SATURATED)
        ends.append(("saturated", SATURATED["color"], *curve))
    keys = shared(group, "robust_acc")
    attacked = shared(group, "adv_acc")
    for key, shade in zip(keys, matplotlib.colormaps["viridis"](np.linspace(0.75, 0.0, len(keys))), strict=True):
        if key in attacked:
            draw_curve(ax, group, values("adv_acc", key), band=False, color=shade, lw=1.0, ls=(0, (3, 1.5)))
        curve = draw_curve(ax, group, values("robust_acc", key), color=shade, lw=1.6)
        ends.append((f"ε {epsilon_label(key)}", shade, *curve))
    ends.append(("test", TEST, *draw_curve(ax, group, values("test_acc"), color=TEST, lw=1.6)))
    ax.set_ylim(-0.02, 1.02)
    ax.set_yticks(np.linspace(0, 1, 6), [f"{tick}%" for tick in range(0, 101, 20)])
    label_ends(ax, ends)


def curves_height(ax):
    """The part of a panel that the strip with the phases' names leaves to the curves."""
    return 1 - STRIP / height_inches(ax)


def mark_step(axes, step, **style):
    """A line through the panel of accuracies and those of local complexity below it."""
    for ax in axes:
        ax.axvline(step, ymax=1 if ax is axes[0] else curves_height(ax), zorder=1, **style)


def mark_interpolation(axes, group):
    """A line through all panels where training accuracy reaches 99%, with the step above the first."""
    steps, train, _, _ = together(group, lambda history: column_of(history, "train_acc"))
    index = interpolation_index(train)
    if index is None:
        return
    mark_step(axes, steps[index], color="0.35", lw=0.8, ls=(0, (1, 1.5)))
    axes[0].text(steps[index], 1.01, f"train 99% at step {steps[index]:,}", transform=axes[0].get_xaxis_transform(),
                 ha="center", va="bottom", fontsize=SMALL, color="0.35")


# ---- files ----------------------------------------------------------------------------------------------------------

def save(fig, path):
    """Write a figure to path.png and path.svg; returns the two paths.

    Each file is replaced in one go, so that a viewer never meets half a picture.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "plot"}):  # the same figure gives the same file
        for suffix, options in ((".png", {}), (".svg", {"metadata": {"Date": None}})):
            buffer = io.BytesIO()
            fig.savefig(buffer, format=suffix[1:], dpi=DPI, **options)
            written.append(stem.with_name(stem.name + suffix))
            files.write_atomically(written[-1], buffer.getvalue())
    return written
