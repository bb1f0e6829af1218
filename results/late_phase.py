"""What moves the late phase on MNIST: a table and a figure for each of weight decay, training images, width, depth,
activation and optimizer.

    python results/late_phase.py decay      # draw late_phase_decay.png (results/figures.sh draws all)

results/runs.py prints the tables.

Each table changes one setting of `mnist` (weight decay 0.01, 1,000 images, width 200, depth 4, ReLU) and keeps the
others, with `F.cross_entropy` and with the same loss computed exactly, for 100,000 steps. "a / b" are the values of the
seeds 42 and 1, "-" stands for what was not seen. `robust_acc` and `adv_acc` are those at ε = 0.10, local complexity is
that around training points. "Ascent" and "second descent" are phases of local complexity; the ascent ends where the
curve levels off, or at the last step if it still rises. "Half saturated" is the first log step at which the softmax has
rounded to 1 on half of the training images. A spike is a hundredfold rise of the training loss. "Lowest later" is over
the log steps after 99%, each replaced by the median of itself and its two neighbours. `mnist` and the runs of other
depths and of widths 50 and 100 have 60 log points, the others 30, so a short trough or peak may be missed in those.
"""

import functools
import sys
from pathlib import Path

import matplotlib
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from analysis import panels, phases  # noqa: E402
from analysis.statistics import HOLD, column_of, interpolation_of, total_complexity  # noqa: E402
from records.history import read_history  # noqa: E402

LOSSES = {"ce": "", "exact_ce": "_exact"}
SEEDS = ("", "_seed1")
EPSILON = "0.1"
KINDS = (panels.RANDOM, panels.TEST, "#009E73", "0.55")  # colours without an order
FROM = 30  # the figures' axes are logarithmic from this step on
# {the figure's name: (what is varied, {value: the histories' name without loss and seed})}
SETTINGS = {
    "decay": ("weight decay", {"0": "mnist_decay0", "0.001": "mnist_decay0.001", "0.01": "mnist",
                               "0.1": "mnist_decay0.1", "1": "mnist_decay1"}),
    "images": ("training images", {"300": "mnist_train300", "1,000": "mnist", "3,000": "mnist_train3000",
                                   "10,000": "mnist_train10000"}),
    "width": ("width", {"20": "mnist_width20", "50": "mnist_width50", "100": "mnist_width100", "200": "mnist",
                        "1,000": "mnist_width1000"}),
    "depth": ("depth", {"2": "mnist_depth2", "3": "mnist_depth3", "4": "mnist", "5": "mnist_depth5",
                        "6": "mnist_depth6"}),
    "activation": ("activation", {"relu": "mnist", "leaky_relu": "mnist_leaky_relu", "gelu": "mnist_gelu"}),
    "optimizer": ("optimizer and learning rate", {"AdamW 0.0003": "mnist_lr0.0003", "AdamW 0.001": "mnist",
                                                  "AdamW 0.003": "mnist_lr0.003", "SGD 0.1": "mnist_sgd"}),
}
HEAD = ("loss", "99% at step", "ascent ends at step", "second descent begins", "half saturated at step",
        "first spike by step (how many)", "`robust_acc` at 99%", "lowest later", "at the end",
        "`adv_acc` at the end", "local complexity at the end", "weight norm at the end")


@functools.cache  # `mnist` is in each of the tables
def group_of(name: str, loss: str) -> list[dict]:
    """Return the histories of a setting, one for each seed that is there."""
    paths = [HERE / f"{name}{LOSSES[loss]}{seed}.json" for seed in SEEDS]
    return [read_history(path) for path in paths if path.exists()]


def step_at(history: dict, index: int | None) -> str:
    return "-" if index is None else f"{history['step'][index]:,}"


def phase_of(history: dict, name: str) -> tuple[int | None, int | None]:
    """Return the log points at which a phase of local complexity begins and ends."""
    found = phases.phases(total_complexity(history))
    return next(((first, last) for phase, first, last in found if phase == name), (None, None))


def half_saturated(history: dict) -> int | None:
    reached = np.flatnonzero(column_of(history, "train_saturated") >= 0.5)
    return int(reached[0]) if len(reached) else None


def robust_later(history: dict, epsilon: str) -> np.ndarray:
    """Return robust_acc after interpolation: the medians of three neighbouring log steps, NaN if there are fewer."""
    values = column_of(history["robust_acc"], epsilon)[(interpolation_of(history) or 0) + 1:]
    return np.median(sliding_window_view(values, HOLD), axis=1) if len(values) >= HOLD else np.array([np.nan])


def cells(group: list[dict]) -> list[str]:
    """Return a row of the table: the seeds' values next to each other."""
    spikes = [phases.spikes(history) for history in group]

    def listed(values: list[str]) -> str:
        return " / ".join(values)

    def at(which) -> str:
        return listed([step_at(history, which(history)) for history in group])

    def end(values) -> str:
        return listed([f"{values(history)[-1]:.1f}" for history in group])

    return [at(interpolation_of), at(lambda history: phase_of(history, "ascent")[1]),
            at(lambda history: phase_of(history, "second descent")[0]), at(half_saturated),
            listed([f"{step_at(history, found[0])} ({len(found)})" if found else "-"
                    for history, found in zip(group, spikes, strict=True)]),
            listed([f"{history['robust_acc'][EPSILON][interpolation_of(history)]:.1%}" for history in group]),
            listed([f"{robust_later(history, EPSILON).min():.1%}" for history in group]),
            *(listed([f"{history[measure][EPSILON][-1]:.1%}" for history in group])
              for measure in ("robust_acc", "adv_acc")),
            end(total_complexity), end(lambda history: column_of(history, "weight_norm"))]


def table(what: str, values: dict[str, str]) -> str:
    rows = [[value, f"`{loss}`", *cells(group)] for value, name in values.items() for loss in LOSSES
            if (group := group_of(name, loss))]
    lines = [[what, *HEAD], ["---"] * (1 + len(HEAD)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@panels.default_style
def figure(what: str, values: dict[str, str]) -> panels.Figure:
    """Return robust_acc and local complexity against the step, for each loss, a colour for each value.

    The axes have room for the late phase: all steps before FROM, where all curves are alike, lie close together, and
    local complexity goes only as high as it is later.
    """
    fig = panels.new_figure(8.4, 5.6, f"MNIST by {what}: mean and range of the seeds; for each seed "
                            "a circle where 99% of the training images are right, a tick on top at each loss spike")
    axes = fig.subplots(2, len(LOSSES), sharex=True, sharey="row")
    ordered = what not in ("activation", "optimizer and learning rate")
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(values))) if ordered else KINDS[:len(values)]
    curves = (("robust_acc, ε = 0.10", lambda history: column_of(history["robust_acc"], EPSILON)),
              ("local complexity, train points", total_complexity))
    for (label, curve), row, lowest in zip(curves, axes, (False, True), strict=True):
        top = 0.0
        for ax, loss in zip(row, LOSSES, strict=True):
            groups = [group_of(name, loss) for name in values.values()]
            panels.step_axis(ax, FROM, panels.span(sum(groups, []))[1], 3.6, labelled=lowest)
            for k, (shade, value, group) in enumerate(zip(shades, values, groups, strict=True)):
                if group:
                    panels.draw_curve(ax, group, curve, value, color=shade, lw=1.5)
                for history in group:
                    steps, heights = np.array(history["step"]), curve(history)
                    top = max(top, *heights[steps >= FROM])
                    spikes, fitted = phases.spikes(history), interpolation_of(history)
                    ax.plot(steps[spikes], [1 - 0.03 * k] * len(spikes), "|", ms=5, mew=1.2, color=shade,
                            transform=ax.get_xaxis_transform())
                    if fitted is not None:
                        ax.plot(steps[fitted], heights[fitted], "o", ms=4, color=shade, mfc="white")
            if not lowest:
                ax.set_title(f"--loss={loss}", fontsize=panels.SMALL + 1)
            ax.set_ylabel(label)
            ax.label_outer(remove_inner_ticks=False)
        row[0].set_ylim(0, 1.05 * top)
        if lowest and what == "width":  # it grows with the number of units
            row[0].set(yscale="log", ylim=(0.02, 40))
    panels.lay_out(fig)
    return fig


if __name__ == "__main__":
    for name in sys.argv[1:]:
        figure(*SETTINGS[name]).savefig(HERE / f"late_phase_{name}.png", metadata={"Date": None})
