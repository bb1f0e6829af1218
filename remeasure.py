"""Measure networks that are trained already: other epsilons, more images, another attack, without training again.

    python remeasure.py checkpoints/ --epsilons 2/255 8/255 --adv_size=all --lc_radius 0.01 0.1
    python remeasure.py runs/NAME --every=10 --robust_budget=high       # each tenth checkpoint of a run's folder
    python remeasure.py --network my_model.py:build --weights my_model.pt --dataset=cifar10         # any network, once

Checkpoints become a history of the same format as train.py's, remeasured/training_history.json, which plot.py draws.
They are measured with the flags of their run, except for those given here. Columns that measuring again does not change
(losses, clean accuracy, seconds) are taken from the checkpoint. The same command again continues what was stopped.

Exit status: 0 all is measured; 1 something could not be; 2 the command or its input is wrong; 128 + n stopped by
signal n.
"""
# ruff: noqa: E402

import argparse
import contextlib
import dataclasses
import math
import runpy
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flags
from flags import EXPERIMENT, MEASUREMENT, SCHEDULE, Config, flags_of, history_key

DATA = frozenset({"dataset", "train_size", "label_noise", "image_size", "modulus", "train_fraction", "seed"})
MACHINE = frozenset({"data_dir", "device", "threads", "eval_batch_size", "quiet"})
ASKED_HERE = (flags_of(MEASUREMENT) - SCHEDULE) | DATA | MACHINE
# Columns that a log step's checkpoint holds and that measuring it again does not change.
KNOWN = ("train_loss", "train_acc", "train_saturated", "test_loss", "test_acc", "weight_norm", "max_batch_loss")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line as parsed; a flag of train.py that was not given is missing."""
    parser = flags.OneLineParser(
        prog="remeasure.py", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Omitted flags default to the run's; with --network, to train.py's.")
    parser.add_argument("paths", nargs="*", metavar="PATH",
                        help="checkpoints, folders of checkpoints, or folders of runs (with checkpoints/ in them)")
    parser.add_argument("--every", type=flags.number(int, low=1), default=1, metavar="N",
                        help="measure each Nth checkpoint, and the last (default 1)")
    parser.add_argument("--steps", type=flags.listed(flags.number(int, low=0)), metavar="N,N",
                        help="measure the checkpoints of these steps")
    parser.add_argument("--log_dir", type=flags.parse_folder, default="remeasured", metavar="DIR",
                        help="folder of the history (default remeasured)")
    parser.add_argument("--network", metavar="FILE.py:FUNCTION", help="measure the network that FUNCTION() of FILE.py "
                        "returns: a torch.nn.Module from images in [0, 1] to logits. The file is run")
    parser.add_argument("--weights", metavar="FILE", help="state dict for --network, a .pt or .safetensors file")
    flags.add_flags(parser, ASKED_HERE, show_defaults=False)
    args = parser.parse_args(argv)
    flags.flattened(parser, vars(args))
    given = DATA & vars(args).keys()
    if bool(args.paths) == bool(args.network):
        parser.error("name checkpoints or their folder, or one --network")
    if args.weights and not args.network:
        parser.error("--weights is for --network: a checkpoint has its own")
    if given and not args.network:
        parser.error(f"--{min(given)} is for --network: a checkpoint knows its data, at most --data_dir changes")
    return args


if __name__ == "__main__":  # importing PyTorch takes seconds: answer --help and a wrong flag before
    parse_args()

import torch
from torch import nn
from tqdm import tqdm

import data
import local_complexity
import measure
import train
from analysis.statistics import interpolation_of
from compute import device as devices
from compute import signals
from records import checkpoints, files, history
from records.console import Console
from records.run import fail, history_of


def flags_given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of train.py on the command line."""
    return {name: value for name, value in vars(args).items() if name in ASKED_HERE}


# ---- which checkpoints ----------------------------------------------------------------------------------------------

def find_checkpoints(paths: list[str]) -> list[Path]:
    """Return the checkpoints that the paths name, in the order of their steps. FileNotFoundError if one is missing or a
    folder holds no checkpoint of a log step."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no checkpoint or folder {path}")
        inside = [path] if path.is_file() else (
            checkpoints.saved_checkpoints(path) or checkpoints.saved_checkpoints(path / "checkpoints"))
        if not inside:
            raise FileNotFoundError(f"there are no checkpoints (checkpoint_epoch_*.pt) in {path}")
        found += inside
    return sorted(dict.fromkeys(found), key=step_of)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, from its name if it was not renamed; -1 for a damaged one."""
    step = checkpoints.step_in_name(path)
    if step is None:
        with contextlib.suppress(ValueError):
            step = checkpoints.load_checkpoint(path)["step"]
    return -1 if step is None else step


def chosen(found: list[Path], every: int, steps: list[int] | None) -> dict[int, Path]:
    """Return {step: checkpoint} as --every and --steps choose. ValueError if a step is missing or double."""
    by_step: dict[int, Path] = {}
    for path in found:
        other = by_step.setdefault(step_of(path), path)
        if other != path:
            raise ValueError(f"{other} and {path} are of the same step: give the checkpoints of one run")
    missing = {*(steps or [])} - by_step.keys()
    if missing:
        raise ValueError(f"--steps: there is no checkpoint of step {', '.join(map(str, sorted(missing)))}")
    wanted = [step for step in by_step if steps is None or step in steps]
    return {step: by_step[step] for step in wanted[::-every][::-1]}


# ---- one run's checkpoints ------------------------------------------------------------------------------------------

class Remeasured:
    """The checkpoints of one run, and the history that is made of them.

    first: the first checkpoint. own: the run's own history, {} if it is not at hand. rows: {step: row} of what is
    measured; kept in order in self.file after each addition. Raises ValueError or OSError, in one line, if the data
    cannot be had or are not those of the run.
    """

    def __init__(self, args: argparse.Namespace, first: dict, own: dict):
        given, self.first, self.own = flags_given(args), first, own
        was = {name: value for name, value in first["config"].items() if name in flags.FIELDS}
        device = devices.choose_device(given.get("device", "auto"))
        here = {"device": "auto", "threads": None, "quiet": False, "eval_batch_size": None, "compile": "off"}
        wanted = Config(**{**was, **here, **given, "log_dir": args.log_dir})
        devices.check_dtype(device, wanted.dtype)
        dataset = data.from_config(dataclasses.asdict(wanted))
        fingerprint = data.fingerprint(dataset)
        if not checkpoints.is_of_data(first, fingerprint):
            raise ValueError(f"the images or labels in {wanted.data_dir} are not those that the run was trained on: "
                             "give their folder with --data_dir")
        self.config = train.complete(wanted, dataset, device)
        self.dataset = train.resident(dataset, device)
        self.model = train.build_model(self.config, self.dataset)
        self.probes = measure.draw_probes(self.config, self.dataset)
        self.empty = train.empty_history(self.config, wanted, dataset, self.model, fingerprint)
        self.empty["asked"] = sorted({*first.get("asked", []), *given.keys() & flags_of(MEASUREMENT)})
        if own:  # it may have begun before the first of these checkpoints
            start = interpolation_of(own)
            self.empty["interpolation"] = None if start is None else own["step"][start]
        self.empty["derived"] |= train.choose_threads(self.config, self.model, self.dataset, None)
        torch.set_num_threads(self.empty["derived"]["eval_threads"])
        self.file = history.HistoryFile(Path(args.log_dir) / history.HISTORY_NAME)
        self.rows: dict[int, measure.Row] = {}

    def is_mine(self, record: dict) -> bool:
        """Return whether a history holds measurements of this run with these flags."""
        return (not checkpoints.differences(record["config"], self.config, flags_of(EXPERIMENT, MEASUREMENT) - SCHEDULE)
                and record["derived"]["data"] == self.empty["derived"]["data"]
                # Two runs with the same flags never take the same time.
                and rows_of(record).get(self.first["step"], self.first)["seconds"] == self.first["seconds"])

    def take_over(self, note: Callable) -> None:
        """Take over what was measured before, or move it aside if it is of another run or was made with other flags."""
        try:
            record = history.read_history(self.file.path)
        except FileNotFoundError:
            return
        if self.is_mine(record):
            self.add(rows_of(record))
        else:
            (moved,) = files.move_aside(self.file.path.parent)
            note(f"measurements of another run or with other flags are now in {moved}")

    def measured(self, path: Path, progress: measure.Progress) -> measure.Row:
        """Return the row of a checkpoint. ValueError, in one line, if it is damaged or of another run."""
        state = checkpoints.load_checkpoint(path)
        other = checkpoints.differences(state["config"], self.config, flags_of(EXPERIMENT))
        if other:
            raise ValueError(f"{path} is of another run: {'; '.join(other)}")
        checkpoints.load_weights(self.model, state, path)
        row: Any = {name: state[name] for name in KNOWN if name in state}
        k, right = index_of(state, self.own), self.own.get("outcomes", {}).get("test")
        outcomes = right[k] if right and k is not None else None
        metrics = [metric for metric in measure.METRICS if metric not in (measure.clean, measure.weight_norm)]
        if len(row) < len(KNOWN) or outcomes is None:
            row, metrics = {"max_batch_loss": state.get("largest_loss", math.nan)} | row, list(measure.METRICS)
        fresh = measure.measure(self.model, self.dataset, self.probes, self.config, progress, metrics)
        rate = {name: state[name] for name in ("lr",) if name in state}
        row = {"epoch": state["epoch"], "step": state["step"], **row, **fresh, **rate, "seconds": state["seconds"]}
        row["outcomes"].setdefault("test", outcomes)
        return row

    def history(self) -> dict:
        """Return the history of the rows, in the order of their steps."""
        made = {**self.empty, "step": [], "warnings": []}
        remarks: dict[str, dict] = {}  # the first of each kind
        for step in sorted(self.rows):
            history.append(made, self.rows[step])
            for kind, text in measure.remarks(self.rows[step], self.config).items():
                remarks.setdefault(kind, {"step": step, "kind": kind, "text": text})
        return {**made, "warnings": [*remarks.values()]}

    def add(self, rows: dict[int, measure.Row]) -> None:
        self.rows |= rows
        self.file.begin(self.history())


def rows_of(record: dict) -> dict[int, measure.Row]:
    """Return {step: row} of a history."""
    return {row["step"]: row for row in map(history.with_nan, history.rows_of(record))}


def own_history(paths: Iterable[Path], first: dict) -> dict:
    """Return the history of the run of these checkpoints, {} if it is not found near them or is damaged."""
    for path in filter(None, dict.fromkeys(history_of(path, first["config"]) for path in paths)):
        with contextlib.suppress(ValueError, OSError):
            own = history.read_history(path)
            if index_of(first, own) is not None:
                return own
    return {}


def index_of(state: dict, own: dict) -> int | None:
    """Return the index of a checkpoint's log point in a history. Two runs never take the same time."""
    known = zip(own.get("step", []), own.get("seconds", []), strict=True)
    return next((k for k, pair in enumerate(known) if pair == (state["step"], state["seconds"])), None)


def measure_all(run: Remeasured, todo: dict[int, Path], note: Callable) -> tuple[list[str], int]:
    """Measure checkpoints; return those that could not be, and the signal that ended it or 0."""
    failed = []
    with (signals.Stop(can_interrupt=True) as stop,
          tqdm(todo.items(), unit="checkpoint", disable=True if run.config.quiet or not todo else None) as bar):
        for step, path in bar:
            def progress(what: str, share: float, step: int = step) -> None:
                bar.set_postfix_str(f"step {step}, {what} {100 * share:.0f}%")

            try:
                with stop.while_measuring():
                    row = run.measured(path, progress)
            except signals.Interrupted:
                break
            except ValueError as error:
                failed.append(str(path))
                note(f"{error}; passed over")
                continue
            run.add({step: row})
            if stop.signal:
                break
    return failed, stop.signal


def measure_run(args: argparse.Namespace) -> int:
    """Measure the checkpoints that the command line names; return the exit status."""
    found = chosen(find_checkpoints(args.paths), args.every, args.steps)
    first = first_sound(list(found.values()))
    for path in found.values():
        own = history_of(path, first["config"])
        if own and own.parent.resolve() == Path(args.log_dir).resolve():
            raise ValueError(f"--log_dir={args.log_dir} holds the run's own history: choose another folder")
    run = Remeasured(args, first, own_history(found.values(), first))
    console = Console(quiet=run.config.quiet)
    locks = files.FolderLocks(args.log_dir, note=console.note)
    run.take_over(console.note)
    todo = {step: path for step, path in found.items() if step not in run.rows}
    console.note(f"{len(found)} checkpoints, {len(found) - len(todo)} of them measured already")
    failed, stopped_by = measure_all(run, todo, console.note)
    locks.release()
    if stopped_by:
        console.note(f"stopped by {signal.Signals(stopped_by).name}; continue with the same command")
        return 128 + stopped_by
    if run.rows:
        show(run, console)
    return 1 if failed else 0


def first_sound(paths: list[Path]) -> dict:
    """Return the first checkpoint that can be read. ValueError, in one line, if none can."""
    for path in paths[:-1]:
        with contextlib.suppress(ValueError):
            return checkpoints.load_checkpoint(path)
    return checkpoints.load_checkpoint(paths[-1])


def show(run: Remeasured, console: Console) -> None:
    """Print a table of the rows."""
    made = run.history()
    console.start(run.config.epsilons, run.config.lc_radius, 0, len(run.rows), 0)
    console.end()
    for step in made["step"]:
        console.row(run.rows[step], [warning["text"] for warning in made["warnings"] if warning["step"] == step])
    console.note(f"\nwrote {run.file.path}; draw it with 'python plot.py {run.file.path}'")


# ---- networks of others ---------------------------------------------------------------------------------------------

def load_network(where: str, weights: str | None) -> nn.Module:
    """Return the network that FILE.py:FUNCTION makes, with the weights in a file. ValueError, in one line, if not."""
    file, _, name = where.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"--network={where}: give FILE.py:FUNCTION, where FILE.py exists")
    sys.path.append(str(Path(file).resolve().parent))  # for the modules that it imports
    try:
        network = runpy.run_path(file)[name]()
    except Exception as error:  # whatever somebody's code raises
        raise ValueError(f"--network={where}: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"--network={where}: it returns {type(network).__name__}, not a torch.nn.Module")
    if weights:
        try:
            network.load_state_dict(load_weights(Path(weights)))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"--weights={weights} are not those of the network: {error}") from None
    return network.float()


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict in a .pt or .safetensors file, also one inside a checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state.get("model_state_dict") or state.get("state_dict") or state
    except ImportError:
        raise ValueError(f"to read {path}, run: pip install safetensors") from None
    except Exception:  # pickle, zipfile, torch and safetensors raise errors of many kinds
        raise ValueError(f"{path} is damaged, not a state dict, or holds more than tensors") from None


def check_network(network: nn.Module, dataset: data.Dataset) -> None:
    """Raise ValueError unless the network maps images of the data set to logits of its classes."""
    x = data.pixels(dataset.x_test[:2], torch.float32)
    try:
        with torch.inference_mode():
            logits = network.eval()(x)
    except Exception as error:  # of whatever layer does not fit
        raise ValueError(f"the network does not take images of shape {tuple(x.shape)}: {error}") from None
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else ()
    if len(shape) != 2 or shape[0] != 2 or shape[1] < dataset.num_classes:
        raise ValueError(f"for 2 images the network returns {shape or type(logits).__name__}, not logits "
                         f"(2, {dataset.num_classes})")


def measure_network(args: argparse.Namespace) -> int:
    """Measure the network that --network names, and print its row; return the exit status."""
    given = flags_given(args)
    device = devices.choose_device(given.get("device", "auto"))
    wanted = Config(**{"batch_size": 1, **given})
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    dataset = data.from_config(dataclasses.asdict(wanted))
    config = train.complete(wanted, dataset, device)
    dataset = train.resident(dataset, device)
    network = load_network(args.network, args.weights).to(device)
    check_network(network, dataset)
    try:
        units = local_complexity.layer_units(network, tuple(dataset.x_test.shape[1:])) if config.lc_samples else {}
    except ValueError as error:
        raise ValueError(f"{error}; --lc_samples=0 measures everything but local complexity") from None
    with tqdm(total=100, bar_format="{desc}", disable=True if config.quiet else None, leave=False) as bar:
        row = measure.measure(network, dataset, measure.draw_probes(config, dataset), config,
                              lambda what, share: bar.set_description_str(f"{what} {100 * share:.0f}%"))
    print(f"{args.network} on {config.dataset}: {sum(p.numel() for p in network.parameters()):,} parameters, "
          f"{measure.attacked(config, dataset):,} test images attacked")
    print(f"\n{'accuracy':<24}{'train':>10}{'test':>10}\n{'':<24}{row['train_acc']:>10.2%}{row['test_acc']:>10.2%}")
    certified = row.get("certified_acc", {})
    print(f"\n{'under attack':<24}{'adv_acc':>10}{'robust_acc':>12}{'certified_acc' if certified else '':>15}")
    for key, robust in row["robust_acc"].items():
        print(f"{'epsilon ' + flags.epsilon_label(key):<24}{row['adv_acc'][key]:>10.2%}{robust:>12.2%}"
              + (f"{certified[key]:>15.2%}" if certified else ""))
    for radius in map(history_key, config.lc_radius if units else []):
        counted = row["local_complexity"]
        print(f"\n{'local complexity, r ' + radius:<24}" + "".join(f"{points:>10}" for points in counted))
        for i, name in enumerate(units):
            counts = [means[radius][i] for means in counted.values()]
            print(f"{name:<24}" + "".join(f"{count:>10.2f}" for count in counts) + f"  of {units[name]} units")
    for text in measure.remarks(row, config).values():
        print(f"note: {text}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command line of remeasure.py; return the exit status."""
    signals.open_streams()
    args = parse_args(argv)
    devices.set_precision()
    try:
        return measure_network(args) if args.network else measure_run(args)
    except (ValueError, OSError) as error:
        return fail(error, 2, "remeasure.py")
    except (MemoryError, RuntimeError) as error:
        if not devices.out_of_memory(error):
            raise
        return fail("not enough memory: lower --adv_size, --lc_samples or --eval_batch_size", 1, "remeasure.py")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
