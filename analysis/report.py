"""What a run did, in words and tables."""

import json
import textwrap

import numpy as np

from analysis.phases import OUTBREAK, outbreaks, phases, smoothed
from analysis.runs import NOT_COMPARED, differing_flags, flag_text, grouped, short_names
from analysis.statistics import (
    CONFIDENCE,
    HOLD,
    Rise,
    column_of,
    interpolation_index,
    last_value,
    pooled_rises,
    rises_of,
    total_complexity,
    wilson_interval,
)
from flags import epsilon_label

WIDTH = 80  # columns of the summary


def percent(value):
    return "-" if np.isnan(value) else f"{100 * value:.1f}%"


def factor(step, interpolation_step):
    return f"{step / interpolation_step:,.1f}x" if interpolation_step else "-"


def listing(words):
    *most, last = words  # a list of strings, or a dict's keys
    return f"{', '.join(most)} and {last}" if most else last


def summary(history):
    """Text for the end of a run: what generalised or became robust late, what local complexity and the loss did.

    history: dict of the history file (see README). The lines are made for 80 columns and stay within 100.
    """
    if not history["step"]:
        return "no log step yet"
    rises = rises_of(history)
    lines = [fitting_text(history), *accuracy_texts(history, rises), complexity_text(history), *outbreak_texts(history)]
    lines = [textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines if line]
    return "\n".join([*lines, "", *accuracy_table(history, rises), "",
                      *(textwrap.fill(note, WIDTH) for note in notes(history))])


def fitting_text(history):
    start, last = interpolation_index(history.get("train_acc", [])), history["step"][-1]
    planned = max(last, history["config"].get("n_steps") or 0)
    end = f"ends at step {last:,}" if last == planned else f"has come to step {last:,} of {planned:,}"
    if start is not None:
        return f"Interpolation: train accuracy reaches 99% at step {history['step'][start]:,} (the run {end})."
    return (f"Interpolation: train accuracy does not reach 99% within {last:,} steps, it is "
            f"{percent(last_value(column_of(history, 'train_acc')))} (the run {end}); so there is no delay to measure.")


def accuracy_texts(history, rises):
    """Sentences on delayed generalisation, on delayed robustness, and on what of the latter may be numerical."""
    steps, start = history["step"], interpolation_index(history.get("train_acc", []))
    test = rises["test"]
    reached = np.flatnonzero(column_of(history, "test_acc") >= 0.95 * test.final)
    settled = (f"test accuracy reaches 95% of its final value ({percent(test.final)}) at step {steps[reached[0]]:,}"
               if len(reached) else "test accuracy is unknown")
    if start is None:
        return [settled[0].upper() + settled[1:] + "."]
    late = len(reached) > 0 and reached[0] > start and test.half is not None
    return [f"Delayed generalisation: {'seen' if late else 'not seen'}; {settled} and is {percent(test.start)} at "
            "interpolation.", robustness_text(rises, steps, start), numerical_text(rises)]


def robustness_text(rises, steps, start):
    robust = of_measure("robust", rises)
    if not robust:
        return ""
    rising = {epsilon: rise.half for epsilon, rise in robust.items() if rise.half is not None}
    text = ("Delayed robustness: not seen; robust accuracy holds no level above its value at interpolation for "
            f"{HOLD} log points.")
    if rising:
        halves = list(rising.values())
        later = ", the later the larger ε" if halves == sorted(halves) and halves[0] < halves[-1] else ""
        first, last = (factor(steps[half], steps[start]) for half in (min(halves), max(halves)))
        text = (f"Delayed robustness: seen; after interpolation robust accuracy rises at ε {listing(rising)}. Half of "
                f"the rise is reached at {first if first == last else f'{first} to {last}'} the step of "
                f"interpolation{later}.")
    briefly = [epsilon for epsilon, rise in robust.items() if rise.brief]
    dipped = [epsilon for epsilon, rise in robust.items() if rise.half is None and rise.recovery is not None]
    return (text + (f" At ε {listing(briefly)} it lies above it for less." if briefly else "")
            + (f" At ε {listing(dipped)} it falls after interpolation and recovers." if dipped else ""))


def numerical_text(rises):
    robust, adv = of_measure("robust", rises), of_measure("adv", rises)
    numerical = [epsilon for epsilon, rise in adv.items()
                 if rise.half is not None and epsilon in robust and robust[epsilon].half is None]
    return numerical and (f"Numerical: at ε {listing(numerical)} adv rises and robust does not. PGD on cross-entropy "
                          "finds fewer attacks there; that can be rounding (a softmax of exactly 1), not robustness.")


def of_measure(measure, rises):
    """{epsilon: Rise} of the curves of "robust" or "adv"."""
    return {label.removeprefix(f"{measure} ε "): rise for label, rise in rises.items() if label.startswith(measure)}


def complexity_text(history):
    total = total_complexity(history)
    known = np.flatnonzero(np.isfinite(total))
    if not len(known):
        return ""
    steps, total = np.array(history["step"])[known], total[known]
    found, level = phases(total), smoothed(total)
    words = []
    for i, (name, first, last) in enumerate(found):
        end = found[i + 1][1] if i + 1 < len(found) else len(level)
        highest, lowest = (np.max, np.min) if name.endswith("ascent") else (np.min, np.max)
        start = f" from {lowest(level[:first + 1]):.2f}" if i == 0 else ""
        words.append(f"{name}{start} to {highest(level[first:end + 1]):.2f} by step {steps[last]:,}")
    text = ", ".join(words) or f"no phases, it stays between {total.min():.2f} and {total.max():.2f}"
    return f"Local complexity (training points, r = {next(iter(history['local_complexity']['train']))}): {text}."


def outbreak_texts(history):
    """Sentences on the outbreaks of the training loss, and on what the first three of them changed."""
    start = interpolation_index(history.get("train_acc", []))
    if start is None or not np.isfinite(column_of(history, "train_loss")[start:]).any():
        return []
    found = outbreaks(history)
    if not found:
        return [f"Training loss: no outbreak after interpolation (it never rises to {OUTBREAK} times its level)."]
    number = f"{len(found)} outbreaks" if len(found) > 1 else "1 outbreak"
    return [f"Training loss: {number} after interpolation (it rises to {OUTBREAK} times its level or more)"
            + (", the first three:" if len(found) > 3 else ":"), *(outbreak_text(history, i) for i in found[:3])]


def outbreak_text(history, i):
    """What an outbreak between the log points i - 1 and i changed, from the one to the other."""
    peak = column_of(history, "max_batch_loss")[i]
    changes = {f"loss {{}} to {{}}{'' if np.isnan(peak) else f' (up to {peak:.1e} in a batch)'}":
               [f"{value:.1e}" for value in column_of(history, "train_loss")[i - 1:i + 1]],
               "weight norm {} to {}": [f"{value:.1f}" for value in column_of(history, "weight_norm")[i - 1:i + 1]],
               "local complexity {} to {}": [f"{value:.2f}" for value in total_complexity(history)[i - 1:i + 1]],
               "test accuracy {} to {}": [percent(value) for value in column_of(history, "test_acc")[i - 1:i + 1]]}
    known = [form.format(*values) for form, values in changes.items() if not {"nan", "-"} & set(values)]
    return f"  Step {history['step'][i - 1]:,} to {history['step'][i]:,}: {', '.join(known)}."


def accuracy_table(history, rises):
    """Lines: each accuracy at interpolation, in the dip after it, at its highest later, at the end; and a verdict."""
    steps, start = history["step"], interpolation_index(history.get("train_acc", []))
    width = max(16, *map(len, rises))
    if start is None:
        return [f"{'accuracy':<{width}}{'end':>8}",
                *(f"{label:<{width}}{percent(rise.final):>8}" for label, rise in rises.items())]
    lines = [f"{'accuracy':<{width}}{'at 99%':>8}{'dip':>8}{'highest':>8}{'end':>8}  after interpolation"]
    for label, rise in rises.items():
        cells = "".join(f"{percent(value):>8}" for value in (rise.start, rise.dip, rise.level, rise.final))
        lines.append(f"{label:<{width}}{cells}  {verdict(rise, steps, steps[start])}")
    return lines


def verdict(rise, steps, interpolation_step):
    if np.isnan(rise.largest):
        return "-"
    if rise.half is not None:
        return f"half by step {steps[rise.half]:,}, {factor(steps[rise.half], interpolation_step)}"
    if rise.recovery is not None:
        return f"dips, recovers by step {steps[rise.recovery]:,}"
    if rise.brief:
        return "rises at the end, not held" if rise.final > (rise.start + rise.largest) / 2 else "rises, not held"
    return "no delayed rise"


def notes(history):
    images = history["sizes"].get("attacked") or history["sizes"].get("test") or 1
    low, high = wilson_interval(0.5, images)
    how = ("image by image (exact McNemar test" if any(history.get("outcomes", {}).values()) else
           "as if on new images (Wilson scores")
    return ["robust: right, and no attack on the exact objective succeeds. adv: right after PGD on cross-entropy as "
            "computed. at 99%: at interpolation. dip, highest: the lowest later level, if it is lower, and the "
            f"highest, held for {HOLD} log points. half: of the rise to highest; 1.5x: at 1.5 times the step of "
            "interpolation.",
            f"A rise or recovery counts if it is held and no chance of the images, compared {how}; with "
            f"{CONFIDENCE:.0%} confidence this is right for all lines together). Measured on {images:,} images, 50.0% "
            f"means {percent(low)} to {percent(high)}."]


def middle_epsilon(history):
    """The label of the middle epsilon of a run's grid, or None."""
    labels = [epsilon_label(key) for key in history.get("robust_acc", {})]
    return labels[(len(labels) - 1) // 2] if labels else None


def table_row(history):
    """The cells of one run that do not depend on the other runs."""
    if not history["step"]:
        return ["0"] + ["-"] * 12
    steps, start, rises = history["step"], interpolation_index(history.get("train_acc", [])), rises_of(history)
    row = [f"{steps[-1]:,}", percent(last_value(column_of(history, "train_acc"))),
           percent(rises["test"].final), "-" if start is None else f"{steps[start]:,}"]
    epsilon = middle_epsilon(history)
    row.append(epsilon or "-")
    for measure in ("robust", "adv"):
        rise = rises.get(f"{measure} ε {epsilon}", Rise(np.nan, np.nan))
        delay = "-" if np.isnan(rise.largest) else "brief" if rise.brief else "none"
        row += [percent(rise.start), percent(rise.final),
                delay if rise.half is None else factor(steps[rise.half], steps[start])]
    totals = total_complexity(history)
    totals = totals[np.isfinite(totals)]
    return row + ([f"{min(totals):.2f}", f"{max(totals):.2f}"] if len(totals) else ["-", "-"])


def table(histories, names=None):
    """Text: one line a run, with the flags in which the runs differ.

    names: what to call each run, by default config["log_dir"]. Robust and adversarial accuracy are those of the middle
    epsilon of each run's grid, at interpolation and at the end; local complexity is the sum over the layers around
    training points at the first radius, its lowest and highest value in the run.
    """
    names = names or short_names([history["config"].get("log_dir", "-") for history in histories])
    flags = differing_flags(histories)
    rows = [["run", *flags, "steps", "train", "test", "99% at", "ε", "robust", "end", "delay", "adv", "end", "delay",
             "LC min", "max"]]
    rows += [[name, *(flag_text(flag, history["config"].get(flag)) for flag in flags), *table_row(history)]
             for name, history in zip(names, histories, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def markdown_table(histories, names=None, epsilon=None):
    """Markdown: one row a configuration, runs that differ in their seed only together, for results/README.md.

    names: what to call each run; a row has the name of its first. epsilon: a key of robust_acc, by default the middle
    one of each grid. "then" is the step of interpolation; dip and highest are the lowest later level, if it is lower,
    and the highest, held for HOLD log points. Of several seeds: mean (lowest to highest), and rises tested on all
    their images together.
    """
    names = names or short_names([history["config"].get("log_dir", "-") for history in histories])
    name_of = {id(history): name for history, name in zip(histories, names, strict=True)}
    groups, _ = grouped([history for history in histories if history["step"]])
    usual = usual_flags(histories)
    rows = [["run", "flags", "training 99% at step", "test accuracy then", "at the end", "ε",
             "`robust_acc` then", "dip", "highest later", "half of the rise by step",
             "`adv_acc` then", "highest later", "half of the rise by step"]]
    rows.append(["---"] * len(rows[0]))
    for group in groups:
        seeds = f" ({len(group)} seeds)" if len(group) > 1 else ""
        rows.append([name_of[id(group[0])] + seeds, chosen_flags(group, usual), *markdown_cells(group, epsilon)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown_cells(group, epsilon=None):
    """What the runs of one configuration did, as the cells of markdown_table."""
    label = epsilon_label(epsilon) if epsilon else middle_epsilon(group[0])
    starts = [interpolation_index(history.get("train_acc", [])) for history in group]
    fitted = [history["step"][start] for history, start in zip(group, starts, strict=True) if start is not None]
    runs, (steps, pooled) = [rises_of(history) for history in group], pooled_rises(group)

    def cells(curve, *fields):
        return [spread_text([getattr(run[curve], field) for run in runs if curve in run]) for field in fields]

    def rise(curve):
        found = pooled.get(curve, Rise(np.nan, np.nan))
        if found.half is not None:
            return f"{steps[found.half]:,} ({factor(steps[found.half], steps[0])})"
        return f"out of the dip: {steps[found.recovery]:,}" if found.recovery is not None else "-"

    robust, adv = f"robust ε {label}", f"adv ε {label}"
    return [spread_text(fitted, "{:,.0f}"), *cells("test", "start", "final"), label or "-",
            *cells(robust, "start", "dip", "level"), rise(robust), *cells(adv, "start", "level"), rise(adv)]


def usual_flags(histories):
    """{flag: the JSON of its most frequent value}."""
    values = {}
    for history in histories:
        for flag, value in history["config"].items():
            values.setdefault(flag, []).append(json.dumps(value))
    return {flag: max(texts, key=texts.count) for flag, texts in values.items()}


def chosen_flags(group, usual):
    """The flags that the user chose for these runs, as they are written, or '-'.

    Where a history does not say which they are: those that have not their usual value.
    """
    config = group[0]["config"]
    names = group[0].get("asked", [flag for flag, value in config.items() if json.dumps(value) != usual[flag]])
    aside = NOT_COMPARED - {"n_steps", "n_epochs"} | ({"seed"} if len(group) > 1 else set())
    text = command_flags(config, [name for name in names if name not in aside])
    return f"`{text}`" if text else "-"


def command_flags(config, names):
    """These flags as one writes them: '--depth=2 --batch_norm'."""
    given = {name: config[name] for name in names if not (config.get(name) is None or config[name] is False)}
    return " ".join(f"--{name}" if value is True else f"--{name}={flag_text(name, value, between=',')}"
                    for name, value in given.items())


def spread_text(values, form="{:.1%}"):
    """'15.9%' of one value or equal ones, '17.4% (15.9% to 20.3%)' of several, '-' of none."""
    values = [value for value in values if np.isfinite(value)]
    if not values:
        return "-"
    low, mean, high = (form.format(value) for value in (min(values), np.mean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"
