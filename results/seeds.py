"""Cross-entropy as computed against the same loss without rounding, seed by seed: a table and the figure of it.

    python results/seeds.py              # draw rounding.png; results/runs.py prints the table
"""

import sys
from pathlib import Path

import numpy as np
from scipy import stats

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from analysis import panels, phases  # noqa: E402
from analysis.statistics import column_of, interpolation_of, total_complexity  # noqa: E402
from records.history import read_history  # noqa: E402

PAIRS = {"MNIST": ("mnist", "mnist_exact"), "digits": ("digits", "digits_exact"),
         "MNIST, learning rate 0.003": ("mnist_lr0.003", "mnist_lr0.003_exact"),
         "MNIST, learning rate 0.0003": ("mnist_lr0.0003", "mnist_lr0.0003_exact"),
         "MNIST, SGD": ("mnist_sgd", "mnist_sgd_exact")}
COLOURS = {"ce": "#D55E00", "exact_ce": "#0072B2"}
NOTE = """Trained with cross-entropy as PyTorch computes it (`ce`) and without its rounding (`exact_ce`), all else
equal. *p over runs*: the share of all divisions of the runs into two groups of these sizes whose means are as far
apart; "-" for fewer than three runs a loss."""
BEFORE = 10_846  # a log step after memorisation and before the first loss spike of `mnist`
FROM = 30  # the figure's axis is logarithmic from this step on


def at_end(column: str, epsilon: str):
    return lambda history: 100 * history[column][epsilon][-1]


def since_interpolation(epsilon: str):
    def change(history: dict) -> float:
        values = history["robust_acc"][epsilon]
        return 100 * (values[-1] - values[interpolation_of(history) or 0])
    return change


def descent(history: dict) -> float:
    """Return local complexity at the end as a multiple of its value at the log step nearest to BEFORE."""
    total = total_complexity(history)
    return total[-1] / total[int(np.argmin(np.abs(np.array(history["step"]) - BEFORE)))]


MEASURES = {
    "`robust_acc` at the end, ε = 0.06": (at_end("robust_acc", "0.06"), "{:.1f}%"),
    "`robust_acc` at the end, ε = 0.10": (at_end("robust_acc", "0.1"), "{:.1f}%"),
    "its change since interpolation, ε = 0.10": (since_interpolation("0.1"), "{:+.1f}"),
    "`adv_acc` at the end, ε = 0.10": (at_end("adv_acc", "0.1"), "{:.1f}%"),
    "of it `rounding`": (at_end("rounding", "0.1"), "{:.1f}"),
    "loss spikes": (lambda history: len(phases.spikes(history)), "{:.0f}"),
    "local complexity at the end": (lambda history: total_complexity(history)[-1], "{:.2f}"),
    f"the same, as a multiple of step {BEFORE:,}": (descent, "{:.2f}"),
}


def seeds_of(name: str) -> list[dict]:
    """Return the histories of a run and of its further seeds, in the order of the seeds: 42, 0, 1, ..."""
    paths = [HERE / f"{name}{seed}.json" for seed in ("", *(f"_seed{i}" for i in range(10)))]
    return [read_history(path) for path in paths if path.exists()]


def p_over_runs(one: list[float], other: list[float]) -> float:
    """Return the share of all divisions of the runs into groups of these sizes whose means are as far apart."""
    return stats.permutation_test((one, other), lambda a, b: abs(np.mean(a) - np.mean(b)), n_resamples=np.inf,
                                  alternative="greater").pvalue


def table() -> str:
    """Return Markdown: each measure of each seed, and the p-value of a permutation of the runs."""
    rows = [["", "measure", "`ce`, each seed", "`exact_ce`, each seed", "p over runs"], ["---"] * 5]
    for what, names in PAIRS.items():
        groups = [seeds_of(name) for name in names]
        if not all(groups):
            continue
        seeds = ["/".join(str(history["config"]["seed"]) for history in group) for group in groups]
        rows.append([what, "seed", *seeds, ""])
        for measure, (value, form) in MEASURES.items():
            if "rounding" in measure and not all("rounding" in history for group in groups for history in group):
                continue
            one, other = ([value(history) for history in group] for group in groups)
            p = f"{p_over_runs(one, other):.3f}" if min(map(len, groups)) > 2 else "-"
            rows.append(["", measure, *(", ".join(map(form.format, values)) for values in (one, other)), p])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@panels.default_style
def figure() -> panels.Figure:
    """Return one line for each seed of `mnist` and `mnist_exact`: robustness, training loss, local complexity."""
    groups = dict(zip(COLOURS, map(seeds_of, PAIRS["MNIST"]), strict=True))
    fig = panels.new_figure(8.6, 6.0, "MNIST, 4 x 200 MLP, one line a seed: trained with F.cross_entropy in float32 "
                            "(orange) and with the same loss computed without rounding (blue)")
    curves = {
        "robust_acc, ε = 0.10": lambda history: 100 * column_of(history["robust_acc"], "0.1"),
        "adv_acc, ε = 0.10 (dashed: without rounding, where measured)":
            lambda history: 100 * column_of(history["adv_acc"], "0.1"),
        "largest training loss of a batch since the last log step": lambda history: column_of(history,
                                                                                            "max_batch_loss"),
        "local complexity around training points": total_complexity}
    for ax, (label, curve) in zip(fig.subplots(2, 2, sharex=True).flat, curves.items(), strict=True):
        panels.step_axis(ax, FROM, 100_000, 3.6, labelled="l" in label[:2])
        for loss, group in groups.items():
            for history in group:
                ax.plot(history["step"], curve(history), color=COLOURS[loss], lw=1.0)
                if label.startswith("adv") and "rounding" in history:
                    rest = curve(history) - 100 * column_of(history["rounding"], "0.1")
                    ax.plot(history["step"], rest, color=COLOURS[loss], lw=1.0, ls=(0, (2, 1)))
                if loss == "ce" and label.startswith("robust"):
                    for i in phases.spikes(history)[:1]:
                        ax.axvspan(*np.array(history["step"])[[i - 1, i]], color="0.9", lw=0)
        if "loss" in label:
            ax.set_yscale("log")
        elif "complexity" in label:
            ax.set_ylim(0, 3)
        else:
            ax.set_ylim(0, None)
        ax.set_title(label, fontsize=panels.SMALL + 1)
    panels.lay_out(fig)
    return fig


if __name__ == "__main__":
    figure().savefig(HERE / "rounding.png", metadata={"Date": None})
