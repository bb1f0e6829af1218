"""The paper's Figure 1, ResNet-18 on all of CIFAR-10: draw resnet18_whole.png.

    python results/whole.py
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from analysis import panels  # noqa: E402
from analysis.statistics import column_of  # noqa: E402
from flags import epsilon_label  # noqa: E402
from records.history import read_history  # noqa: E402

RUNS = {"resnet18_whole_seed1": ("seed 1", "#0072B2", "o-"), "resnet18_whole": ("seed 42", "#D55E00", "s-"),
        "resnet18_whole_exact": ("seed 42, exact_ce from step 3,970 on", "#009E73", "^-")}
LARGE = "0.0313725"  # 8/255, as far as ten steps of the authors' 0.8/255 go
FLOOR = 0.1  # percent; half an image of 500 stands for none


@panels.default_style
def figure() -> panels.Figure:
    """Return accuracies of one seed on a logarithmic axis, and how many images withstand the authors' attack."""
    fig = panels.new_figure(9.0, 4.2, "ResNet-18 on all 50,000 images of CIFAR-10, 500 of its test images attacked as "
                            "its authors attack them (no random start, ten steps of 0.8/255)")
    left, right = fig.subplots(1, 2)
    known = {name: read_history(HERE / f"{name}.json") for name in RUNS if (HERE / f"{name}.json").exists()}
    history = next(iter(known.values()))
    last = max(max(run["step"]) for run in known.values())
    panels.step_axis(left, 100, last, 3.6)
    panels.draw_curve(left, [history], lambda run: 100 * column_of(run, "train_acc"), "train", color=panels.TRAIN)
    panels.draw_curve(left, [history], lambda run: 100 * column_of(run, "test_acc"), "test", color=panels.TEST, lw=1.6)
    keys = [key for key in history["adv_acc"] if float(key) <= float(LARGE)]
    for key, shade in zip(keys, matplotlib.colormaps["viridis"](np.linspace(0.8, 0.0, len(keys))), strict=True):
        for column, style in (("adv_acc", {"ls": (0, (3, 1.5)), "lw": 1.0}), ("robust_acc", {"lw": 1.6})):
            def percent(run: dict, column: str = column, key: str = key) -> np.ndarray:
                return np.maximum(100 * column_of(run[column], key), FLOOR)

            name = f"ε {epsilon_label(key)}" if column == "adv_acc" else ""
            panels.draw_curve(left, [history], percent, name, color=shade, **style)
    left.set_yscale("log")
    left.set_ylim(FLOOR * 0.9, 105)
    left.set_yticks([FLOOR, 0.2, 1, 10, 100], ["0%", "0.2%", "1%", "10%", "100%"])
    left.set_title(f"seed {history['config']['seed']}: adv_acc dashed, robust_acc solid", fontsize=panels.SMALL + 1)
    for name, run in known.items():
        label, colour, marks = RUNS[name]
        steps, images = np.array(run["step"]), run["sizes"]["attacked"] * column_of(run["adv_acc"], LARGE)
        late = steps >= 2504  # the branch copies its parent's step 0; the axis is for what comes late
        right.plot(steps[late], images[late], marks, ms=4, lw=1.0, color=colour, label=label)
        if "rounding" in run:
            left_over = images - run["sizes"]["attacked"] * column_of(run["rounding"], LARGE)
            right.plot(steps, left_over, marks[0], ms=5, color=colour, mfc="white", clip_on=False,
                       label=f"{label}: and the same attack without rounding")
    ticks = [step for step in (2500, 5000, 10_000, 25_000, 50_000, 100_000) if step <= last]
    right.set(xscale="log", xlim=(2300, 1.1 * last), ylim=(0, None), xlabel="step")
    right.set_xticks(ticks, [f"{step:,}" for step in ticks], fontsize=panels.SMALL)
    right.minorticks_off()
    right.spines[["top", "right"]].set_visible(False)
    right.set_title("images of 500 that withstand it at 8/255", fontsize=panels.SMALL + 1)
    right.legend(fontsize=panels.SMALL, frameon=False, loc="upper left")
    panels.lay_out(fig)
    return fig


if __name__ == "__main__":
    figure().savefig(HERE / "resnet18_whole.png", metadata={"Date": None})
