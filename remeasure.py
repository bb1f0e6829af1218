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
import importlib.util
import itertools
import math
import os
import pickle
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import flags
from flags import EXPERIMENT, MEASUREMENT, SCHEDULE, Config, flags_of, history_key

DATA = frozenset({"dataset", "train_size", "label_noise", "image_size", "modulus", "train_fraction", "seed"})
MACHINE = frozenset({"data_dir", "device", "threads", "eval_batch_size", "quiet"})
ASKED_HERE = (flags_of(MEASUREMENT) - SCHEDULE) | DATA | MACHINE
HERE = Path(__file__).resolve().parent
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod)\.")  # in the names of weights: DataParallel's, torch.compile's
# Columns that a log step's checkpoint holds and that measuring it again does not change.
KNOWN = ("train_loss", "train_acc", "train_saturated", "test_loss", "test_acc", "weight_norm", "max_batch_loss")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line as parsed; a flag of train.py that was not given is missing."""
    parser = flags.OneLineParser(
        prog="remeasure.py", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Omitted flags default to the run's; with --network, to train.py's.")
    parser.add_argument("paths", nargs="*", metavar="PATH", type=flags.parse_folder,
                        help="checkpoints, folders of checkpoints, or folders of runs (with checkpoints/ in them)")
    parser.add_argument("--every", type=flags.number(int, low=1), metavar="N",
                        help="measure each Nth checkpoint, and the last (default 1)")
    parser.add_argument("--steps", type=flags.listed(flags.number(int, low=0)), metavar="N,N",
                        help="measure the checkpoints of these steps")
    parser.add_argument("--log_dir", type=flags.parse_folder, metavar="DIR",
                        help="folder of the history (default: remeasured; with --network, none is written)")
    parser.add_argument("--network", metavar="FILE.py:FUNCTION", type=flags.parse_folder, help="measure the "
                        "network that FUNCTION() of FILE.py returns: a torch.nn.Module from images in [0, 1] to "
                        "logits. The file is run")
    parser.add_argument("--weights", metavar="FILE", type=flags.parse_folder,
                        help="state dict for --network, a .pt or .safetensors file")
    flags.add_flags(parser, ASKED_HERE, show_defaults=False)
    args = parser.parse_args(argv)
    flags.flattened(parser, vars(args))
    given = DATA & vars(args).keys()
    if bool(args.paths) == bool(args.network):
        parser.error("name checkpoints or their folder, or one --network")
    if args.network:
        file = args.network.rpartition(":")[0]
        if not (file.endswith(".py") and Path(file).is_file()):
            parser.error(f"--network={args.network}: give FILE.py:FUNCTION, where FILE.py exists")
        if args.weights and not Path(args.weights).is_file():
            parser.error(f"--weights: there is no file {args.weights}")
        for name in ("every", "steps", "certify"):
            if vars(args).get(name):
                parser.error(f"--{name} is for checkpoints of train.py, not for --network")
    elif args.weights:
        parser.error("--weights is for --network: a checkpoint has its own")
    elif given:
        parser.error(f"--{min(given)} is for --network: a checkpoint knows its data, at most --data_dir changes")
    else:
        args.log_dir = args.log_dir or "remeasured"
    return args


if __name__ == "__main__":  # importing PyTorch takes seconds: answer --help and a wrong flag before
    parse_args()

import torch
from torch import nn
from tqdm import tqdm

import attacks
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
    """Return the checkpoints that the paths name. FileNotFoundError if one is missing or a folder holds none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no checkpoint or folder {path}")
        inside = [path] if path.is_file() else (
            checkpoints.saved_checkpoints(path) or checkpoints.saved_checkpoints(path / "checkpoints")
            or sorted(path.glob("*.pt")))  # renamed ones
        if not inside:
            raise FileNotFoundError(f"there are no checkpoints (checkpoint_epoch_*.pt) in {path}")
        found += inside
    return list(dict.fromkeys(found))


def time_of(path: Path) -> tuple[int, float]:
    """Return (step, seconds) of a checkpoint as it says itself, whatever its name; (step in its name, NaN) if it is
    damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # does not read the weights
        return state["step"], state["seconds"]
    except Exception:  # it is named when its turn comes
        step = checkpoints.step_in_name(path)
        return -1 if step is None else step, float("nan")  # which equals no other, not even itself


def chosen(found: list[Path], every: int | None, steps: list[int] | None) -> list[tuple[int, Path]]:
    """Return (step, checkpoint), in order, as --every and --steps choose; of copies the first. ValueError if a step is
    missing, or is there with two networks."""
    by_time: dict[tuple[int, float], Path] = {}
    for path in found:
        by_time.setdefault(time_of(path), path)
    in_order = sorted(by_time.items(), key=lambda item: item[0][0])
    sound = [(step, path) for (step, seconds), path in in_order if not math.isnan(seconds)]
    for (step, path), (following, other) in itertools.pairwise(sound):
        if step == following:
            raise ValueError(f"{path} and {other} are of the same step: give the checkpoints of one run")
    missing = {*(steps or [])} - {step for (step, _), _ in in_order}
    if missing:
        raise ValueError(f"--steps: there is no checkpoint of step {', '.join(map(str, sorted(missing)))}")
    wanted = [(step, path) for (step, _), path in in_order if steps is None or step in steps]
    return wanted[::-(every or 1)][::-1]


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
        here = {"device": "auto", "threads": None, "quiet": False, "eval_batch_size": None, "compile": "off"}
        wanted = Config(**{**was, **here, **given, "log_dir": args.log_dir})
        device = devices.choose_device(wanted.device, wanted.dtype)
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


def measure_all(run: Remeasured, todo: list[tuple[int, Path]], note: Callable) -> tuple[list[str], int]:
    """Measure checkpoints; return those that could not be, and the signal that ended it or 0."""
    failed = []
    with (signals.Stop(can_interrupt=True) as stop,
          tqdm(todo, unit="checkpoint", disable=True if run.config.quiet or not todo else None) as bar):
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
    first = first_sound([path for _, path in found])
    for _, path in found:
        own = history_of(path, first["config"])
        if own and own.parent.resolve() == Path(args.log_dir).resolve():
            raise ValueError(f"--log_dir={args.log_dir} holds the run's own history: choose another folder")
    run = Remeasured(args, first, own_history([path for _, path in found], first))
    console = Console(quiet=run.config.quiet)
    locks = files.FolderLocks(args.log_dir, note=console.note)
    run.take_over(console.note)
    todo = [(step, path) for step, path in found if step not in run.rows]
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

def modules_in(folder: Path) -> list[str]:
    """Return the names of the imported modules that lie in folder, with those inside of its packages."""
    def place(name: str) -> Path:
        spec = getattr(sys.modules.get(name.partition(".")[0]), "__spec__", None)
        return Path(next(iter(spec.submodule_search_locations or [spec.origin or ""]), "")).parent if spec else Path()
    return [name for name in sys.modules if place(name) == folder]


@contextlib.contextmanager
def as_in_its_own_process(file: Path, root: Path) -> Iterator[None]:
    """Let a file find its own modules and sys.argv: its folder, and root, the folder of its package, come first,
    and modules of ours, such as models and data, are out of the way. Afterwards ours are back, and its folders last."""
    ours, path, argv, here = {name: sys.modules[name] for name in modules_in(HERE)}, sys.path[:], sys.argv, os.getcwd()
    for name in ours:
        del sys.modules[name]
    sys.path[:] = [str(file.parent), str(root), *sorted(path, key=lambda entry: Path(entry).resolve() == HERE)]
    sys.argv = [str(file)]
    try:
        yield
    finally:
        os.chdir(here)
        sys.argv = argv
        sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path)]
        for name in [*modules_in(file.parent), *modules_in(root)]:
            sys.modules.pop(name, None)
        sys.modules |= ours


def imported(where: str) -> nn.Module:
    """Return the network that FILE.py:FUNCTION makes. ValueError, in one line, if not."""
    name, file = where.rpartition(":")[2], Path(where.rpartition(":")[0]).resolve()
    # A file of a package is imported as a part of it, for "from .layers import ...".
    root = next(folder for folder in file.parents if not (folder / "__init__.py").exists())
    within = ".".join([*file.parent.relative_to(root).parts, file.stem]).removesuffix(".__init__")
    with as_in_its_own_process(file, root):
        try:
            if root == file.parent:
                spec = importlib.util.spec_from_file_location(within, file)
                assert spec and spec.loader  # parse_args() has checked that it is a .py file
                sys.modules[within] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[within])
            network = getattr(importlib.import_module(within), name)
            network = network if isinstance(network, nn.Module) else network()
        except (Exception, SystemExit) as error:  # whatever somebody's code raises
            raise ValueError(f"--network={where}: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"--network={where}: it returns {type(network).__name__}, not a torch.nn.Module")
    return network.float()


def read_weights(path: Path) -> Any:
    """Return what a .pt or .safetensors file holds. ValueError, in one line, if that is not data alone or damaged."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"to read {path}, run: pip install safetensors") from None
    except Exception as error:  # pickle, zipfile, torch and safetensors raise errors of many kinds
        refused = re.search(r"(?:GLOBAL|[Ff]unction|class) ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise ValueError(
                f"{path} holds an object of {refused[1]}, and reading that can run code; if you trust it, extract the "
                f"state dict: state = torch.load({str(path)!r}, weights_only=False); torch.save(state['model'], "
                "'weights.pt'), with the key that it has there, or state.state_dict() if it is a module") from None
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is a TorchScript network: let --network return torch.jit.load of it") from None
        raise ValueError(f"{path} is damaged, not a state dict, or holds more than tensors") from None


def load_weights_of_others(network: nn.Module, saved: Any, path: str) -> None:
    """Load a state dict, or one that lies in a dict under any name, such as a checkpoint's, with the prefixes of
    DataParallel, torch.compile or a module around the network. ValueError, in one short line, if none fits."""
    own = {WRAPPERS.sub("", name): name for name in network.state_dict()}
    outer = [saved, *saved.values()] if isinstance(saved, dict) else []
    candidates = []
    for entry in outer:
        if not (isinstance(entry, dict) and entry and all(isinstance(key, str) for key in entry)):
            continue
        bare = {WRAPPERS.sub("", key): value for key, value in entry.items()}
        head = next(iter(bare)).partition(".")[0] + "."  # Lightning's "model.", say
        for fitting in (bare, {key.removeprefix(head): value for key, value in bare.items()}):
            candidates.append({own.get(key, key): value for key, value in fitting.items() if key != "n_averaged"})
    if not candidates:
        raise ValueError(f"--weights={path} are not those of the network: the file holds no state dict")
    best = max(candidates, key=lambda candidate: len({*own.values()} & candidate.keys()))
    try:
        missing, unexpected = network.load_state_dict(best, strict=False)
        faults = [f"{len(names)} {what} ({', '.join(names[:2])}{', ...' * (len(names) > 2)})" for names, what in (
            (missing, "are missing"), (unexpected, "are not in it")) if names]
    except Exception as error:  # of shapes, or of what is not a tensor
        shape = re.search(r"size mismatch for (\S+): .*?Size\((.*?)\) from checkpoint.*?Size\((.*?)\)", str(error))
        faults = [f"{shape[1]} is {shape[2]}, not {shape[3]}" if shape else f"{error:.200}"]
    if faults:
        raise ValueError(f"--weights={path} are not those of the network: {', '.join(faults)}")


def check_network(network: nn.Module, dataset: data.Dataset) -> None:
    """Raise ValueError unless the network maps images of the data set to logits of its classes and can be attacked."""
    x, y = data.pixels(dataset.x_test[:2], torch.float32), dataset.y_test[:2]
    try:
        with torch.no_grad():  # not inference mode: lazy modules make their weights here
            logits = network.eval()(x)
    except Exception as error:  # of whatever layer does not fit
        raise ValueError(f"the network does not take images of shape {tuple(x.shape)}: {error}") from None
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else ()
    if shape != (2, dataset.num_classes):
        raise ValueError(f"for 2 images the network returns {shape or type(logits).__name__}, not logits "
                         f"(2, {dataset.num_classes})")
    try:
        attacks.pgd(network, x, y, 0.01, steps=1)
    except RuntimeError as error:
        raise ValueError(f"the network has no gradient with respect to its images: {error}") from None


def measure_network(args: argparse.Namespace) -> int:
    """Measure the network that --network names, print its row, and write it if --log_dir is given; return the exit
    status."""
    given = flags_given(args)
    device = devices.choose_device(given.get("device", "auto"))
    network = imported(args.network)
    if args.weights:
        load_weights_of_others(network, read_weights(Path(args.weights)), args.weights)
    wanted = Config(**{"batch_size": 1, **given})
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    locks, path = files.FolderLocks(args.log_dir, args.log_dir) if args.log_dir else None, Path(
        args.log_dir or "", history.HISTORY_NAME)
    if locks and path.exists() and "weights" not in history.read_history(path)["config"]:
        raise ValueError(f"--log_dir={args.log_dir} holds the history of a run: choose another folder")
    dataset = data.from_config(dataclasses.asdict(wanted))
    config, fingerprint, notes = train.complete(wanted, dataset, device), data.fingerprint(dataset), []
    dataset, network, units = train.resident(dataset, device), network.to(device), {}
    # cuDNN's recurrent layers have no gradient in eval mode.
    torch.backends.cudnn.enabled = not any(isinstance(module, nn.RNNBase) for module in network.modules())
    check_network(network, dataset)
    if config.lc_samples:
        try:
            with warnings.catch_warnings(record=True) as caught:
                units = local_complexity.layer_units(network, tuple(dataset.x_test.shape[1:]))
            notes = [str(warning.message) for warning in caught]
        except Exception as error:  # what somebody's modules do with a hook
            notes = [f"local complexity is not measured: {error}"]
            config = dataclasses.replace(config, lc_samples=0)
    began = time.perf_counter()
    with tqdm(total=100, bar_format="{desc}", disable=True if config.quiet else None, leave=False) as bar:
        row = measure.measure(network, dataset, measure.draw_probes(config, dataset), config,
                              lambda what, share: bar.set_description_str(f"{what} {100 * share:.0f}%"))
    print(f"{args.network} on {config.dataset}: {sum(p.numel() for p in network.parameters()):,} parameters, "
          f"{measure.attacked(config, dataset):,} test images attacked")
    print(f"\n{'accuracy':<24}{'train':>10}{'test':>10}\n{'':<24}{row['train_acc']:>10.2%}{row['test_acc']:>10.2%}")
    print(f"\n{'under attack':<24}{'adv_acc':>10}{'robust_acc':>12}")
    for key, robust in row["robust_acc"].items():
        print(f"{'epsilon ' + flags.epsilon_label(key):<24}{row['adv_acc'][key]:>10.2%}{robust:>12.2%}")
    for radius in map(history_key, config.lc_radius if units else []):
        counted = row["local_complexity"]
        print(f"\n{'local complexity, r ' + radius:<24}" + "".join(f"{points:>10}" for points in counted))
        for i, name in enumerate(units):
            counts = [means[radius][i] for means in counted.values()]
            print(f"{name:<24}" + "".join(f"{count:>10.2f}" for count in counts) + f"  of {units[name]} units")
    for text in [*notes, *measure.remarks(row, config).values()]:
        print(f"note: {text}")
    if locks:
        made = train.empty_history(config, wanted, dataset, network, fingerprint, units)
        made["config"] |= {"model": args.network, "weights": args.weights, "n_steps": 0} | dict.fromkeys(
            ("depth", "width", "n_epochs"))
        made |= {"asked": sorted({*given, "model", "weights"}), "interpolation": None, "warnings": [
            {"step": 0, "kind": kind, "text": text} for kind, text in measure.remarks(row, config).items()]}
        history.append(made, {"epoch": 0, "step": 0, **row, "max_batch_loss": math.nan,
                              "seconds": time.perf_counter() - began})
        for moved in files.move_aside(args.log_dir):
            print(f"an earlier measurement is now in {moved}")
        history.write_history(path, made)
        locks.release()
        print(f"wrote {path}; compare several with 'python plot.py --table'")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command line of remeasure.py; return the exit status."""
    signals.replace_unencodable()
    args = parse_args(argv)
    devices.set_precision()
    try:
        return measure_network(args) if args.network else measure_run(args)
    except (ValueError, OSError) as error:
        return fail(error, 2, "remeasure.py")
    except (MemoryError, RuntimeError) as error:
        if devices.out_of_memory(error):
            return fail("not enough memory: lower --adv_size, --lc_samples or --eval_batch_size", 1, "remeasure.py")
        if not args.network:
            raise
        return fail(f"the network cannot be measured: {error}", 2, "remeasure.py")  # in larger batches, say
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
