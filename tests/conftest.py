import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Up to PyTorch 2.8 read once, at the first matrix product of the process.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
# One thread: the tests' results do not depend on the machine, and two would wait for each other on a busy one.
torch.set_num_threads(1)
PATIENCE = 90  # seconds after which what a test waits for is taken not to come
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Processes forked from a server that has the program imported and nothing else: without the seconds of an import, and
# without this process's OpenMP threads, for which a process forked from here would wait for ever. Up to Python 3.12 the
# server finds modules by PYTHONPATH only.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "analysis.report", "sklearn.datasets", "conftest"])


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


SMALL = ["--dataset=digits", "--width=16", "--adv_size=20", "--lc_samples=8", "--lc_directions=4", "--epsilons=0.1",
         "--pgd_steps=2", "--robust_budget=low", "--log_points=6", "--threads=1", "--no_plot", "--device=cpu"]


def by_interval(flags):
    """Return flags without --log_points, for --log_interval."""
    return [flag for flag in flags if not flag.startswith("--log_points")]


def command(*flags, script="train.py"):
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def run_command(folder, *flags, script="train.py", status=0, timeout=120):
    """Run a program of the project in `folder` as a process; fail unless it ends with `status`."""
    done = subprocess.run(command(*flags, script=script), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=timeout, stdin=subprocess.DEVNULL)
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_here(folder, *flags, status=0):
    """Run train.main() in this process, with `folder` as the place of its files: without the seconds of an import."""
    import train

    with handlers_kept():
        assert train.main([*map(str, flags), f"--log_dir={folder}/logs", f"--save_dir={folder}/checkpoints"]) == status


@contextlib.contextmanager
def handlers_kept():
    """Put back the handlers of the signals that a run catches."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def history_of(folder):
    """Return the history in `folder`, with its rows' outcomes; its file has to be strict JSON."""
    from records.history import read_history

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    path = Path(folder) / "logs" / "training_history.json"
    json.loads(path.read_text(), parse_constant=refuse)
    return read_history(path)


def columns(folder):
    """Return what a repeated or resumed run has to repeat of the history."""
    beside = ("config", "asked", "derived", "environment", "seconds", "interpolation")
    return {key: value for key, value in history_of(folder).items() if key not in beside}
