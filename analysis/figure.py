"""The figure of one run, of one configuration's seeds, or of several configurations."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation

from analysis import panels, phases, runs
from analysis.panels import RANDOM, SHARES, SMALL, TEST, TRAIN, Axes, Figure
from analysis.statistics import complexity_of, main_radius, total_complexity
from records.history import History

SPIKE, BRANCH = "#CC79A7", "#009E73"
# Inches. Small multiples fill a page of A4 or letter when printed at four fifths; small text is 6 points there.
ONE_WIDTH, PAGE_WIDTH, LEAST_WIDTH = 7.1, 9.4, 2.95  # a figure of one configuration, of several, of each at least
LABELS = 1.0  # above and below the panels of a configuration: its title, the names of the phases, the ticks
ENDS = 1.35  # left and right of a panel: ticks and names
STRIP = 0.15  # above a panel of local complexity: the names of the phases
LETTER = 0.06  # a letter of a phase's name
CROP = 1.5  # a panel of local complexity reaches to this many times the highest value of its later half


def complexity_panel(ax: Axes, group: Sequence[History], radius: str, width: float) -> None:
    """Draw local complexity around random, test and train points, the layers of train stacked, and name the phases.

    The panel reaches to the highest value, unless the beginning would hide what follows it. It is `width` inches wide.
    """
    steps, layers, _, _ = runs.together(group, lambda history: complexity_of(history, "train", radius))
    greys = matplotlib.colormaps["Greys"](np.linspace(0.42, 0.12, layers.shape[1]))
    ax.stackplot(steps, layers.T, colors=list(greys), lw=0.7, edgecolor="white")
    highest = later = 0.0
    for points, colour in (("random", RANDOM), ("test", TEST), ("train", TRAIN)):
        if radius in group[0]["local_complexity"].get(points, {}):
            total = functools.partial(total_complexity, points=points, radius=radius)
            panels.draw_curve(ax, group, total, points, color=colour, lw=1.8)
            high = np.nan_to_num(runs.together(group, total)[3])
            highest, later = max(highest, high.max()), max(later, high[len(high) // 2:].max())
    ax.set_ylim(0, 1.04 * min(highest, CROP * later) or 1)  # 1: nothing is known, or all is 0
    ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    ax.set_ylabel(f"local complexity\nr = {radius}", fontsize=SMALL + 1)
    name_phases(ax, steps, layers.sum(axis=1), width)


def name_phases(ax: Axes, steps: np.ndarray, complexity: np.ndarray, width: float) -> None:
    """Name the phases in a strip above a panel about `width` inches wide; a name too long for it is shortened."""
    known, scale = np.isfinite(complexity), ax.xaxis.get_transform()
    inch = width / np.ptp(scale.transform(ax.get_xlim()))
    above = ax.get_xaxis_transform() + ScaledTranslation(0, STRIP / 2, ax.figure.dpi_scale_trans)
    for name, first, last in phases.phases(complexity[known]):
        ends = steps[known][[first, last]]
        grey, arrow = ("0.86", "↗") if name.endswith("ascent") else ("0.94", "↘")
        ax.plot(ends, [1, 1], color=grey, lw=72 * STRIP, solid_capstyle="butt", transform=above, clip_on=False)
        ax.vlines(ends, 0, 1, color="0.55", lw=0.6, ls=":", transform=ax.get_xaxis_transform())
        short = name.replace("first", "1st").replace("second", "2nd")
        start, end = scale.transform(ends)
        texts = (f"{name} {arrow}", f"{short} {arrow}", f"{short.split()[0]} {arrow}", arrow, "")
        ax.text(float(scale.inverted().transform((start + end) / 2)), 1, transform=above, ha="center", fontsize=SMALL,
                s=next(text for text in texts if len(text) * LETTER <= (end - start) * inch), va="center_baseline")


@panels.default_style
def figure(histories: Sequence[History]) -> Figure:
    """Return the figure of one run, of one configuration's seeds, or of several configurations. A history without a
    log step is left out; ValueError if none is left."""
    histories = [history for history in histories if history["step"]]
    if not histories:
        raise ValueError("nothing to draw: no history has a log step yet")
    groups, flags = runs.grouped(histories)
    radii = panels.shared(histories, "local_complexity", "train")
    if len(groups) > 1:
        radii = [radius for radius in radii if radius == main_radius(histories[0])] or radii[:1]
    titles = [runs.group_title(group, flags) for group in groups]
    columns = {1: 1, 2: 2, 4: 2}.get(len(groups), 3 if len(groups) <= 12 else 4)
    rows, each = -(-len(groups) // columns), 1 + len(radii)
    width = ONE_WIDTH if columns == 1 else max(PAGE_WIDTH, LEAST_WIDTH * columns)
    height = max(1.3, min(3.1, 0.85 * (width / columns - ENDS)))
    names = max(3 + len(panels.shared(group, "robust_acc")) + len(panels.shown_shares(group)) for group in groups)
    heights = [max(height, panels.LINE * names), *[0.62 * height] * len(radii)]
    labels = LABELS + panels.LINE * max(title.count("\n") for title in titles)
    fig = panels.new_figure(width, rows * (sum(heights) + labels) + 0.9, runs.run_title(histories[0], flags))
    grid = fig.add_gridspec(rows * each, columns, height_ratios=heights * rows)
    colours = panels.epsilon_colours(histories)
    drawn = []
    for i, (group, title) in enumerate(zip(groups, titles, strict=True)):
        row, column = divmod(i, columns)
        drawn.append([fig.add_subplot(grid[row * each + k, column]) for k in range(each)])
        draw_group(drawn[i], group, radii, panels.span(histories), width / columns - ENDS, colours)
        drawn[i][0].set_title(title, fontsize=SMALL + 1, pad=13)
        for ax in drawn[i] if column else []:
            ax.set_ylabel("")
    if radii and len(groups) > 1:
        tops = [axes[1].get_ylim()[1] for axes in drawn]
        for axes in drawn if max(tops) < 2 * min(tops) else []:  # one scale, as long as it hides nothing
            axes[1].set_ylim(0, max(tops))
    add_legend(fig, groups, bool(radii))
    panels.lay_out(fig)
    return fig


def draw_group(axes: Sequence[Axes], group: Sequence[History], radii: list[str], steps: tuple[int, int],
               width: float, colours: dict[str, Any]) -> None:
    """Draw the panels of one configuration from top to bottom, with its marks through all of them."""
    for ax in axes:
        panels.step_axis(ax, *steps, width, labelled=ax is axes[-1])
    panels.accuracy_panel(axes[0], group, colours)
    for ax, radius in zip(axes[1:], radii, strict=True):
        complexity_panel(ax, group, radius, width)
    panels.mark_interpolation(axes, group)
    for steps_of, style, _ in MARKS:
        for step in steps_of(group):
            for ax in axes:
                ax.axvline(step, alpha=max(0.3, 1 / len(group)), zorder=1, **style)


# Vertical lines through all panels: the steps of a group's runs, the style, the words in the legend.
MARKS: list[tuple[Callable, dict[str, Any], str]] = [
    (lambda group: [history["step"][i] for history in group for i in phases.spikes(history)],
     {"color": SPIKE, "lw": 0.7}, "a spike of the training loss"),
    (lambda group: [history["branch"]["step"] for history in group if "branch" in history],
     {"color": BRANCH, "lw": 0.9, "ls": "-."}, "a branch leaves its parent run")]


def add_legend(fig: Figure, groups: Sequence[Sequence[History]], with_complexity: bool) -> None:
    """Explain the lines below the panels."""
    handles: list[Line2D | Patch] = [
        Line2D([], [], color="0.3", lw=1.6, label="robust_acc at ε: attacks on the exact objective"),
        Line2D([], [], color="0.3", lw=1.0, ls=(0, (3, 1.5)), label="adv_acc at ε: PGD on cross-entropy as computed")]
    if any(len(group) > 1 for group in groups):
        handles.append(Patch(color="0.85", label="band: the range of the runs"))
    elif any(panels.shared(group, "rounding") for group in groups):
        handles.append(Patch(color="0.85", label="filled: the part of adv_acc that is rounding"))
    if certified := [group[0] for group in groups if panels.shared(group, "certified_acc")]:
        n = min(min(history["config"]["certify"], history["sizes"]["attacked"]) for history in certified)
        handles.append(Line2D([], [], color="0.3", lw=1.4, ls=(0, (1, 1)),
                              label=f"certified_acc at ε: no attack can succeed ({n:,} images)"))
    if with_complexity:
        handles.append(Patch(color="0.75", label="train points, layer upon layer (first at the bottom)"))
    shown = {name for group in groups for name in panels.shown_shares(group)}
    handles += [Line2D([], [], label=words, **style) for name, (_, style, words) in SHARES.items() if name in shown]
    handles += [Line2D([], [], label=words, **style) for steps_of, style, words in MARKS if any(map(steps_of, groups))]
    fig.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False)


def draw(histories: Sequence[History], path: str | Path) -> list[Path]:
    """Draw histories into path.png and path.svg; see figure() and panels.save()."""
    return panels.save(figure(histories), path)
