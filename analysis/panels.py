"""What the figures share: style, colours, the step axis, curves with their names at their ends, the accuracy panel.

Constrained layout places the panels. The names at the ends of curves are spread afterwards, by lay_out().
"""

import io
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.markers import TICKDOWN
from matplotlib.text import Annotation
from matplotlib.transforms import ScaledTranslation

from analysis.runs import together
from analysis.statistics import column_of, interpolation_step
from flags import epsilon_label
from records import files
from records.history import History

TRAIN, TEST, RANDOM = "black", "#D55E00", "#0072B2"  # the palette of Okabe and Ito, safe for colour-blind readers
SHARES: dict[str, tuple[str, dict[str, Any], str]] = {  # column: name at the curve's end, line, words in the legend
    "train_saturated": ("saturated", {"color": "0.45", "lw": 0.8, "ls": (0, (1, 1))},
                        "saturated: training images whose softmax rounds to 1"),
    "zero_gradient": ("zero gradient", {"color": "#E69F00", "lw": 1.4, "ls": (0, (1, 1))},
                      "zero gradient: attacked images where that of cross-entropy is 0"),
}
SMALL = 7.5  # points; the smallest text
LINE = 1.2 * SMALL / 72  # inches from one line of small text to the next
# A decorator: matplotlib's own defaults, whatever the user's style says, and the same file for the same figure.
default_style = matplotlib.style.context({"svg.hashsalt": "plot"}, after_reset=True)


def new_figure(width: float, height: float, title: str, dpi: int = 200) -> Figure:
    """A figure of this size in inches, with its title in as many lines as it needs."""
    fig = Figure((width, height), dpi=dpi)
    fig.suptitle(textwrap.fill(title, int(11.5 * width)), fontsize=SMALL + 2)
    return fig


def lay_out(fig: Figure) -> None:
    """Fix the layout, then spread the names of the curves in each panel and tie them to their ends."""
    ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06).execute(fig)
    for ax in fig.axes:
        names = [text for text in ax.texts if isinstance(text, Annotation)]
        if names:
            width, height = ax.bbox.width / fig.dpi, ax.bbox.height / fig.dpi
            ends = (ax.transData + ax.transAxes.inverted()).transform([name.xy for name in names])
            # Of two that end at one height, the one drawn first is above: the smaller epsilon.
            places = spaced(ends[::-1, 1], LINE / height, 0.02, 0.98)[::-1]
            for name, (x, y), place in zip(names, ends, places, strict=True):
                name.set_y(place)
                # Not inside the panel, where it would look like a curve that goes on.
                ax.plot([max(x, 1), 1 + 0.15 / width], [y, place], color=name.get_color(), lw=0.5, alpha=0.6,
                        transform=ax.transAxes, clip_on=False)


@default_style
def save(fig: Figure, path: str | Path) -> list[Path]:
    """Write a figure to path.png and path.svg, each replaced at once; returns the two paths."""
    stem = str(path).removesuffix(".png").removesuffix(".svg")
    written = [Path(stem + suffix) for suffix in (".png", ".svg")]
    for file in written:
        buffer = io.BytesIO()
        fig.savefig(buffer, format=file.suffix[1:], metadata={"Date": None})
        files.write_atomically(file, buffer.getvalue())
    return written


def step_axis(ax: Axes, first: int, last: int, width: float, labelled: bool = True) -> None:
    """A logarithmic axis for steps from `first` to `last` with step 0 at its left edge, about `width` inches wide."""
    ax.set_xscale("symlog", linthresh=first, linscale=0.3)
    ax.set_xlim(0, last)
    grid = [m * 10**k for k in range(12) for m in range(1, 10) if first <= m * 10**k <= last] or [last]
    decades = [step for step in grid if str(step).strip("0") == "1"]
    ticks = decades if len(decades) > 2 else [step for step in grid if str(step)[0] in "125"] or grid[-1:]
    ticks = [0, *ticks[(len(ticks) - 1) % 2::2]] if len(ticks) * 0.45 > width else [0, *ticks]
    names = [f"$10^{len(str(tick)) - 1}$" if tick >= 100 and tick in decades else f"{tick:,}" for tick in ticks]
    ax.set_xticks(ticks, names if labelled else [""] * len(ticks))
    ax.minorticks_off()
    ax.plot(grid, [0] * len(grid), "k", ls="", marker=TICKDOWN, ms=2, mew=0.6, clip_on=False,
            transform=ax.get_xaxis_transform())  # dozens of minor ticks would take a second to draw
    ax.tick_params(labelsize=SMALL)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("step" if labelled else "", fontsize=SMALL + 1)


def span(histories: Sequence[History]) -> tuple[int, int]:
    """The first step after 0 and the last one of all the histories, for step_axis."""
    steps = [step for history in histories for step in history["step"]]
    return min((step for step in steps if step > 0), default=1), max(1, *steps)


def draw_curve(ax: Axes, group: Sequence[History], column: Callable[[History], np.ndarray], name: str = "",
               band: bool = True, **style: Any) -> None:
    """Draw the mean of a column (of runs.together) over the group, its range as a band, and its name at its end."""
    steps, mean, low, high = together(group, column)
    known = np.isfinite(mean)
    around = np.pad(known, 1)
    alone = known & ~around[:-2] & ~around[2:]  # a line through one point would be invisible
    ax.plot(steps, mean, marker="o", markersize=3, markevery=alone, clip_on=not alone.any(), **style)
    if band and len(group) > 1:
        ax.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)
    if name and known.any():
        ax.annotate(name, (steps[known][-1], mean[known][-1]), (1, 0.5), annotation_clip=False, va="center",
                    color=style["color"], fontsize=SMALL,
                    textcoords=ax.transAxes + ScaledTranslation(13 / 72, 0, ax.figure.dpi_scale_trans))


def spaced(wanted: Sequence[float] | np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Positions in [low, high] nearest to the wanted ones (least squares), `gap` apart, in the same order."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(wanted, kind="stable")
    slots = min(gap, (high - low) / max(len(wanted) - 1, 1)) * np.arange(len(wanted))
    places = np.clip(isotonic_regression(np.asarray(wanted)[order] - slots).x, low, high - slots[-1]) + slots
    return places[np.argsort(order)]


def shared(group: Sequence[History], name: str, part: str | None = None) -> list[str]:
    """The keys (epsilons, radii) of a column, or of a part of it, that every run of the group has."""
    columns = [cast(dict, history).get(name, {}) for history in group]
    columns = columns if part is None else [column.get(part, {}) for column in columns]
    return [key for key in columns[0] if all(key in column for column in columns)]


def shown_shares(group: Sequence[History]) -> list[str]:
    """The columns of SHARES that are above zero somewhere in each run of the group."""
    return [name for name in SHARES if all(np.nanmax([0, *column_of(history, name)]) > 0 for history in group)]


def epsilon_colours(histories: Sequence[History]) -> dict[str, Any]:
    """Return a colour for each epsilon of these runs, from the smallest (light) to the largest (dark)."""
    keys = sorted({key for history in histories for key in history.get("robust_acc", {})}, key=float)
    return dict(zip(keys, matplotlib.colormaps["viridis"](np.linspace(0.75, 0.0, len(keys))), strict=True))


def accuracy_panel(ax: Axes, group: Sequence[History], colours: dict[str, Any]) -> None:
    """Train, test, robust_acc (full lines), adv_acc (dashed; of one run filled: what of it is rounding), certified_acc
    (dotted) against the step. colours: of each epsilon."""
    def draw(name: str, words: str = "", key: str | None = None, **style: Any) -> None:
        draw_curve(ax, group, partial(column_of, name=name, key=key), words, **style)

    draw("train_acc", "train", color=TRAIN, lw=1.0)
    for share in shown_shares(group):
        draw(share, SHARES[share][0], band=False, **SHARES[share][1])
    for key in sorted(shared(group, "robust_acc"), key=float):
        if len(group) == 1 and key in shared(group, "rounding"):
            adv, rounding = (column_of(group[0], name, key) for name in ("adv_acc", "rounding"))
            ax.fill_between(group[0]["step"], adv - rounding, adv, color=colours[key], alpha=0.18, lw=0)
        draw("adv_acc", key=key, band=False, color=colours[key], lw=1.0, ls=(0, (3, 1.5)))
        if key in shared(group, "certified_acc"):
            draw("certified_acc", key=key, band=False, color=colours[key], lw=1.4, ls=(0, (1, 1)))
        draw("robust_acc", f"ε {epsilon_label(key)}", key=key, color=colours[key], lw=1.6)
    draw("test_acc", "test", color=TEST, lw=1.6)
    ax.set_ylim(-0.02, 1.02)
    ax.set_yticks(np.linspace(0, 1, 6), [f"{tick}%" for tick in range(0, 101, 20)])
    ax.set_ylabel("accuracy", fontsize=SMALL + 1)


def mark_interpolation(axes: Sequence[Axes], group: Sequence[History]) -> None:
    """Mark the step of interpolation in all panels and name it above the first: the median over the group's runs."""
    steps = sorted(step for history in group if (step := interpolation_step(history)) is not None)
    if len(steps) < len(group):
        return
    step = steps[(len(steps) - 1) // 2]
    for ax in axes:
        ax.axvline(step, zorder=1, color="0.35", lw=0.8, ls=(0, (1, 1.5)))
    axes[0].text(step, 1.01, f"train 99% at step {step:,}", transform=axes[0].get_xaxis_transform(), ha="center",
                 va="bottom", fontsize=SMALL, color="0.35")
