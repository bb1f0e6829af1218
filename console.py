"""What a run prints: its head, a table row for each log step, and its progress in between."""

import sys
import textwrap
import time

from tqdm import tqdm

from flags import epsilon_label, history_key

SECONDS_BETWEEN_LINES = 60
MOST_EPSILONS = 6
WIDTH = 100


class Console:
    """Prints a run's progress: on a terminal one tqdm bar below the table, elsewhere now and then a line.

    quiet: print nothing (the other processes of a distributed run).
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
        config, sizes = self.history["config"], self.history["sizes"]
        shape = " x ".join(str(n) for n in sizes["in_shape"])
        depth = f" depth {config['depth']}" if config["depth"] else ""
        threads = f", threads: {config['threads']} in training, {config['eval_threads']} in log steps"
        environment = self.history["environment"]
        self.note(f"model    {config['model']}{depth} width {config['width']} {config['activation']}"
                  f"{', batch norm' if config['batch_norm'] else ''}: {sizes['parameters']:,} parameters")
        self.note(f"data     {config['dataset']}: {sizes['train']:,} train, {sizes['test']:,} test "
                  f"({sizes['attacked']:,} attacked) images of {shape}, {sizes['num_classes']} classes")
        self.note(f"training {config['n_steps']:,} steps of {config['batch_size']} images, {config['optimizer']} "
                  f"lr {config['lr']:g} weight decay {config['weight_decay']:g}, loss {config['loss']}, "
                  f"{config['dtype']}, seed {config['seed']}")
        self.note(f"device   {environment['device']}{threads if config['device'] == 'cpu' else ''}"
                  + (f", {environment['processes']} processes" if environment["processes"] > 1 else ""))
        self.note(f"files    {config['log_dir']}/training_history.json, {config['save_dir']}/checkpoint_epoch_*.pt")
        self.note("")

    def start(self, step, n_steps):
        self.keys = thin([*map(history_key, self.history["config"]["epsilons"])], MOST_EPSILONS)
        self.middle = self.keys[len(self.keys) // 2]
        self.n_steps, self.first_step = n_steps, step
        self.began = self.last_line = time.monotonic()
        width = 6 * len(self.keys)
        self.note(f"{'':29} {'robust_acc at epsilon'[:width]:<{width}}adv_acc  local")
        self.note(f"{'step':>8} {'loss':>8} {'train':>5} {'test':>5}" + "".join(f"{label(key):>6}" for key in self.keys)
                  + f" {label(self.middle):>6} {'compl.':>7} {'|w|':>7} {'s':>6}")
        if not self.quiet and sys.stderr.isatty():
            self.bar = tqdm(total=n_steps, initial=step, unit="step", dynamic_ncols=True, leave=False)

    def row(self, row, warning=None):
        """Print the table row of a log step; percentages but for the loss and local complexity."""
        complexity = row["local_complexity"].get("train", {})
        total = f"{sum(next(iter(complexity.values()))):7.2f}" if complexity else f"{'-':>7}"
        robust = "".join(f" {percent(row['robust_acc'][key])}" for key in self.keys)
        self.note(f"{row['step']:8} {row['train_loss']:8.2e} {percent(row['train_acc'])} {percent(row['test_acc'])}"
                  f"{robust}  {percent(row['adv_acc'][self.middle])} {total} {row['weight_norm']:7.2f}"
                  f" {row['seconds']:6.0f}")
        if warning:
            self.note(textwrap.fill(f"note: {warning}", WIDTH, subsequent_indent="      "))
        self.latest = f"test {percent(row['test_acc'])} robust {percent(row['robust_acc'][self.middle])}"

    def progress(self, step):
        """Show how far the run is: move the bar, or print a line if the last is a minute old."""
        if self.bar is not None:
            self.bar.set_postfix_str(self.latest, refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            pace = (self.last_line - self.began) / (step - self.first_step)
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


def duration(seconds):
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
