"""Every run of this folder in one table, `ce` against `exact_ce` seed by seed, and what moves the late phase.

    python results/runs.py > results/runs.md
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import late_phase  # noqa: E402
import seeds  # noqa: E402

from analysis.phases import spikes  # noqa: E402
from analysis.report import command_flags, middle_epsilon  # noqa: E402
from analysis.runs import NOT_IN_TITLES, asked, grouped  # noqa: E402
from analysis.statistics import (  # noqa: E402
    HOLD,
    LEAST,
    column_of,
    interpolation_of,
    own_epsilons,
    rises_of,
    total_complexity,
)
from flags import epsilon_label  # noqa: E402
from records.history import read_history  # noqa: E402

INTRODUCTION = f"""# The runs

Written by `python results/runs.py > results/runs.md`. `results/run.sh` holds the whole command of each run; the flags
here are those of the experiment.

- *Then*: at interpolation, the first log step with 99% training accuracy.
- *ε*: the middle one of the run's.
- *Lowest later*, *highest later*: of the log steps after interpolation, each replaced by the median of itself and its
  two neighbours, so that one log step in the middle of a loss spike does not count.
- *Half of the rise by step*: where half of a rise of `robust_acc` above its value at interpolation is reached. "-": the
  rise is less than {100 * LEAST:.0f} points or does not last for {HOLD} log steps, or the choice of test images can
  explain it (95% confidence for all curves of a run, see [analysis/statistics.py](../analysis/statistics.py)).
- *`rounding`*: in points, of `adv_acc` at the end, in the seeds where it was measured.
- *Loss spikes*: how often the training loss rises to a hundred times its level after interpolation.
- *Local complexity*: around training points, all layers together.
- †: `robust_acc` of these, or of some of their seeds, is of an earlier version's attack
  ([how much weaker](README.md#9-two-checks-of-robust_acc)).
- *4 seeds*: mean and range over the seeds; a rise: in how many of them.

"""
HEAD = ("run", "flags", "steps", "training 99% at step", "test accuracy then", "at the end", "ε", "`robust_acc` then",
        "lowest later", "highest later", "at the end", "half of the rise by step", "`adv_acc` then", "at the end",
        "of it `rounding`", "loss spikes", "local complexity then", "at the end")


def table(histories: Sequence[dict], names: Sequence[str]) -> str:
    """Return Markdown: one row for each configuration, runs that differ only in the seed together.

    names: what to call each run; a row has the name of its first.
    """
    name_of = {id(history): name for history, name in zip(histories, names, strict=True)}
    rows = [[*HEAD], ["---"] * len(HEAD)]
    for group in grouped(histories)[0]:
        flags = [flag for flag in asked(group[0]) if flag not in NOT_IN_TITLES and flag != "branch_from"]
        text = command_flags(group[0]["config"], flags)
        earlier = any(history["derived"].get("robust_version", 1) == 1 for history in group)
        rows.append([name_of[id(group[0])] + "†" * earlier + f" ({len(group)} seeds)" * (len(group) > 1),
                     f"`{text}`" if text else "-", f"{group[0]['step'][-1]:,}", *cells(group)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells(group: Sequence[dict]) -> list[str]:
    """Return what the runs of one configuration did."""
    epsilon = next(key for key in own_epsilons(group[0]) if epsilon_label(key) == middle_epsilon(group[0]))
    starts = [interpolation_of(history) for history in group]
    fitted = [(history, start) for history, start in zip(group, starts, strict=True) if start is not None]
    halves = [history["step"][half] for history, _ in fitted
              if (half := rises_of(history)[f"robust ε {epsilon_label(epsilon)}"].half) is not None]

    def robust(history: dict) -> np.ndarray:
        return column_of(history["robust_acc"], epsilon)

    def then(curve, form: str = "{:.1%}") -> str:
        return spread([curve(history)[start] for history, start in fitted], form)

    def end(curve, form: str = "{:.1%}") -> str:
        return spread([curve(history)[-1] for history in group], form)

    def adv(history: dict) -> np.ndarray:
        return column_of(history["adv_acc"], epsilon)

    return [spread([history["step"][start] for history, start in fitted], "{:,.0f}"),
            then(lambda history: column_of(history, "test_acc")), end(lambda history: column_of(history, "test_acc")),
            epsilon_label(epsilon), then(robust),
            *(spread([fold(late_phase.robust_later(history, epsilon)) for history, _ in fitted])
              for fold in (min, max)),
            end(robust),
            (f"{len(halves)} of {len(group)}: " * (len(group) > 1) + spread(halves, "{:,.0f}")) if halves else "-",
            then(adv), end(adv), end(lambda history: 100 * column_of(history.get("rounding", {}), epsilon)
                                     if "rounding" in history else [np.nan], "{:.1f}"),
            spread([len(spikes(history)) for history, _ in fitted], "{:.0f}"),
            then(total_complexity, "{:.2f}"), end(total_complexity, "{:.2f}")]


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
    print(f"\n# Seed by seed\n\n{seeds.NOTE}\n\n{seeds.table()}")
    print("\n# What moves the late phase\n\n" + late_phase.__doc__.split("\n\n")[-1].strip())
    for what, values in late_phase.SETTINGS.values():
        print(f"\n## {what.capitalize()}\n\n{late_phase.table(what, values)}")


if __name__ == "__main__":
    main()
