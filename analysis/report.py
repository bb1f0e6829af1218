"""What a run did, in words and tables."""

import csv
import io
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np

from analysis import statistics
from analysis.phases import SPIKE, phases, spikes
from analysis.runs import asked, differing_flags, shown_value, value_of
from analysis.statistics import HOLD, LEAST, Rise, column_of, interpolation_of, rises_of, total_complexity
from flags import epsilon_label
from records.history import History, flat, rows_of

WIDTH = 80  # columns of the summary
TABLE_WIDTH = 120  # columns beyond which the flags get lines of their own


def percentage(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}%"


def untested(history: History, *rises: Rise) -> str:
    """Return why none of these curves could be tested, "" if one could."""
    later = len(history["step"]) - 1 - (interpolation_of(history) or 0)
    if any(rise.compared >= HOLD for rise in rises):
        return ""
    if later < HOLD:
        return (f"too short to say ({later or 'no'} log step{'s' * (later > 1)} after interpolation; a level must last "
                f"for {HOLD})")
    return "not tested (which images were right is not recorded)"


def factor(step: int, start: int) -> str:
    return f"{step / start:,.1f}x" if start else "-"


def of_measure(measure: str, rises: dict[str, Rise]) -> dict[str, Rise]:
    """Return {epsilon: Rise} of the curves of "robust" or "adv"."""
    return {label.removeprefix(f"{measure} ε "): rise for label, rise in rises.items() if label.startswith(measure)}


# ---- the summary ----------------------------------------------------------------------------------------------------

def summary(history: History) -> str:
    """Return text for the end of a run: what generalised or became robust late, local complexity, and loss spikes. Its
    lines are made for 80 columns and stay within 100."""
    if not history["step"]:
        return "no log step yet"
    rises = rises_of(history)
    branch = history.get("branch")
    sentences = ["A branch: what lies before step {step:,} is of {of}.".format(**branch) if branch else "",
                 fitting_text(history), generalisation_text(history, rises["test"]), *robustness_texts(history, rises),
                 gap_text(history), certified_text(history), complexity_text(history), *spike_texts(history)]
    return "\n".join([*(textwrap.fill(text, WIDTH, subsequent_indent="  ") for text in sentences if text), "",
                      *accuracy_table(history, rises), "",
                      *(textwrap.fill(note, WIDTH) for note in notes(history, rises))])


def fitting_text(history: History) -> str:
    step, last = statistics.interpolation_step(history), history["step"][-1]
    planned = max(last, history["config"].get("n_steps") or 0)
    end = f"ends at step {last:,}" if last == planned else f"has come to step {last:,} of {planned:,}"
    if step is not None:
        missing = "; that checkpoint was not measured again, so no delay is measured" * (step not in history["step"])
        return f"Interpolation: train accuracy reaches 99% at step {step:,} (the run {end}){missing}."
    reached = np.flatnonzero(column_of(history, "train_acc") >= statistics.INTERPOLATION)
    accuracy = percentage(history["train_acc"][reached[0] if len(reached) else -1])
    if len(reached):
        return (f"Interpolation: train accuracy is {accuracy} at step {history['step'][reached[0]]:,}, the first of "
                f"those measured with 99% or more (the run {end}); when it reached 99% is not known, so no delay is "
                "measured.")
    return (f"Interpolation: train accuracy does not reach 99% within {last:,} steps, it is {accuracy} (the run "
            f"{end}); so there is no delay to measure.")


def generalisation_text(history: History, test: Rise) -> str:
    start, steps = interpolation_of(history), history["step"]
    if start is None:
        return f"Test accuracy is {percentage(test.final)} at the end."
    seen = "seen" if test.half is not None else untested(history, test) or "not seen"
    half = "" if test.half is None else f", with half of its rise by step {steps[test.half]:,}"
    return (f"Delayed generalisation: {seen}; test accuracy is {percentage(test.start)} at interpolation and "
            f"{percentage(test.final)} at the end{half}.")


def robustness_texts(history: History, rises: dict[str, Rise]) -> list[str]:
    """Return sentences on delayed robustness, and on how much of a rise by adv_acc alone is rounding."""
    steps, start = history["step"], interpolation_of(history)
    robust, adv = of_measure("robust", rises), of_measure("adv", rises)
    if start is None or not robust:
        return []
    halves = {epsilon: rise.half for epsilon, rise in robust.items() if rise.half is not None}
    text = (f"Delayed robustness: not seen; robust accuracy holds no level beyond chance and {100 * LEAST:.0f} points "
            f"above its value at interpolation for {HOLD} log steps.")
    if why := untested(history, *robust.values()):
        text = f"Delayed robustness: {why}."
    if halves:
        found = list(halves.values())
        later = ", the later the larger ε" if found == sorted(found) and found[0] < found[-1] else ""
        factors = dict.fromkeys(factor(steps[half], steps[start]) for half in (min(found), max(found)))
        text = (f"Delayed robustness: seen; after interpolation robust accuracy rises at ε {listing(halves)}. Half of "
                f"the rise is reached at {' to '.join(factors)} the step of interpolation{later}.")
    if brief := [epsilon for epsilon, rise in robust.items() if rise.brief]:
        text += f" At ε {listing(brief)} it rises, but holds that level for fewer."
    if dipped := [epsilon for epsilon, rise in robust.items() if rise.half is None and rise.recovery is not None]:
        text += f" At ε {listing(dipped)} it falls after interpolation and recovers."
    alone = [key for key in history["adv_acc"] if adv[epsilon_label(key)].half is not None
             and epsilon_label(key) in robust and robust[epsilon_label(key)].half is None]
    if not alone:
        return [text]
    seen, parts = f"at ε {listing(map(epsilon_label, alone))} adv rises and robust does not", []
    for key in alone:
        values, rounding = column_of(history, "adv_acc", key), column_of(history, "rounding", key)
        highest = start + 1 + int(np.nanargmax(values[start + 1:]))
        parts.append([values[highest] - values[start], rounding[highest] - rounding[start]])
    if not np.isfinite(parts).all():
        return [text, f"{seen.capitalize()}; how much of that is rounding was not measured."]
    rise, part = np.sum(parts, axis=0)
    cause = "Numerical" if part > rise / 2 else "By the weaker attack"
    gained, rounded = (listing(f"{100 * part:.0f}" for part in column) for column in zip(*parts, strict=True))
    return [text, f"{cause}: {seen}. At its highest adv is {gained} points above interpolation; the part that "
            f"is rounding has grown by {rounded}."]


def gap_text(history: History) -> str:
    """Return how far adv_acc ends above robust_acc and how much of that is rounding, where each is most."""
    parts = {key: [100 * (history["adv_acc"][key][-1] - history["robust_acc"][key][-1]),
                   100 * column_of(history, "rounding", key)[-1]]
             for key in statistics.own_epsilons(history) if np.isfinite(column_of(history, "rounding", key)[-1])}
    if not parts:
        return ""
    widest, rounded = (max(parts, key=lambda key: parts[key][i]) for i in (0, 1))
    gap, rounding = map(round, parts[widest])
    text = (f"At the end adv_acc exceeds robust_acc by {gap} point{'s' * (gap > 1)} at ε = {epsilon_label(widest)}: "
            f"{rounding} of them rounding, {gap - rounding} the weaker attack.") * (gap > 0)
    gap, most = map(round, parts[rounded])
    text += f" Rounding is most at ε = {epsilon_label(rounded)}: {most} of {gap} points." * (most > rounding)
    return text.strip()


def certified_text(history: History) -> str:
    """Return between which bounds the robust accuracy of the certified images lies at the end."""
    outcomes, grid = history.get("outcomes", {}), sorted({0.0, *map(float, statistics.own_epsilons(history))})
    proved, withstood = ((outcomes.get(name) or [None])[-1] for name in ("certified", "robust"))
    if not proved or not withstood:
        return ""
    # Earlier versions certified the first of the attacked images.
    bounds = [pair for pair in zip(proved, withstood, strict=False) if pair[0] != "-"]
    parts = []
    for key in statistics.own_epsilons(history):
        least = chr(48 + grid.index(float(key)))  # codes above it withstand this epsilon
        low, high = (np.mean([code > least for code in codes]) for codes in zip(*bounds, strict=True))
        parts.append(f"at ε = {epsilon_label(key)} between {low:.0%} and {high:.0%}")
    return f"Certified: {listing(parts)} of {len(bounds):,} images withstand every attack."


def listing(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def complexity_text(history: History) -> str:
    """Return a sentence on the phases of local complexity, with the values measured at the steps it names."""
    total = total_complexity(history)
    known = np.flatnonzero(np.isfinite(total))
    if not len(known):
        return ""
    total, steps = total[known], np.array(history["step"])[known]
    found = phases(total)
    words = [f"{name} from {total[first]:.2f} at step {steps[first]:,} to {total[last]:.2f} at step {steps[last]:,}"
             for name, first, last in found]
    if not found:
        words = [f"{total[0]:.2f} at step {steps[0]:,}, {total[-1]:.2f} at step {steps[-1]:,}; no change between them "
                 "counts as a phase"]
    elif found[-1][2] < len(total) - 1:
        words.append(f"{total[-1]:.2f} at the end")
    else:
        name, first, _ = found[-1]
        moving, sign = ("rising", 1) if name.endswith("ascent") else ("falling", -1)
        if sign * (total[-1] - total[-2]) > 0:
            words[-1] = (f"{name} from {total[first]:.2f} at step {steps[first]:,} on, still {moving}, "
                         f"{total[-1]:.2f} at the end")
    return f"Local complexity (training points, r = {statistics.main_radius(history)}): {', '.join(words)}."


def spike_texts(history: History) -> list[str]:
    """Return sentences on the spikes of the training loss, and on what changed in the first three of them."""
    found = spikes(history)
    if interpolation_of(history) is None:
        return []
    rule = f"rises to {SPIKE} times the lowest loss before, or more"
    if not found:
        return [f"Training loss: no spike after interpolation (spikes are {rule})."]
    sentences = [f"Training loss: {len(found)} spike{'s' * (len(found) > 1)} after interpolation ({rule})"
                 f"{', the first three' * (len(found) > 3)}:"]
    peaks = column_of(history, "max_batch_loss")
    for i in found[:3]:
        between = "" if np.isnan(peaks[i]) else f" (in between up to {peaks[i]:.1e} in a batch)"
        changes = [f"{name} {values[i - 1]:{form}} to {values[i]:{form}}{more}" for name, values, form, more in [
            ("loss", column_of(history, "train_loss"), ".1e", between),
            ("weight norm", column_of(history, "weight_norm"), ".1f", ""),
            ("local complexity", total_complexity(history), ".2f", ""),
            ("test accuracy", column_of(history, "test_acc"), ".1%", "")] if np.isfinite(values[i - 1:i + 1]).all()]
        sentences.append(f"  Step {history['step'][i - 1]:,} to {history['step'][i]:,}: {', '.join(changes)}.")
    return sentences


def accuracy_table(history: History, rises: dict[str, Rise]) -> list[str]:
    """Return lines: each accuracy at interpolation, in the dip after it, at its highest, at the end; and a verdict."""
    start, width = interpolation_of(history), max(14, *map(len, rises))
    if start is None:
        return [f"{'accuracy':<{width}}{'end':>8}",
                *(f"{label:<{width}}{percentage(rise.final):>8}" for label, rise in rises.items())]
    lines = [f"{'accuracy':<{width}}{'at 99%':>7}{'dip':>7}{'highest held':>13}{'end':>7}  after interpolation"]
    for label, rise in rises.items():
        at, dip, level, end = map(percentage, (rise.start, rise.dip, rise.level, rise.final))
        said = untested(history, rise).split(" (")[0] or verdict(rise, history["step"], start)
        lines.append(f"{label:<{width}}{at:>7}{dip:>7}{level:>13}{end:>7}  {said}")
    return lines


def verdict(rise: Rise, steps: list[int], start: int) -> str:
    if rise.half is not None:
        return f"half by step {steps[rise.half]:,}, {factor(steps[rise.half], steps[start])}"
    if rise.recovery is not None:
        return f"dips, recovers by step {steps[rise.recovery]:,}"
    if rise.brief:
        return "rises at the end, not held" if rise.final > (rise.start + rise.largest) / 2 else "rises, not held"
    return "no delayed rise"


def notes(history: History, rises: dict[str, Rise]) -> list[str]:
    """Return explanations of the summary's rows and columns, of those that it has."""
    from scipy import stats

    compared = not untested(history, *rises.values())
    words = {
        "robust: classified correctly, also under the strongest of our attacks.": of_measure("robust", rises),
        "adv: classified correctly after PGD on cross-entropy.": of_measure("adv", rises),
        "at 99%: at interpolation.": interpolation_of(history) is not None,
        f"dip, highest held: the lowest later level, if it is lower, and the highest, each held for {HOLD} log steps. "
        "half: of the rise to the highest; 1.5x: at 1.5 times the step of interpolation.": compared}
    chance = (f"A rise or recovery counts if it is held, by {100 * LEAST:.0f} points or more, and beyond chance (an "
              "exact sign test on the images that changed, corrected for all lines and log steps together; "
              f"{statistics.CONFIDENCE:.0%} confidence). That is chance in which test images were drawn, not in "
              "training: only other seeds can tell whether another run does the same. ") if compared else ""
    images = history["sizes"]["attacked"]
    low, high = stats.binomtest(images // 2, images).proportion_ci(statistics.CONFIDENCE, method="wilson")
    return [" ".join(word for word, shown in words.items() if shown), chance + f"Measured on {images:,} images, "
            f"{percentage(images // 2 / images)} means {percentage(low)} to {percentage(high)}.",
            "docs/summary.md explains each line."]


# ---- the tables -----------------------------------------------------------------------------------------------------

def middle_epsilon(history: History) -> str:
    """Return the label of the middle epsilon of a run's grid, "-" if the grid is empty."""
    labels = [epsilon_label(key) for key in statistics.own_epsilons(history)] or ["-"]
    return labels[(len(labels) - 1) // 2]


def table_row(history: History) -> list[str]:
    """Return the cells of one run that do not depend on the other runs."""
    if not history["step"]:
        return ["0"] + ["-"] * 12
    steps, start, rises = history["step"], interpolation_of(history), rises_of(history)
    fitted = statistics.interpolation_step(history)
    epsilon, total = middle_epsilon(history), total_complexity(history)
    row = [f"{steps[-1]:,}", percentage(history["train_acc"][-1]), percentage(rises["test"].final),
           "-" if fitted is None else f"{fitted:,}", epsilon]
    for measure in ("robust", "adv"):
        rise = rises.get(f"{measure} ε {epsilon}", Rise(np.nan, np.nan))
        delay = "-" if untested(history, rise) else "brief" if rise.brief else "none"
        row += [percentage(rise.start), percentage(rise.final),
                delay if start is None or rise.half is None else factor(steps[rise.half], steps[start])]
    total = total[np.isfinite(total)]
    return row + ([f"{min(total):.2f}", f"{max(total):.2f}"] if len(total) else ["-", "-"])


def table(histories: Sequence[History], names: Sequence[str]) -> str:
    """Return text: one line for each run, with its name and the flags in which the runs differ.

    Robust and adversarial accuracy are those of the middle epsilon of a run's grid, local complexity is the lowest and
    highest total. Where the lines would be longer than 120 columns, the flags follow in a list of their own.
    """
    flags = differing_flags(histories)
    rows = [["run", *flags, "steps", "train", "test", "99% at", "ε", "robust", "end", "delay", "adv", "end", "delay",
             "LC min", "max"]]
    for name, history in zip(names, histories, strict=True):
        rows.append([name, *(shown_value(flag, value_of(history, flag)) for flag in flags), *table_row(history)])
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


def csv_table(histories: Sequence[History], names: Sequence[str]) -> str:
    """Return comma-separated values, one line for each log step; of several histories with a first column, run."""
    rows = [{"run": name} | flat(row, history.get("layers", {}).get("names", ()))
            for history, name in zip(histories, names, strict=True) for row in rows_of(history)]
    columns = [name for name in dict.fromkeys(name for row in rows for name in row)
               if any(row.get(name) is not None for row in rows) and (name != "run" or len(histories) > 1)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with the cells in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def command_flags(config: dict, names: Iterable[str]) -> str:
    """Return these flags as one writes them: '--depth=2 --batch_norm'."""
    given = {name: config.get(name) for name in names}
    return " ".join(f"--{name}" if value is True else f"--{name}={shown_value(name, value, between=',')}"
                    for name, value in given.items() if value is not None and value is not False)
