"""What a run did, in words and tables."""

import textwrap
from collections.abc import Iterable, Sequence

import numpy as np

from analysis import statistics
from analysis.phases import OUTBREAK, outbreaks, phases
from analysis.runs import NOT_COMPARED, asked, differing_flags, flag_text, grouped
from analysis.statistics import CONFIDENCE, HOLD, Rise, column_of, interpolation_of, rises_of, total_complexity
from flags import epsilon_label

WIDTH = 80  # columns of the summary
TABLE_WIDTH = 120  # columns beyond which the flags get lines of their own
UNKNOWN = Rise(np.nan, np.nan)
UNTESTED = "not tested (no later log step, or which images were right is not recorded for both)"


def percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}%"


def tested(rise: Rise) -> bool:
    """Whether log points after interpolation could be compared with it, image by image."""
    return bool(np.isfinite(rise.largest))


def factor(step: int, interpolation_step: int) -> str:
    return f"{step / interpolation_step:,.1f}x" if interpolation_step else "-"


def of_measure(measure: str, rises: dict[str, Rise]) -> dict[str, Rise]:
    """Return {epsilon: Rise} of the curves of "robust" or "adv"."""
    return {label.removeprefix(f"{measure} ε "): rise for label, rise in rises.items() if label.startswith(measure)}


# ---- the summary ----------------------------------------------------------------------------------------------------

def summary(history: dict) -> str:
    """Return text for the end of a run: what generalised or became robust late, local complexity, and outbreaks.

    history: as read_history returns it. The lines are made for 80 columns and stay within 100.
    """
    if not history["step"]:
        return "no log step yet"
    rises = rises_of(history)
    sentences = [fitting_text(history), generalisation_text(history, rises["test"]), *robustness_texts(history, rises),
                 complexity_text(history), *outbreak_texts(history)]
    return "\n".join([*(textwrap.fill(text, WIDTH, subsequent_indent="  ") for text in sentences if text), "",
                      *accuracy_table(history, rises), "",
                      *(textwrap.fill(note, WIDTH) for note in notes(history, rises))])


def fitting_text(history: dict) -> str:
    start, last = interpolation_of(history), history["step"][-1]
    planned = max(last, history["config"].get("n_steps") or 0)
    end = f"ends at step {last:,}" if last == planned else f"has come to step {last:,} of {planned:,}"
    if start is not None:
        return f"Interpolation: train accuracy reaches 99% at step {history['step'][start]:,} (the run {end})."
    if history["train_acc"][0] >= statistics.INTERPOLATION:
        return (f"Interpolation: train accuracy is {percent(history['train_acc'][0])} at the first log step, "
                f"{history['step'][0]:,} (the run {end}); when it reached 99% is not known, so no delay is measured.")
    return (f"Interpolation: train accuracy does not reach 99% within {last:,} steps, it is "
            f"{percent(history['train_acc'][-1])} (the run {end}); so there is no delay to measure.")


def generalisation_text(history: dict, test: Rise) -> str:
    start, reached = interpolation_of(history), int(np.argmax(column_of(history, "test_acc") >= 0.95 * test.final))
    settled = f"reaches 95% of its final value ({percent(test.final)}) at step {history['step'][reached]:,}"
    if start is None:
        return f"Test accuracy {settled}."
    seen = "seen" if reached > start and test.half is not None else "not seen" if tested(test) else UNTESTED
    return f"Delayed generalisation: {seen}; test accuracy {settled} and is {percent(test.start)} at interpolation."


def robustness_texts(history: dict, rises: dict[str, Rise]) -> list[str]:
    """Return sentences on delayed robustness, and on what of it may be numerical."""
    steps, start = history["step"], interpolation_of(history)
    robust, adv = of_measure("robust", rises), of_measure("adv", rises)
    if start is None or not robust:
        return []
    halves = {epsilon: rise.half for epsilon, rise in robust.items() if rise.half is not None}
    text = ("Delayed robustness: not seen; robust accuracy holds no level above its value at interpolation for "
            f"{HOLD} log points.")
    if not any(map(tested, robust.values())):
        text = f"Delayed robustness: {UNTESTED}."
    if halves:
        found = list(halves.values())
        later = ", the later the larger ε" if found == sorted(found) and found[0] < found[-1] else ""
        factors = dict.fromkeys(factor(steps[half], steps[start]) for half in (min(found), max(found)))
        text = (f"Delayed robustness: seen; after interpolation robust accuracy rises at ε {listing(halves)}. Half of "
                f"the rise is reached at {' to '.join(factors)} the step of interpolation{later}.")
    if brief := [epsilon for epsilon, rise in robust.items() if rise.brief]:
        text += f" At ε {listing(brief)} it lies above it for less."
    if dipped := [epsilon for epsilon, rise in robust.items() if rise.half is None and rise.recovery is not None]:
        text += f" At ε {listing(dipped)} it falls after interpolation and recovers."
    numerical = [epsilon for epsilon, rise in adv.items()
                 if rise.half is not None and epsilon in robust and robust[epsilon].half is None]
    if not numerical:
        return [text]
    return [text, f"Numerical: at ε {listing(numerical)} adv rises and robust does not. PGD on cross-entropy finds "
            "fewer attacks there; that can be rounding (a softmax of exactly 1), not robustness."]


def listing(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def complexity_text(history: dict) -> str:
    """Return a sentence on the phases of local complexity, with the values measured at the steps it names."""
    total = total_complexity(history)
    known = np.flatnonzero(np.isfinite(total))
    if not len(known):
        return ""

    def at(i: int) -> str:
        return f"{total[known[i]]:.2f} at step {history['step'][known[i]]:,}"

    words = [f"{name} from {at(first)} to {at(last)}" for name, first, last in phases(total[known])]
    text = ", ".join(words) or f"{at(0)}, {at(-1)}; no change between them counts as a phase"
    return f"Local complexity (training points, r = {next(iter(history['local_complexity']['train']))}): {text}."


def outbreak_texts(history: dict) -> list[str]:
    """Return sentences on the outbreaks of the training loss, and on what changed in the first three of them."""
    found = outbreaks(history)
    if interpolation_of(history) is None:
        return []
    if not found:
        return [f"Training loss: no outbreak after interpolation (it never rises to {OUTBREAK} times its level)."]
    return [f"Training loss: {len(found)} outbreak{'s' * (len(found) > 1)} after interpolation (it rises to {OUTBREAK} "
            f"times its level or more){', the first three' * (len(found) > 3)}:",
            *(outbreak_text(history, i) for i in found[:3])]


def outbreak_text(history: dict, i: int) -> str:
    """Return what changed from log point i - 1 to i, between which the training loss broke out."""
    peak = column_of(history, "max_batch_loss")[i]
    in_batch = "" if np.isnan(peak) else f" (up to {peak:.1e} in a batch)"
    changes = [f"{name} {values[i - 1]:{form}} to {values[i]:{form}}{more}" for name, values, form, more in [
        ("loss", column_of(history, "train_loss"), ".1e", in_batch),
        ("weight norm", column_of(history, "weight_norm"), ".1f", ""),
        ("local complexity", total_complexity(history), ".2f", ""),
        ("test accuracy", column_of(history, "test_acc"), ".1%", "")] if np.isfinite(values[i - 1:i + 1]).all()]
    return f"  Step {history['step'][i - 1]:,} to {history['step'][i]:,}: {', '.join(changes)}."


def accuracy_table(history: dict, rises: dict[str, Rise]) -> list[str]:
    """Return lines: each accuracy at interpolation, in the dip after it, at its highest, at the end; and a verdict."""
    start, width = interpolation_of(history), max(16, *map(len, rises))
    if start is None:
        return [f"{'accuracy':<{width}}{'end':>8}",
                *(f"{label:<{width}}{percent(rise.final):>8}" for label, rise in rises.items())]
    lines = [f"{'accuracy':<{width}}{'at 99%':>8}{'dip':>8}{'highest':>8}{'end':>8}  after interpolation"]
    for label, rise in rises.items():
        cells = "".join(f"{percent(value):>8}" for value in (rise.start, rise.dip, rise.level, rise.final))
        lines.append(f"{label:<{width}}{cells}  {verdict(rise, history['step'], start)}")
    return lines


def verdict(rise: Rise, steps: list[int], start: int) -> str:
    if not tested(rise):
        return "-"
    if rise.half is not None:
        return f"half by step {steps[rise.half]:,}, {factor(steps[rise.half], steps[start])}"
    if rise.recovery is not None:
        return f"dips, recovers by step {steps[rise.recovery]:,}"
    if rise.brief:
        return "rises at the end, not held" if rise.final > (rise.start + rise.largest) / 2 else "rises, not held"
    return "no delayed rise"


def notes(history: dict, rises: dict[str, Rise]) -> list[str]:
    """Return explanations of the summary's rows and columns, of those that it has."""
    from scipy import stats

    compared = any(map(tested, rises.values()))
    words = {
        "robust: right, and no attack on the exact objective succeeds.": of_measure("robust", rises),
        "adv: right after PGD on cross-entropy as computed.": of_measure("adv", rises),
        "at 99%: at interpolation.": interpolation_of(history) is not None,
        f"dip, highest: the lowest later level, if it is lower, and the highest, held for {HOLD} log points. half: of "
        "the rise to highest; 1.5x: at 1.5 times the step of interpolation.": compared}
    chance = ("A rise or recovery counts if it is held and beyond chance (an exact sign test on the images that "
              "changed, corrected for all lines and log points together; "
              f"{CONFIDENCE:.0%} confidence). ") if compared else ""
    images = history["sizes"]["attacked"]
    low, high = stats.binomtest(images // 2, images).proportion_ci(CONFIDENCE, method="wilson")
    return [" ".join(word for word, shown in words.items() if shown), chance + f"Measured on {images:,} images, "
            f"{percent(images // 2 / images)} means {percent(low)} to {percent(high)}."]


# ---- the tables -----------------------------------------------------------------------------------------------------

def middle_epsilon(history: dict) -> str:
    """Return the label of the middle epsilon of a run's grid, "-" if the grid is empty."""
    labels = [epsilon_label(key) for key in history["robust_acc"]] or ["-"]
    return labels[(len(labels) - 1) // 2]


def table_row(history: dict) -> list[str]:
    """Return the cells of one run that do not depend on the other runs."""
    if not history["step"]:
        return ["0"] + ["-"] * 12
    steps, start, rises = history["step"], interpolation_of(history), rises_of(history)
    epsilon, total = middle_epsilon(history), total_complexity(history)
    row = [f"{steps[-1]:,}", percent(history["train_acc"][-1]), percent(rises["test"].final),
           "-" if start is None else f"{steps[start]:,}", epsilon]
    for measure in ("robust", "adv"):
        rise = rises.get(f"{measure} ε {epsilon}", UNKNOWN)
        delay = "-" if not tested(rise) else "brief" if rise.brief else "none"
        row += [percent(rise.start), percent(rise.final),
                delay if start is None or rise.half is None else factor(steps[rise.half], steps[start])]
    total = total[np.isfinite(total)]
    return row + ([f"{min(total):.2f}", f"{max(total):.2f}"] if len(total) else ["-", "-"])


def table(histories: Sequence[dict], names: Sequence[str]) -> str:
    """Return text: one line for each run, with its name and the flags in which the runs differ.

    Robust and adversarial accuracy are those of the middle epsilon of each run's grid, at interpolation and at the end;
    local complexity is the sum over the layers around training points at the first radius, its lowest and highest value
    in the run. Where the lines would be longer than 120 columns, the flags follow in a list of their own.
    """
    flags = differing_flags(histories)
    rows = [["run", *flags, "steps", "train", "test", "99% at", "ε", "robust", "end", "delay", "adv", "end", "delay",
             "LC min", "max"]]
    for name, history in zip(names, histories, strict=True):
        rows.append([name, *(flag_text(flag, history["config"].get(flag)) for flag in flags), *table_row(history)])
    lines = aligned(rows)
    if len(lines[0]) <= TABLE_WIDTH or not flags:
        return "\n".join(lines)
    lines = [*aligned([[row[0], *row[1 + len(flags):]] for row in rows]), ""]
    width = max(map(len, names))
    for name, history in zip(names, histories, strict=True):
        chosen = command_flags(history["config"], [flag for flag in flags if flag in asked(history)])
        lines.append(textwrap.fill(f"{name:<{width}}  {chosen}", TABLE_WIDTH, subsequent_indent=" " * (width + 2),
                                   break_long_words=False, break_on_hyphens=False))
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with the cells in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def markdown_table(histories: Sequence[dict], names: Sequence[str]) -> str:
    """Return Markdown: one row for each configuration, runs that differ only in the seed together.

    names: what to call each run; a row has the name of its first. The epsilon is the middle one of each grid. "then" is
    the step of interpolation; dip and highest are the lowest later level, if it is lower, and the highest, held for
    HOLD log points. Several seeds: mean (lowest to highest), and rises tested on the images of all of them, but for
    runs that have not come as far as the others or not fitted their training set.
    """
    name_of = {id(history): name for history, name in zip(histories, names, strict=True)}
    groups, _ = grouped([history for history in histories if history["step"]])
    rows = [["run", "flags", "training 99% at step", "test accuracy then", "at the end", "ε",
             "`robust_acc` then", "dip", "highest later", "half of the rise by step",
             "`adv_acc` then", "highest later", "half of the rise by step"]]
    rows.append(["---"] * len(rows[0]))
    for group in groups:
        name, seeds, tested = name_of[id(group[0])], len(group), len(statistics.poolable(group))
        if seeds > 1:
            name += f" ({seeds} seeds" + (f", {tested} of them tested)" if tested < seeds else ")")
        flags = [flag for flag in asked(group[0]) if flag not in NOT_COMPARED and (flag != "seed" or seeds == 1)]
        text = command_flags(group[0]["config"], flags)
        rows.append([name, f"`{text}`" if text else "-", *markdown_cells(group)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown_cells(group: Sequence[dict]) -> list[str]:
    """Return what the runs of one configuration did, as the cells of markdown_table."""
    label = middle_epsilon(group[0])
    fitted = [history["step"][start] for history in group if (start := interpolation_of(history)) is not None]
    runs, (steps, pooled) = [rises_of(history) for history in group], statistics.pooled_rises(group)

    def cells(curve: str, *fields: str) -> list[str]:
        return [spread_text([getattr(run[curve], field) for run in runs if curve in run]) for field in fields]

    def rise(curve: str) -> str:
        found = pooled.get(curve, UNKNOWN)
        if found.half is not None:
            return f"{steps[found.half]:,} ({factor(steps[found.half], steps[0])})"
        return f"out of the dip: {steps[found.recovery]:,}" if found.recovery is not None else "-"

    robust, adv = f"robust ε {label}", f"adv ε {label}"
    return [spread_text(fitted, "{:,.0f}"), *cells("test", "start", "final"), label,
            *cells(robust, "start", "dip", "level"), rise(robust), *cells(adv, "start", "level"), rise(adv)]


def command_flags(config: dict, names: Iterable[str]) -> str:
    """Return these flags as one writes them: '--depth=2 --batch_norm'."""
    given = {name: config.get(name) for name in names}
    return " ".join(f"--{name}" if value is True else f"--{name}={flag_text(name, value, between=',')}"
                    for name, value in given.items() if value is not None and value is not False)


def spread_text(values: Sequence[float], form: str = "{:.1%}") -> str:
    """Return '15.9%' of one value or equal ones, '17.4% (15.9% to 20.3%)' of several, '-' of none."""
    values = [value for value in values if np.isfinite(value)]
    if not values:
        return "-"
    low, mean, high = (form.format(value) for value in (min(values), np.mean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"
