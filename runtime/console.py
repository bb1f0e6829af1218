"""What a run prints: its head, a table row for each log step, and its progress in between."""

import math
import shutil
import sys
import textwrap
import time

from tqdm import tqdm

from flags import epsilon_label, history_key

SECONDS_BETWEEN_LINES = 60
SECONDS_BEFORE_ESTIMATE = 5
MOST_EPSILONS = 6
WIDTH = 100
COLUMNS_BESIDE = 61  # of the table, what is not the epsilons'


class Console:
    """Prints a run's progress: on a terminal one tqdm bar below the table, elsewhere now and then a line.

    quiet: print nothing (--quiet, and the other processes of a distributed run).
    """

    def __init__(self, history, quiet=False):
        self.history, self.quiet = history, quiet
        self.bar, self.latest = None, ""

    def note(self, text):
        """Print one line, above the bar if there is one."""
        if not self.quiet:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def header(self):
        config, sizes, derived = (self.history[key] for key in ("config", "sizes", "derived"))
        environment = self.history["environment"]
        shape = " x ".join(str(n) for n in sizes["in_shape"])
        depth = f" depth {config['depth']}" if config["depth"] else ""
        self.note(f"model    {config['model']}{depth} width {config['width']} {config['activation']}"
                  f"{', batch norm' if config['batch_norm'] else ''}: {sizes['parameters']:,} parameters")
        self.note(f"data     {config['dataset']}: {sizes['train']:,} train, {sizes['test']:,} test "
                  f"({sizes['attacked']:,} attacked), {shape}, {sizes['num_classes']} classes")
        self.note(f"training {config['n_steps']:,} steps of {config['batch_size']} images, {config['optimizer']} "
                  f"lr {config['lr']:g} weight decay {config['weight_decay']:g},")
        self.note(f"         loss {config['loss']}, {config['dtype']}, seed {config['seed']}")
        self.note(f"device   {environment['device']}"
                  + (f", {environment['processes']} processes" if environment["processes"] > 1 else ""))
        if config["device"] == "cpu":
            onednn = derived["products"]
            by = f"oneDNN ({', '.join(onednn)}) and MKL" if onednn else "MKL"
            self.note(f"threads  {derived['threads']} in training, {derived['eval_threads']} in log steps; matrix "
                      f"products by {by}")
        if derived["compiled"]:
            self.note("compiled the network of the training steps, by torch.compile")
        self.note(f"files    {config['log_dir']}/training_history.json, {config['save_dir']}/checkpoint_epoch_*.pt")
        self.note("")

    def start(self, step, n_steps, log_steps_left):
        """Print the table's head, and begin to count the time.

        log_steps_left: how many log steps are to come, the one at this step among them.
        """
        keys = [*map(history_key, self.history["config"]["epsilons"])]
        width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
        self.keys = thin(keys, max(2, min(MOST_EPSILONS, (width - COLUMNS_BESIDE) // 6)))
        self.middle = self.keys[len(self.keys) // 2]
        self.n_steps, self.first_step, self.log_steps_left = n_steps, step, log_steps_left
        self.began = self.last_line = time.monotonic()
        self.measured = self.measuring_took = 0.0  # seconds in log steps: in all of them, in the last
        self.measuring_since, self.estimated = None, False
        robust = "robust_acc at epsilon"[:6 * len(self.keys) - 1]
        self.note(f"{'':29} {robust:<{6 * len(self.keys)}}adv_acc  local")
        self.note(f"{'step':>8} {'loss':>8} {'train':>5} {'test':>5}" + "".join(f"{label(key):>6}" for key in self.keys)
                  + f" {label(self.middle):>6} {'compl.':>7} {'|w|':>7} {'s':>6}")
        if not self.quiet and sys.stderr.isatty():
            self.bar = tqdm(total=n_steps, initial=step, unit="step", dynamic_ncols=True, leave=False)

    def row(self, row, remarks=()):
        """Print the table row of a log step; percentages but for the loss and local complexity."""
        self.measuring_took = time.monotonic() - (self.measuring_since or time.monotonic())
        self.measured, self.measuring_since = self.measured + self.measuring_took, None
        self.log_steps_left -= 1
        complexity = row["local_complexity"].get("train", {})
        total = sum(next(iter(complexity.values()))) if complexity else math.nan
        robust = "".join(f" {percent(row['robust_acc'][key])}" for key in self.keys)
        self.note(f"{row['step']:8} {row['train_loss']:8.2e} {percent(row['train_acc'])} {percent(row['test_acc'])}"
                  f"{robust}  {percent(row['adv_acc'][self.middle])} {number(total)} {number(row['weight_norm'])}"
                  f" {row['seconds']:6.0f}")
        for remark in remarks:
            self.note(textwrap.fill(f"note: {remark}", WIDTH, subsequent_indent="      "))
        self.latest = f"test {percent(row['test_acc'])} robust {percent(row['robust_acc'][self.middle])}"

    def measuring(self, what, share):
        """Show what a log step is measuring and how much of it is done, if the log step is long."""
        now = time.monotonic()
        if self.measuring_since is None:
            self.measuring_since = now
        if self.bar is not None:
            self.bar.set_postfix_str(f"{what} {100 * share:.0f}%")
        elif now - max(self.last_line, self.measuring_since) > SECONDS_BETWEEN_LINES:
            self.last_line = now
            self.note(f"… measuring: {what}, {100 * share:.0f}% done")

    def progress(self, step):
        """Show how far the run is: move the bar, or print a line if the last is a minute old."""
        now = time.monotonic()
        if not self.estimated and now - self.began - self.measured > SECONDS_BEFORE_ESTIMATE:
            self.estimated = True
            pace = (now - self.began - self.measured) / (step - self.first_step)
            left = pace * (self.n_steps - step) + self.measuring_took * self.log_steps_left
            self.note(f"… {1 / pace:,.0f} steps/s, {self.measuring_took:.1f} s a log step: {duration(left)} to go")
        if self.bar is not None:
            self.bar.set_postfix_str(self.latest, refresh=False)
            self.bar.update(step - self.bar.n)
        elif now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            pace = (now - self.began) / (step - self.first_step)
            self.note(f"… step {step:,} of {self.n_steps:,}, {1 / pace:,.0f} steps/s with log steps, about "
                      f"{duration(pace * (self.n_steps - step))} left")

    def end(self):
        if self.bar is not None:
            self.bar.close()


def label(key):
    """Return an epsilon's label in five characters."""
    text = epsilon_label(key)
    return text if len(text) <= 5 else f"{float(key):.3f}"


def thin(values, most):
    """Return at most `most` of the values, evenly chosen, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def percent(fraction):
    return f"{100 * fraction:5.1f}"


def number(value):
    return f"{value:7.2f}" if math.isfinite(value) else f"{'-':>7}"


def duration(seconds):
    """Return a time in words, for a reader who wants to know whether to wait."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
