"""Measure networks that are trained already: other epsilons, more images, another attack, without training again.

    python remeasure.py checkpoints/ --epsilons 2/255 8/255 --adv_size=all --lc_radius 0.01 0.1
    python remeasure.py runs/NAME --every=10 --robust_budget=high          # each tenth checkpoint of a run
    python remeasure.py --network my_model.py:build --weights my_model.pt --dataset=cifar10

The first two measure checkpoints of a run with the flags of that run, except for those given here. The result is a
history like that of train.py, remeasured/training_history.json; plot.py draws it. What stays the same (losses, clean
accuracy, seconds) is taken from the checkpoints. The same command again continues what was stopped.

The third measures any network, once. Flags that are not given have train.py's defaults.

Exit status: 0 all is measured; 1 something could not be; 2 the command or its input is wrong; 128 + n stopped by
signal n.
"""
# ruff: noqa: E402

import argparse
import contextlib
import dataclasses
import importlib
import math
import pickle
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import flags
from flags import EXPERIMENT, MEASUREMENT, SCHEDULE, Config, flags_of, history_key

DATA = frozenset({"dataset", "train_size", "label_noise", "image_size", "modulus", "train_fraction", "seed"})
MACHINE = frozenset({"data_dir", "device", "threads", "eval_batch_size", "quiet"})
ASKED_HERE = (flags_of(MEASUREMENT) - SCHEDULE) | DATA | MACHINE
HERE = Path(__file__).resolve().parent
# In the names of weights: what DataParallel, torch.compile and Lightning modules put before them.
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|model|net|network)\.")
# Columns that a log step's checkpoint holds and that measuring it again does not change: the first are those of clean
# accuracy and of the weight norm.
CLEAN = ("train_loss", "train_acc", "train_saturated", "test_loss", "test_acc", "weight_norm")
KNOWN = ("epoch", "step", *CLEAN, "max_batch_loss", "lr", "seconds")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line as parsed; a flag of train.py that was not given is missing."""
    parser = flags.OneLineParser(prog="remeasure.py", allow_abbrev=False, description=__doc__,
                                 usage="remeasure.py PATH [PATH ...] [flags]\n"
                                       "       remeasure.py --network FILE.py:FUNCTION [--weights FILE] [flags]",
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", type=flags.parse_folder,
                        help="checkpoints, folders of checkpoints, or folders of runs (with checkpoints/ in them)")
    parser.add_argument("--every", type=flags.number(int, low=1), metavar="N",
                        help="measure each Nth checkpoint, counted back from the last (default 1)")
    parser.add_argument("--steps", type=flags.listed(flags.number(int, low=0)), metavar="N,N",
                        help="measure the checkpoints of these steps")
    parser.add_argument("--log_dir", type=flags.parse_folder, metavar="DIR",
                        help="folder of the history (default: remeasured; with --network, none is written)")
    parser.add_argument("--network", metavar="FILE.py:FUNCTION", type=flags.parse_folder,
                        help="measure the torch.nn.Module that FUNCTION() in FILE.py returns; it maps images in [0, 1] "
                             "to logits. FILE.py is run")
    parser.add_argument("--weights", metavar="FILE", type=flags.parse_folder,
                        help="a .pt or .safetensors file with the state dict of --network")
    flags.add_flags(parser, ASKED_HERE, show_defaults=False)
    args = parser.parse_args(argv)
    flags.flattened(parser, vars(args))
    if bool(args.paths) == bool(args.network):
        parser.error("name checkpoints or their folder, or one --network")
    file = (args.network or "").rpartition(":")[0]
    if args.network and not (file.endswith(".py") and Path(file).is_file()):
        parser.error(f"--network={args.network}: give FILE.py:FUNCTION, where FILE.py exists")
    wrong = {"every", "steps", "certify"} if args.network else DATA | {"weights"}
    for name in sorted(wrong & {name for name, value in vars(args).items() if value is not None}):
        parser.error(f"--{name} is for checkpoints of train.py, not for --network" if args.network else
                     f"--{name} is for --network: a checkpoint knows its data and weights; only --data_dir may change")
    return args


if __name__ == "__main__":  # importing PyTorch takes seconds: answer --help and a wrong flag before
    parse_args()

import torch
from torch import nn

import attacks
import data
import local_complexity
import measure
import models
import train
from analysis.statistics import interpolation_step
from compute import device as devices
from compute import signals
from records import checkpoints, files, history
from records.console import Console
from records.run import fail, history_of, own_history


def flags_given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of train.py on the command line."""
    return {name: value for name, value in vars(args).items() if name in ASKED_HERE}


def load_data(wanted: Config) -> tuple[Config, data.Dataset, str]:
    """Return every flag as it is used, the data set on the device, and its fingerprint."""
    device = devices.choose_device(wanted.device, wanted.dtype)
    dataset = data.from_config(dataclasses.asdict(wanted))
    return train.complete(wanted, dataset, device), train.resident(dataset, device), data.fingerprint(dataset)


def history_with(empty: history.History, rows: dict[int, measure.Row], config: Config) -> history.History:
    """Return an empty history filled with {step: row}, in the order of the steps."""
    made: history.History = {**empty, "step": [], "warnings": []}
    for step in sorted(rows):
        history.append(made, rows[step])
        said = {warning["kind"] for warning in made["warnings"]}
        made["warnings"] += [{"step": step, "kind": kind, "text": text}
                             for kind, text in measure.remarks(rows[step], config).items() if kind not in said]
    return made


# ---- checkpoints of a run -------------------------------------------------------------------------------------------

def find_checkpoints(paths: list[str]) -> list[Path]:
    """Return the checkpoints that the paths name. FileNotFoundError if one is missing or a folder holds none."""
    found: list[Path] = []
    for path in map(Path, paths):
        inside = [path] if path.is_file() else (
            checkpoints.saved_checkpoints(path) or checkpoints.saved_checkpoints(path / "checkpoints")
            or sorted(path.glob("*.pt")))  # renamed ones
        if not inside:
            raise FileNotFoundError(f"{path} is neither a checkpoint nor a folder with checkpoints in it")
        found += inside
    return list(dict.fromkeys(found))


def chosen(found: list[Path], every: int | None, steps: list[int] | None) -> dict[int, Path]:
    """Return {step: checkpoint}, in order, as --every and --steps choose. ValueError if a step is missing, or is there
    twice."""
    by_step: dict[int, Path] = {}
    for path in found:
        name = re.fullmatch(r"checkpoint_epoch_\d+_step_(\d+)\.pt", path.name)
        step = int(name[1]) if name else checkpoints.load_checkpoint(path)["step"]
        if by_step.setdefault(step, path) != path:
            raise ValueError(f"{by_step[step]} and {path} are of the same step: give the checkpoints of one run")
    missing = sorted({*(steps or [])} - by_step.keys())
    if missing:
        raise ValueError(f"--steps: there is no checkpoint of step {', '.join(map(str, missing))}")
    return {step: by_step[step] for step in sorted(steps or by_step)[::-(every or 1)][::-1]}


def first_sound(paths: list[Path]) -> dict:
    """Return the first checkpoint that can be read. ValueError, in one line, if none can."""
    for path in paths[:-1]:
        with contextlib.suppress(ValueError):
            return checkpoints.load_checkpoint(path)
    return checkpoints.load_checkpoint(paths[-1])


def earlier_rows(log_dir: str, config: Config, first: dict, known: Collection[tuple], note: Callable[[str], None]
                 ) -> dict[int, measure.Row]:
    """Return {step: row} of what was measured before; move it aside if it is of another run or was made with other
    flags or another version's attack. first: a checkpoint of the run. known: (step, seconds) of the run's log steps,
    empty if its history is missing."""
    try:
        record = history.read_history(Path(log_dir) / history.HISTORY_NAME)
    except FileNotFoundError:
        return {}
    rows = {row["step"]: row for row in map(history.with_nan, history.rows_of(record))}
    other = checkpoints.differences(record["config"], config, flags_of(EXPERIMENT, MEASUREMENT) - SCHEDULE)
    measured = {(step, row["seconds"]) for step, row in rows.items()}
    # Two runs with the same flags never take the same time.
    same = measured <= {*known} if known else (first["step"], first["seconds"]) in measured
    if same and not other and record.get("derived", {}).get("robust_version", 1) == attacks.ROBUST_VERSION:
        return rows
    (moved,) = files.move_aside(log_dir)
    note(f"measurements of another run, with other flags or by an earlier version are now in {moved}")
    return {}


def measure_run(args: argparse.Namespace) -> int:
    """Measure the checkpoints that the command line names; return the exit status."""
    found, given = chosen(find_checkpoints(args.paths), args.every, args.steps), flags_given(args)
    first, log_dir = first_sound([*found.values()]), args.log_dir or "remeasured"
    place = history_of(next(iter(found.values())), first["config"])
    if place and place.parent.resolve() == Path(log_dir).resolve():
        raise ValueError(f"--log_dir={log_dir} holds the run's own history: choose another folder")
    own = own_history(next(iter(found.values())), first)
    # A checkpoint does not hold which test images were right. Its row is known by its time: no two runs take the same.
    right = {(row["step"], row["seconds"]): row.get("outcomes", {}).get("test")
             for row in (history.rows_of(own) if own else [])}

    was = {name: value for name, value in first["config"].items() if name in flags.FIELDS}
    here = {"device": "auto", "threads": None, "quiet": False, "eval_batch_size": None, "compile": "off"}
    wanted = Config(**{**was, **here, **given, "log_dir": log_dir})
    config, dataset, fingerprint = load_data(wanted)
    if not checkpoints.is_of_data(first, fingerprint):
        raise ValueError(f"the images or labels in {wanted.data_dir} are not those that the run was trained on: "
                         "give their folder with --data_dir")
    model, probes = train.build_model(config, dataset), measure.draw_probes(config, dataset)
    empty = train.empty_history(config, wanted, dataset, model, fingerprint)
    empty["asked"] = sorted({*first.get("asked", []), *given.keys() & flags_of(MEASUREMENT)})
    # The run may have log steps between these checkpoints, and before them.
    if own or first_sound([*found.values()][::-1])["logged"] != len(found):
        empty["interpolation"] = interpolation_step(own) if own else None
    empty["derived"] |= train.choose_threads(config, model, dataset, None)
    torch.set_num_threads(empty["derived"]["eval_threads"])
    console = Console(quiet=config.quiet)
    locks = files.FolderLocks(log_dir, note=console.note)

    def measured(path: Path) -> measure.Row:
        state = checkpoints.load_checkpoint(path)
        other = checkpoints.differences(state["config"], config, flags_of(EXPERIMENT))
        if other:
            raise ValueError(f"{path} is of another run: {'; '.join(other)}")
        models.load_weights(model, state, path)
        row: Any = {name: state[name] for name in KNOWN if name in state}
        outcomes = right.get((state["step"], state["seconds"]))
        known = {measure.clean, measure.weight_norm} if outcomes and row.keys() >= {*CLEAN} else set()
        metrics = [metric for metric in measure.METRICS if metric not in known]
        row |= measure.measure(model, dataset, probes, config, console.measuring, metrics)
        row["outcomes"].setdefault("test", outcomes)
        return row

    rows, failed = earlier_rows(log_dir, config, first, right.keys(), console.note), False
    target, made = Path(log_dir) / history.HISTORY_NAME, history_with(empty, rows, config)
    if rows:  # what is said once may have changed
        history.write_history(target, made)
    console.note(f"{len(found)} checkpoints, {len(found.keys() & rows.keys())} of them measured already")
    console.start(config.epsilons, config.lc_radius, 0, len(found), len(found))
    with signals.Stop(can_interrupt=True) as stop:
        for step, path in found.items():
            try:
                if step not in rows:
                    with stop.while_measuring():
                        rows[step] = measured(path)
                    made = history_with(empty, rows, config)
                    history.write_history(target, made)
            except signals.Interrupted:
                break
            except ValueError as error:
                failed = True
                console.note(f"{error}; passed over")
                continue
            console.row(rows[step], [entry["text"] for entry in made["warnings"] if entry["step"] == step])
            if console.bar:
                console.bar.update()
    console.end()
    locks.release()
    if stop.signal:
        console.note(f"stopped by {signal.Signals(stop.signal).name}; continue with the same command")
        return 128 + stop.signal
    console.note(f"\nwrote {target}; draw it with 'python plot.py {target}'")
    return 1 if failed else 0


# ---- networks of others ---------------------------------------------------------------------------------------------

def imported(where: str) -> nn.Module:
    """Return the network that FILE.py:FUNCTION makes. ValueError, in one line, if not.

    The file finds its own modules, also if they are called as ours are, such as models and data, and an empty command
    line. It is imported as part of its package, if it is in one, for "from .layers import ...".
    """
    file, name = Path(where.rpartition(":")[0]).resolve(), where.rpartition(":")[2]
    root = next(folder for folder in file.parents if not (folder / "__init__.py").exists())
    theirs, path, argv = [str(file.parent), str(root)], sys.path[:], sys.argv
    names = {entry.stem for entry in HERE.iterdir()}
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}
    for module in ours:
        del sys.modules[module]
    sys.path[:] = [*theirs, *(entry for entry in path if Path(entry).resolve() != HERE)]
    sys.argv = [str(file)]
    within = ".".join(file.relative_to(root).with_suffix("").parts)
    sys.modules.pop(within, None)
    try:
        network = getattr(importlib.import_module(within), name)
        network = network if isinstance(network, nn.Module) else network()
    except (Exception, SystemExit) as error:  # whatever somebody's code raises
        raise ValueError(f"--network={where}: {type(error).__name__}: {error}") from error
    finally:
        sys.argv, sys.path[:] = argv, [*path, *theirs]  # the network may import more when it is called
        sys.modules |= ours
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
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is not a state dict, or holds objects other than tensors, and reading those can run code; if you "
            f"trust it, extract the state dict: state = torch.load({str(path)!r}, weights_only=False); "
            "torch.save(state['model'], 'weights.pt'), with the key that it has there, or state.state_dict() if it is "
            "a module") from None
    except Exception as error:  # torch, zipfile and safetensors raise errors of many kinds
        raise ValueError(f"{path} is damaged or not a state dict: {str(error).partition('. ')[0]}") from None


def load_weights_of_others(network: nn.Module, saved: Any, path: str) -> None:
    """Load a state dict, or the best of those that lie in a dict, such as a checkpoint, with the names that other
    programs give weights. ValueError, in one line, if none fits."""
    own = network.state_dict().keys()
    by_bare_name = {WRAPPERS.sub("", name): name for name in own}
    candidates: list[dict] = [{}]
    for state in [saved, *saved.values()] if isinstance(saved, dict) else []:
        if isinstance(state, dict):
            candidates.append({name if name in own else by_bare_name.get(WRAPPERS.sub("", str(name)), name): value
                               for name, value in state.items()})
    try:
        network.load_state_dict(max(candidates, key=lambda candidate: len(own & candidate.keys())))
    except Exception as error:  # of names, of shapes, or of what is not a tensor
        raise ValueError(f"--weights={path} are not those of the network: {str(error):.400}") from None


def check_network(network: nn.Module, dataset: data.Dataset) -> None:
    """Raise ValueError unless the network maps images of the data set to logits of its classes and can be attacked."""
    x, y = data.pixels(dataset.x_test[:3], torch.float32), dataset.y_test[:3]
    try:
        with torch.no_grad():  # not inference mode: lazy modules make their weights here
            logits = network.eval()(x)
        attacks.pgd(network, x, y, 0.01, steps=1)
    except Exception as error:  # of whatever layer does not fit
        raise ValueError(f"the network cannot be measured on images of shape {tuple(x.shape)}: {error}") from None
    if logits.shape[1] != dataset.num_classes:
        raise ValueError(f"the network has {logits.shape[1]} classes, the data set {dataset.num_classes}")


def measure_network(args: argparse.Namespace) -> int:
    """Measure the network that --network names, print its row, and write it if --log_dir is given; return the exit
    status."""
    given, units, notes = flags_given(args), {}, []
    network = imported(args.network)
    if args.weights:
        load_weights_of_others(network, read_weights(Path(args.weights)), args.weights)
    wanted = Config(**{"batch_size": 1, **given})
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    console = Console(quiet=wanted.quiet)
    locks = files.FolderLocks(*filter(None, [args.log_dir]), note=console.note)
    config, dataset, fingerprint = load_data(wanted)
    network = network.to(dataset.x_test.device)
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
    empty = train.empty_history(config, wanted, dataset, network, fingerprint, units)
    empty["config"] |= {"model": args.network, "weights": args.weights, "n_steps": 0} | dict.fromkeys(
        ("depth", "width", "n_epochs"))
    empty |= {"asked": sorted({*given, "model", "weights"}), "interpolation": None}
    console.note(f"{args.network} on {config.dataset}: {empty['sizes']['parameters']:,} parameters, "
                 f"{empty['sizes']['attacked']:,} test images attacked\n")
    console.start(config.epsilons, config.lc_radius, 0, 1, 1)
    began = time.perf_counter()
    row = measure.measure(network, dataset, measure.draw_probes(config, dataset), config, console.measuring)
    row |= {"epoch": 0, "step": 0, "max_batch_loss": math.nan, "seconds": time.perf_counter() - began}
    console.row(row, [*notes, *measure.remarks(row, config).values()])
    console.end()
    for radius in map(history_key, config.lc_radius if units else []):
        means = row["local_complexity"]
        console.note(f"\n{'local complexity, r ' + radius:<24}" + "".join(f"{points:>10}" for points in means))
        for i, (name, n) in enumerate(units.items()):
            counts = "".join(f"{layers[radius][i]:>10.2f}" for layers in means.values())
            console.note(f"{name:<24}{counts}  of {n} units")
    if args.log_dir:
        for moved in files.move_aside(args.log_dir):
            console.note(f"an earlier measurement is now in {moved}")
        path = Path(args.log_dir) / history.HISTORY_NAME
        history.write_history(path, history_with(empty, {0: row}, config))
        console.note(f"\nwrote {path}; compare several with 'python plot.py --table'")
    locks.release()
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
        if not devices.out_of_memory(error):
            raise
        return fail("not enough memory: lower --adv_size, --lc_samples or --eval_batch_size", 1, "remeasure.py")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
