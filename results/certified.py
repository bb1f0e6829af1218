"""What is proved beside what attacks find, and local complexity: the table and the figure of results/certified/*.json.

    python results/certified.py                                        # draw certified.png
    python results/certified.py --table                                # print the table
    python results/certified.py --measure runs/results/mnist [--data_dir=DIR ...]    # write certified/mnist.json

--measure takes run folders with their checkpoints, and flags of remeasure.py. It measures about eight log steps of
each, on the same 200 test images by attack and by proof, which takes minutes.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from analysis import panels  # noqa: E402
from analysis.runs import together  # noqa: E402
from analysis.statistics import column_of, total_complexity  # noqa: E402
from flags import epsilon_label  # noqa: E402
from records.history import read_history, write_history  # noqa: E402

FROM = 30  # the first step measured, and where the figure's axis begins to be logarithmic
POINTS = 8
EPSILONS = ["0.005", "0.01", "0.02", "0.03", "0.06"]
DRAWN = ["0.01", "0.03", "0.06"]
NAMES = {"first": "--preset=first", "digits": "digits", "digits_exact": "digits, exact_ce",
         "digits_large_init": "digits, large init", "mnist": "MNIST",
         "mnist_exact": "MNIST, exact_ce", "mnist_mse": "MNIST, squared error", "mnist_large_init": "MNIST, large init"}


def measure(folder: Path, flags: list[str]) -> None:
    """Measure a run again and write its history to certified/NAME.json."""
    import remeasure
    from records.checkpoints import step_in_name

    steps = np.array(sorted(step_in_name(path) or 0 for path in remeasure.find_checkpoints([str(folder)])))
    wanted = np.geomspace(FROM, steps[-1], POINTS)
    chosen = sorted({int(steps[np.abs(steps - step).argmin()]) for step in wanted})
    with tempfile.TemporaryDirectory() as made:
        if remeasure.main([str(folder), f"--log_dir={made}", f"--steps={','.join(map(str, chosen))}", "--adv_size=200",
                           "--certify=200", "--epsilons", *EPSILONS, *flags]):
            sys.exit(1)
        (HERE / "certified").mkdir(exist_ok=True)
        history = read_history(Path(made) / "training_history.json")
        places = {"data_dir": "data", "log_dir": "remeasured", "save_dir": "checkpoints"}  # not those of this machine
        history["config"] |= places
        write_history(HERE / "certified" / f"{folder.name}.json", history)


def groups() -> dict[str, list[dict]]:
    """Return {name: the histories of its seeds}, in the order of NAMES."""
    found = {name: [read_history(path) for path in (HERE / "certified" / f"{name}{seed}.json" for seed in
                                                    ("", *(f"_seed{i}" for i in range(10)))) if path.exists()]
             for name in NAMES}
    return {name: group for name, group in found.items() if group}


def table() -> str:
    """Return Markdown: for each log step the interval at each epsilon, and local complexity; means over the seeds."""
    rows = [["run", "step", *(f"ε = {epsilon}" for epsilon in EPSILONS), "local complexity"],
            ["---"] * (3 + len(EPSILONS))]
    for name, group in groups().items():
        steps, complexity, _, _ = together(group, total_complexity)
        intervals = [[f"{low:.1%} to {high:.1%}" for low, high in zip(
            *(together(group, lambda history: column_of(history[column], epsilon))[1]  # noqa: B023
              for column in ("certified_acc", "robust_acc")), strict=True)] for epsilon in EPSILONS]
        seeds = f" ({len(group)} seeds)" if len(group) > 1 else ""
        for step, *cells, local in zip(steps, *intervals, complexity, strict=True):
            rows.append([f"`{name}`{seeds}", f"{step:,.0f}", *cells, f"{local:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@panels.default_style
def figure() -> panels.Figure:
    """Return for each run a panel with the interval at each epsilon, and one of local complexity below it."""
    found = groups()
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    fig = panels.new_figure(0.6 + 2.8 * columns, 0.5 + 3.3 * lines, "The accuracy under the strongest attack lies "
                            "between the dotted line (certified_acc) and the solid one (robust_acc), 200 test images")
    axes = fig.subplots(2 * lines, columns, squeeze=False, height_ratios=[2.2, 1] * lines)
    colours = panels.epsilon_colours([{"robust_acc": DRAWN}])
    for i, (name, group) in enumerate(found.items()):
        top, below = axes[2 * (i // columns):, i % columns][:2]
        for epsilon in DRAWN:
            def robust(history: dict, key: str = epsilon) -> np.ndarray:
                return column_of(history["robust_acc"], key)

            def certified(history: dict, key: str = epsilon) -> np.ndarray:
                return column_of(history["certified_acc"], key)

            steps, high, _, _ = together(group, robust)
            top.fill_between(steps, together(group, certified)[1], high, color=colours[epsilon], alpha=0.25, lw=0)
            panels.draw_curve(top, group, certified, band=False, color=colours[epsilon], lw=1.2, ls=(0, (1, 1)))
            panels.draw_curve(top, group, robust, f"ε {epsilon_label(epsilon)}", band=False, color=colours[epsilon],
                              lw=1.4)
        panels.draw_curve(below, group, total_complexity, color=panels.TRAIN, lw=1.2)
        for ax in (top, below):
            panels.step_axis(ax, FROM, panels.span(group)[1], 2.2, labelled=ax is below)
            ax.set_xlim(FROM)
        top.set(ylim=(-0.02, 1.02), yticks=np.linspace(0, 1, 6))
        top.set_yticklabels([f"{share}%" for share in range(0, 101, 20)] if i % columns == 0 else [])
        top.set_title(NAMES[name], fontsize=panels.SMALL + 1)
        below.set_ylim(0)
        if i % columns == 0:
            top.set_ylabel("accuracy", fontsize=panels.SMALL + 1)
            below.set_ylabel("local\ncomplexity", fontsize=panels.SMALL + 1)
    for ax in axes.flat:
        ax.set_visible(ax.has_data())
    panels.lay_out(fig)
    return fig


def main(words: list[str]) -> None:
    if words[:1] == ["--measure"]:
        for folder in (word for word in words[1:] if not word.startswith("-")):
            measure(Path(folder), [word for word in words[1:] if word.startswith("-")])
    elif words == ["--table"]:
        print(table())
    elif not words:
        figure().savefig(HERE / "certified.png", metadata={"Date": None})
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
