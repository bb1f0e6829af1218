"""The figure of one run, of one configuration's seeds, or of several configurations."""

import functools

import matplotlib
import numpy as np

from analysis import panels, phases, runs
from analysis.panels import RANDOM, SATURATED, SMALL, TEST, TRAIN
from analysis.runs import together
from analysis.statistics import as_array, total_complexity

OUTBREAK = "#CC79A7"
# Inches. Small multiples take a page of A4 or letter once it is printed at four fifths, small text then being 6 points.
PAGE_WIDTH, PAGE_HEIGHT = 9.4, 13.4
LEFT = 0.7  # of a panel: the ticks
LEGEND, FOOT, GAP = 0.55, 0.42, 0.12  # below the page; below and between a configuration's panels


# ---- local complexity -----------------------------------------------------------------------------------------------

def point_sets(history, radius):
    return [points for points in ("random", "test", "train") if radius in history["local_complexity"].get(points, {})]


def layers_of(points, radius):
    """The column (log points, layers) of local complexity around these points, for runs.together."""
    def column(history):
        entries = history["local_complexity"][points][radius]
        unknown = [None] * max((len(entry) for entry in entries if entry), default=1)
        return as_array([entry or unknown for entry in entries])
    return column


def complexity_top(group, radius):
    """The highest local complexity that a panel has to show."""
    totals = np.concatenate([total_complexity(history, points, radius)
                             for history in group for points in point_sets(history, radius)])
    return max(totals[np.isfinite(totals)], default=1) or 1


def complexity_panel(ax, group, radius, top):
    """Local complexity around random, test and train points, the layers of train stacked, its phases named."""
    ax.set_ylim(0, 1.04 * top / panels.curves_height(ax))
    ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    steps, layers, _, _ = together(group, layers_of("train", radius))
    edges = np.cumsum(np.pad(layers, ((0, 0), (1, 0))), axis=1)
    greys = matplotlib.colormaps["Greys"](np.linspace(0.4, 0.08, layers.shape[1]))
    for below, above, grey in zip(edges.T, edges.T[1:], greys, strict=False):
        ax.fill_between(steps, below, above, color=grey, lw=0)

    ends = []
    for points in point_sets(group[0], radius):
        total = functools.partial(total_complexity, points=points, radius=radius)
        colour = {"random": RANDOM, "test": TEST, "train": TRAIN}[points]
        ends.append((points, colour, *panels.draw_curve(ax, group, total, color=colour, lw=1.8)))
    panels.label_ends(ax, ends)
    mark_phases(ax, steps, layers.sum(axis=1))


def mark_phases(ax, steps, complexity):
    """Name the phases in the strip above the curves, shortly or by an arrow alone where there is no room."""
    known = np.isfinite(complexity)
    steps, strip = steps[known], panels.curves_height(ax)
    found = phases.phases(complexity[known])
    ends = np.array([(steps[first], steps[last]) for _, first, last in found]).reshape(-1, 2)
    to_axes = ax.transData + ax.transAxes.inverted()
    places = to_axes.transform(np.column_stack([ends.ravel(), np.zeros(ends.size)]))[:, 0].reshape(-1, 2)
    middles = places.mean(axis=1)
    borders = np.array([0, *(places[:-1, 1] + places[1:, 0]) / 2, 1])  # a name stays on its side of them
    rooms = 2 * np.minimum(middles - borders[:-1], borders[1:] - middles) * panels.width_inches(ax)
    for (name, *_), (start, end), middle, room in zip(found, ends, middles, rooms, strict=True):
        grey, arrow = ("0.86", "↗") if name.endswith("ascent") else ("0.94", "↘")
        ax.axvspan(start, end, strip, color=grey, lw=0)
        ax.vlines([start, end], 0, strip, color="0.55", lw=0.6, ls=":", transform=ax.get_xaxis_transform())
        text = next((text for text in (f"{name} {arrow}", f"{name.split()[0]} {arrow}", arrow)
                     if panels.text_inches(text) < room), "")
        ax.text(middle, (1 + strip) / 2, text, transform=ax.transAxes, ha="center", va="center_baseline",
                fontsize=SMALL)


def mark_outbreaks(axes, group):
    """A thin line through all panels wherever the training loss of a run broke out; returns whether it did."""
    steps = [history["step"][index] for history in group for index in phases.outbreaks(history)]
    for step in steps:
        panels.mark_step(axes, step, color=OUTBREAK, lw=0.7, alpha=max(0.3, 1 / len(group)))
    return bool(steps)


# ---- figures --------------------------------------------------------------------------------------------------------

def block_size(groups, radii, head):
    """(columns, width, heights, right): how many configurations lie side by side, the size of each one's panels, and
    the room right of them."""
    right, least = np.max([panels.room_for(panels.accuracy_names(group)) for group in groups], axis=0)
    if len(groups) == 1:
        return 1, 5.6, [max(3.1, least), *[1.9] * len(radii)], right
    columns = {2: 2, 4: 2}.get(len(groups), 3 if len(groups) <= 12 else 4)
    width = max(PAGE_WIDTH / columns - LEFT - right, 1.6)
    room = (PAGE_HEIGHT - 0.3 - LEGEND) / -(-len(groups) // columns) - head - FOOT - GAP * len(radii)
    height = max(1.3, min(room / (1 + 0.62 * len(radii)), 0.85 * width))
    return columns, width, [max(height, least), *[0.62 * height] * len(radii)], right


def draw_block(fig, left, top, width, heights, group, radii, tops, steps):
    """The panels of one configuration, one below the other; returns the axes from top to bottom."""
    axes = []
    for height in heights:
        axes.append(panels.add_axes(fig, left, top, width, height))
        panels.step_axis(axes[-1], *steps, labelled=len(axes) == len(heights))
        top += height + GAP
    panels.accuracy_panel(axes[0], group)
    for ax, radius, highest in zip(axes[1:], radii, tops, strict=True):
        complexity_panel(ax, group, radius, highest)
    panels.mark_interpolation(axes, group)
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
    groups, flags = runs.grouped(histories)
    radii = [radius for radius in histories[0]["local_complexity"].get("train", {})
             if all("train" in point_sets(history, radius) for history in histories)]
    radii = radii if len(groups) == 1 else radii[:1]
    tops = np.array([[complexity_top(group, radius) for radius in radii] for group in groups])
    if radii and tops.max() < 5 * tops.min():  # one scale, as long as it hides nothing
        tops[:] = tops.max(axis=0)

    titles = ["\n".join(filter(None, [runs.group_title(group, flags), runs.runs_text(group)])) for group in groups]
    head = 0.2 + 0.15 * max(title.count("\n") + bool(title) for title in titles)
    columns, width, heights, right = block_size(groups, radii, head)
    rows = -(-len(groups) // columns)
    block = head + sum(heights) + GAP * len(radii) + FOOT
    title, page_width = runs.run_title(histories[0], flags), columns * (LEFT + width + right)
    above = panels.title_inches(title, page_width)
    fig = Figure((page_width, above + rows * block + LEGEND))
    panels.add_title(fig, title)
    broke_out = False
    for i, (group, over) in enumerate(zip(groups, titles, strict=True)):
        left, top = i % columns * (LEFT + width + right) + LEFT, above + i // columns * block + head
        axes = draw_block(fig, left, top, width, heights, group, radii, tops[i], panels.span(histories))
        broke_out |= mark_outbreaks(axes, group)
        axes[0].set_title(over, fontsize=SMALL + 1, pad=13)
        if i % columns == 0:
            end = ", " if len(groups) == 1 else "\n"
            for ax, text in zip(axes, ["accuracy", *(f"local complexity{end}r = {r}" for r in radii)], strict=True):
                ax.set_ylabel(text, fontsize=SMALL + 1)
    add_legend(fig, bool(radii), broke_out, any(map(panels.saturates, groups)))
    return fig


def add_legend(fig, with_complexity, broke_out, saturates):
    """Say below the panels what kind of line is what."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Line2D([], [], color="0.3", lw=1.6, label="robust_acc at ε: attacks on the exact objective"),
               Line2D([], [], color="0.3", lw=1.0, ls=(0, (3, 1.5)),
                      label="adv_acc at ε: PGD on cross-entropy as computed")]
    if with_complexity:
        handles.append(Patch(color="0.75", label="train points, layer upon layer (first at the bottom)"))
    if saturates:
        handles.append(Line2D([], [], label="training images whose softmax rounds to 1", **SATURATED))
    if broke_out:
        handles.append(Line2D([], [], color=OUTBREAK, lw=0.7, label="the training loss breaks out"))
    fig.legend(handles=handles, loc="lower center", ncols=2, fontsize=SMALL, frameon=False)


def draw(histories, path):
    """Draw histories (dicts) into path.png and path.svg; see figure() and panels.save()."""
    return panels.save(figure(histories), path)
