"""Every run of this folder in one table, and the tables of what moves the late phase.

    python results/runs.py > results/runs.md
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import late_phase  # noqa: E402

from analysis.report import UNKNOWN, command_flags, factor, middle_epsilon  # noqa: E402
from analysis.runs import NOT_COMPARED, asked, grouped  # noqa: E402
from analysis.statistics import HOLD, LEAST, interpolation_step, rises_of  # noqa: E402
from records.history import read_history  # noqa: E402

INTRODUCTION = f"""# The runs

Written by `python results/runs.py > results/runs.md`. `results/run.sh` holds the command of each run.

- *Then*: at interpolation, the first log step with 99% training accuracy.
- *ε*: the middle one of the run's.
- *Dip*, *highest held*: the lowest level after interpolation, if it is below the value at interpolation, and the
  highest, each held for {HOLD} log steps.
- *Half of the rise by step*: where half of the rise to the highest level held is reached, and the ratio to the step of
  interpolation; "-" if the rise is less than {100 * LEAST:.0f} points or the choice of test images can explain it (95%
  confidence for all curves of a run together). *Out of the dip*: it rises from its lowest level only.
- *4 seeds*: mean and range over the seeds; for a rise, in how many of them it is seen, and the range of its steps.

"""
HEAD = ("run", "flags", "training 99% at step", "test accuracy then", "at the end", "ε", "`robust_acc` then", "dip",
        "highest held", "half of the rise by step", "`adv_acc` then", "highest held", "half of the rise by step")


def table(histories: Sequence[dict], names: Sequence[str]) -> str:
    """Return Markdown: one row for each configuration, runs that differ only in the seed together.

    names: what to call each run; a row has the name of its first.
    """
    name_of = {id(history): name for history, name in zip(histories, names, strict=True)}
    groups, _ = grouped([history for history in histories if history["step"]])
    rows = [[*HEAD], ["---"] * len(HEAD)]
    for group in groups:
        seeds = len(group)
        flags = [flag for flag in asked(group[0]) if flag not in NOT_COMPARED and (flag != "seed" or seeds == 1)]
        text = command_flags(group[0]["config"], flags)
        rows.append([name_of[id(group[0])] + f" ({seeds} seeds)" * (seeds > 1), f"`{text}`" if text else "-",
                     *cells(group)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells(group: Sequence[dict]) -> list[str]:
    """Return what the runs of one configuration did."""
    label, runs = middle_epsilon(group[0]), [rises_of(history) for history in group]
    fitted = [step for history in group if (step := interpolation_step(history)) is not None]

    def values(curve: str, *fields: str) -> list[str]:
        return [spread([getattr(run[curve], field) for run in runs if curve in run]) for field in fields]

    def rise(curve: str) -> str:
        found: dict[str, list[int]] = {"": [], "out of the dip: ": []}
        for history, run in zip(group, runs, strict=True):
            this = run.get(curve, UNKNOWN)
            if this.half is not None:
                found[""].append(history["step"][this.half])
            elif this.recovery is not None:
                found["out of the dip: "].append(history["step"][this.recovery])
        if len(group) == 1 and found[""]:
            return f"{found[''][0]:,} ({factor(found[''][0], fitted[0])})"
        texts = [words + f"{len(steps)} of {len(group)}, " * (len(group) > 1) + f"{min(steps):,}"
                 + f" to {max(steps):,}" * (len({*steps}) > 1) for words, steps in found.items() if steps]
        return "; ".join(texts) or "-"

    robust, adv = f"robust ε {label}", f"adv ε {label}"
    return [spread(fitted, "{:,.0f}"), *values("test", "start", "final"), label,
            *values(robust, "start", "dip", "level"), rise(robust), *values(adv, "start", "level"), rise(adv)]


def spread(values: Sequence[float], form: str = "{:.1%}") -> str:
    """Return '15.9%' of one value or equal ones, '17.4% (15.9% to 20.3%)' of several, '-' of none."""
    values = [value for value in values if np.isfinite(value)]
    if not values:
        return "-"
    low, mean, high = (form.format(value) for value in (min(values), np.mean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    paths = sorted(HERE.glob("*.json"))
    print(INTRODUCTION + table([read_history(path) for path in paths], [path.stem for path in paths]))
    print("\n# What moves the late phase\n\n" + late_phase.__doc__.split("\n\n")[-1].strip())
    for what, values in late_phase.SETTINGS.values():
        print(f"\n## {what.capitalize()}\n\n{late_phase.table(what, values)}")


if __name__ == "__main__":
    main()
