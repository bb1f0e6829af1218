"""What a run prints: its settings, a table row for each log step, and its progress in between."""

import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable

from tqdm import tqdm

from flags import EXPERIMENT, MEASUREMENT, SCHEDULE, epsilon_label, flag_text, flags_of, history_key
from measure import Row
from records.history import History

SECONDS_BETWEEN_LINES = 60
SECONDS_BEFORE_ESTIMATE, STEPS_BEFORE_ESTIMATE = 5, 10
MOST_EPSILONS = 6
WIDTH = 100
# The flags that the header lists if they were given: those that it does not name in words of its own.
SWITCHES = {"compile"} | flags_of(EXPERIMENT, MEASUREMENT) - SCHEDULE - {
    "model", "depth", "width", "activation", "dataset", "train_size", "adv_size", "optimizer", "lr", "weight_decay",
    "loss", "batch_size", "dtype", "seed", "branch_from", "epsilons"}


class Console:
    """Prints a run's progress: on a terminal a bar below the table, elsewhere a line each minute.

    quiet: print nothing (--quiet, and the other processes of a distributed run).
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bar: tqdm | None = None
        self.latest = ""

    def note(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if not self.quiet:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def header(self, history: History) -> None:
        """Print what is trained, on which data, where, and into which files."""
        config, sizes, derived, environment = (history[key] for key in ("config", "sizes", "derived", "environment"))
        depth = f" depth {config['depth']}" if config["depth"] else ""
        processes = f", {environment['processes']} processes" if environment["processes"] > 1 else ""
        branch = history.get("branch")
        parent = f"branch   from step {branch['step']:,}, {branch['of']}\n" if branch else ""
        given = ", ".join(name if config[name] is True else f"{name} {flag_text(config[name])}"
                          for name in history["asked"] if name in SWITCHES)
        also = f"with     {given}\n" if given else ""
        threads = f"\nthreads  {derived['threads']} in training, {derived['eval_threads']} in log steps" * (
            config["device"] == "cpu")
        self.note(
            f"model    {config['model']}{depth} width {config['width']} {config['activation']}: "
            f"{sizes['parameters']:,} parameters\n"
            f"data     {config['dataset']}: {sizes['train']:,} train, {sizes['test']:,} test ({sizes['attacked']:,} "
            f"attacked), {' x '.join(map(str, sizes['in_shape']))}, {sizes['num_classes']} classes\n"
            f"training {config['n_steps']:,} steps of {config['batch_size']} images, {config['optimizer']} "
            f"lr {config['lr']:g} weight decay {config['weight_decay']:g},\n"
            f"         loss {config['loss']}, {config['dtype']}, seed {config['seed']}\n{also}{parent}"
            f"device   {environment['device']}{processes}{threads}\n"
            f"files    {config['log_dir']}/training_history.json, {config['save_dir']}/checkpoint_epoch_*.pt\n")

    def start(self, epsilons: list[float], radii: list[float], step: int, n_steps: int, log_steps_left: int) -> None:
        """Print the table's head, and begin to measure the time. log_steps_left: the number of log steps to come,
        including one at this step."""
        self.n_steps, self.log_steps_left = n_steps, log_steps_left
        self.next_line = time.monotonic() + SECONDS_BEFORE_ESTIMATE
        self.paced_from: int | None = None  # the step from which the pace is measured
        self.trained = 0.0  # seconds of training since then
        self.log_step_took = 0.0  # seconds of the last one
        self.measuring_since: float | None = None
        keys = [*map(history_key, epsilons)]
        column = max(5, *(len(epsilon_label(key)) for key in keys)) + 1
        adv = max(7, column - 1)
        self.radii = thin([*map(history_key, radii)], 2)
        complexity = [f"r {radius}" for radius in self.radii]
        lengths = [max(7, len(label)) for label in complexity]
        # Beside the accuracies under attack stand 45 characters and local complexity.
        room = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) - 45 - sum(lengths) - len(lengths) - adv
        self.keys = thin(keys, max(2, min(MOST_EPSILONS, room // column)))
        self.middle = self.keys[(len(self.keys) - 1) // 2]  # as in the table of plot.py
        self.widths = [8, 8, 5, 5, *[column - 1] * len(self.keys), adv, *lengths, 7, 6]
        robust = column * len(self.keys)
        title = next(text for text in ("robust_acc at epsilon", "robust_acc", "rob.") if len(text) < robust)
        self.note(f"{'':29} {title:{robust}}{'adv_acc':>{adv}} {'compl.':>{lengths[0]}}")
        self.print_row("step", "loss", "train", "test", *map(epsilon_label, self.keys), epsilon_label(self.middle),
                       *complexity, "|w|", "s")
        if not self.quiet and sys.stderr.isatty() and not in_notebook():
            self.bar = tqdm(total=n_steps, initial=step, unit="step", dynamic_ncols=True, leave=False)

    def print_row(self, *cells: str) -> None:
        self.note(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, self.widths, strict=True)))

    def row(self, row: Row, remarks: Iterable[str] = ()) -> None:
        """Print the table row of a log step, accuracies in percent, and the remarks below it."""
        if self.measuring_since is not None:
            self.log_step_took, self.measuring_since = time.monotonic() - self.measuring_since, None
        self.log_steps_left -= 1
        counted = row["local_complexity"].get("train", {})
        complexity = [decimals(sum(counted.get(radius, [math.nan]))) for radius in self.radii]
        robust = {key: in_percent(row["robust_acc"][key]) for key in self.keys}
        self.print_row(str(row["step"]), f"{row['train_loss']:.2e}", in_percent(row["train_acc"]),
                       in_percent(row["test_acc"]), *robust.values(), in_percent(row["adv_acc"][self.middle]),
                       *complexity, decimals(row["weight_norm"]), f"{row['seconds']:.0f}")
        for remark in remarks:
            self.note(textwrap.fill(f"note: {remark}", WIDTH, subsequent_indent="      "))
        self.latest = f"test {in_percent(row['test_acc'])} robust {robust[self.middle]}"

    def measuring(self, what: str, share: float) -> None:
        """Show what a log step measures and which share of it is done, if the log step is long."""
        now = time.monotonic()
        self.measuring_since = self.measuring_since or now
        if self.bar is not None:
            self.bar.set_postfix_str(f"{what} {100 * share:.0f}%")
        elif now > self.next_line and now > self.measuring_since + SECONDS_BETWEEN_LINES:
            self.line(f"measuring: {what}, {100 * share:.0f}% done")

    def progress(self, step: int, seconds: float) -> None:
        """Move the bar, or print a line if the last is a minute old: how long it takes and will take. seconds: what the
        steps since the last call took."""
        if self.paced_from is None:
            self.paced_from = step  # the first steps, which may compile the network, say nothing of the pace
        else:
            self.trained += seconds
        if self.bar is not None:
            self.bar.set_postfix_str(self.latest, refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.monotonic() > self.next_line and step >= self.paced_from + STEPS_BEFORE_ESTIMATE:
            pace, took = self.trained / (step - self.paced_from), self.log_step_took
            left = tqdm.format_interval(pace * (self.n_steps - step) + took * self.log_steps_left)
            log_step = f"{took:.1f} s for a log step, " if took else ""
            self.line(f"step {step:,} of {self.n_steps:,}: {1 / pace:,.0f} steps/s, {log_step}{left} to go")

    def line(self, text: str) -> None:
        self.next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        self.note(f"… {text}")

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()


def attempt(work: Callable[[], object], failure: str, note: Callable[[str], None]) -> bool:
    """Return whether work() succeeds; an error of whatever kind is one note: what draws or tracks never ends a run."""
    try:
        work()
        return True
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        note(f"{failure} ({type(error).__name__}: {reason}); the run goes on without it")
        return False


def in_notebook() -> bool:
    """Return whether a notebook's ! started this process: on a terminal, but one that draws each step of a bar anew."""
    return "JPY_PARENT_PID" in os.environ or "inline" in os.environ.get("MPLBACKEND", "")


def thin(values: list[str], most: int) -> list[str]:
    """Return at most `most` (2 or more) of the values, evenly chosen, including the first and the last."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def in_percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def decimals(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"
