"""sweep.py: which runs a command line stands for, which of them are complete, and that a sweep that is stopped,
continued or half wrong ends as it should."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ENVIRONMENT, PATIENCE, ROOT, SMALL, command, history_of, wait_for

import sweep
import train
from compute import pool
from flags import folder_name, parse_args
from records import checkpoints

LONG = "--n_steps=300000"  # and not for ever: where a test fails, nobody ends the runs
FLAGS = [*(flag for flag in SMALL if flag not in ("--no_plot", "--threads=1", "--width=16")), "--width=8",
         "--log_points=3"]


# ---- which runs -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, names", [
    ([], ["seed_42"]),
    (["--seed", "0-1,5", "--depth=2,6"], ["depth_2_seed_0", "depth_6_seed_0", "depth_2_seed_1", "depth_6_seed_1",
                                          "depth_2_seed_5", "depth_6_seed_5"]),
    (["--model=cnn,mlp", "--batch_norm"], ["batch_norm_model_cnn_seed_42", "batch_norm_seed_42"]),
    (["--epsilons=0.1,0.2", "--lc_radius", "0.1,0.2", "0.3", "--seed=1,1"],
     ["epsilons_0.1,0.2_lc_radius_0.1,0.2,0.3_seed_1"]),
    (["--data_dir=a,1-3", "--width=100,200"], ["width_100_seed_42", "seed_42"]),
    (["--preset=first,modular", "--lr=0.1"], ["first_lr_0.1_seed_42", "modular_lr_0.1_seed_42"]),
    (["--width=100", "--width=300"], ["width_300_seed_42"]),  # the last wins, as with train.py
], ids=lambda value: " ".join(value))
def test_lists_and_ranges_are_combined(flags, names):
    runs = sweep.combinations(flags)
    assert [path.name for path in runs] == names
    for path, (words, config) in runs.items():
        assert folder_name(config) == path and parse_args(words) == config


@pytest.mark.parametrize("flags, message", [
    (["--seed=3-1"], "--seed: the range 3-1 runs backwards"),
    (["--depth=2,x"], "'x' is not a whole number"), (["--depth="], "''"),
    (["--nonsense=1,2"], "unrecognized arguments: --nonsense=1"),
    (["--n_steps=5,6"], "--n_steps: several values"), (["--log_dir=elsewhere"], "leave out --log_dir and --save_dir"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_wrong_command_ends_in_one_line_before_anything_is_made(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = sweep.main(flags)
    except SystemExit as end:
        status = end.code
    said, error = capsys.readouterr()
    assert status == 2 and said == "" and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_folders_help_and_errors_come_without_pytorch(tmp_path):
    program = ("import sys; sys.modules |= {'torch': None, 'matplotlib': None, 'numpy': None}; import compute.pool; "
               "import sweep; sweep.main(['--folder', '--seed=3', '--n_steps=5', '--width=7']); "
               "sweep.main(['--help']); sys.exit(sweep.main(['--seed=2-1']))")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=PATIENCE)
    assert done.stdout == f"runs/width_7_seed_3\n{sweep.__doc__.strip()}\n" and done.returncode == 2
    assert done.stderr == "sweep.py: error: --seed: the range 2-1 runs backwards\n"


# ---- whole sweeps, their runs in this process -----------------------------------------------------------------------

class HereAndNow:
    """A stand-in for subprocess.Popen that runs train.py in this process."""

    def __init__(self, words, stdout, **_):
        with (os.fdopen(os.dup(stdout.fileno()), "w", errors="replace") as output, contextlib.redirect_stdout(output),
              contextlib.redirect_stderr(output)):
            try:
                self.returncode = train.main(words[2:])
            except SystemExit as end:
                self.returncode = end.code

    def poll(self):
        return self.returncode


@pytest.fixture
def swept(tmp_path, monkeypatch, capsys):
    """Return a function that runs a sweep of FLAGS and more in tmp_path; it returns what the sweep printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": HereAndNow}))
    monkeypatch.setattr(pool, "SECONDS_BETWEEN_LOOKS", 0)

    def run(*flags, status=0):
        assert sweep.main([*FLAGS, *flags]) == status
        return capsys.readouterr()

    return run


def files(place):
    return {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}


def test_a_failed_run_is_named_and_the_others_go_on_and_are_not_made_again(swept, monkeypatch):
    monkeypatch.setattr("analysis.figure.draw", lambda histories, path: [f"{path}.png of {len(histories)} runs"])
    said, error = swept("--train_size=2000,500,600", "--n_steps=30", status=1)
    failed, first, second = sweep.combinations([*FLAGS, "--train_size=2000,500,600"])
    assert {*Path("runs").glob("*/output.txt")} == {folder / "output.txt" for folder in (failed, first, second)}
    assert "3 runs, 0 of them complete already" in said
    assert f"{failed}: failed: train.py: error: train_size must be from 1 to 1000" in said
    assert error == f"1 of 3 runs failed: {failed}\n"
    for folder in (first, second):
        assert f"{folder}: complete\n" in said and f"{folder.name}  " in said  # as a row of the table
        history = history_of(folder)
        assert history["step"][-1] == 30 and history["config"]["threads"] == 1
        assert "training 30 steps" in (folder / "output.txt").read_text()
    assert "wrote runs/sweep.png of 2 runs" in said

    # Only what has something to do is started again.
    before = files(first), files(second)
    said, _ = swept("--n_steps=30", "--train_size=500,600", "--no_plot")
    assert (files(first), files(second)) == before and "complete" not in said and f"{first.name}  " in said
    swept("--n_steps=40", "--train_size=600", "--no_plot")
    assert files(first) == before[0] and history_of(second)["step"][-2:] == [30, 40]
    assert "at step 30" in (second / "output.txt").read_text()


def test_a_run_of_other_data_is_not_complete(swept, tmp_path):
    for grey, status in ((9, 0), (9, 0), (10, 1)):
        x, y = np.full((600, 8, 8), grey, np.uint8), np.arange(600) % 3
        np.savez(tmp_path / "my.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        said, _ = swept("--dataset=npz", f"--data_dir={tmp_path}/my.npz", "--n_steps=4", "--no_plot", status=status)
        assert ("belongs to other data" in said) == bool(status)


def test_a_run_is_complete_only_with_its_last_checkpoint_and_its_length(swept):
    for length in ("--n_steps=10", "--n_epochs=2"):
        shutil.rmtree("runs", ignore_errors=True)
        swept(length, "--no_plot")
        (folder,) = Path("runs").iterdir()
        assert sweep.is_complete(folder, parse_args([*FLAGS, length]))
        assert not sweep.is_complete(folder, parse_args([*FLAGS, length.replace("=", "=2")]))
    max((folder / "checkpoints").glob("checkpoint_*.pt")).unlink()
    assert f"{folder}: complete" in swept(length, "--no_plot").out
    assert sweep.is_complete(folder, parse_args([*FLAGS, length]))


def test_a_figure_that_cannot_be_drawn_is_one_line(swept, monkeypatch):
    def fail(*_):
        raise RuntimeError("no LaTeX\nhere")

    monkeypatch.setattr("analysis.figure.draw", fail)
    assert "the figure cannot be drawn: no LaTeX here\n" in swept("--n_steps=4").out


@pytest.mark.slow
def test_the_figure_of_a_sweep_holds_all_its_runs(swept):
    assert "wrote runs/sweep.png" in swept("--n_steps=10", "--seed=0-1").out
    assert Path("runs/sweep.png").stat().st_size > 10_000 and Path("runs/sweep.svg").exists()


# ---- whole sweeps, their runs in processes --------------------------------------------------------------------------

@contextlib.contextmanager
def started(folder, *flags):
    process = subprocess.Popen(command(*FLAGS, *flags, script="sweep.py"), cwd=folder, env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def processes_of(folder):
    """Return the ids of the running train.py processes of a sweep in folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(ROOT / "train.py").encode() in (path / "cmdline").read_bytes() and (path / "cwd").samefile(folder):
                found.append(int(path.name))
    return found


def is_training(folder, runs):
    return lambda: sum(len(list(path.glob("checkpoints/*.pt"))) > 1 for path in folder.glob("runs/*")) == runs


@pytest.mark.slow
def test_ctrl_c_stops_all_runs_each_saved_and_the_same_command_continues(tmp_path):
    def stopped(when):
        with started(tmp_path, "--seed=0-2", LONG) as process:
            wait_for(lambda: process.poll() is not None or when())
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            said, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == 128 + signal.SIGINT and error == ""
        assert said.endswith("stopped by SIGINT; continue with the same command\n") and "failed" not in said
        return said.count(": stopped\n")

    at_once = min(3, len(pool.places("cpu")))
    assert stopped(is_training(tmp_path, at_once)) == at_once
    outputs = sorted(tmp_path.glob("runs/*/output.txt"))
    assert len(outputs) == at_once
    steps = [checkpoints.newest_checkpoint(path.parent / "checkpoints", pytest.fail)[0]["step"] for path in outputs]
    for path, step in zip(outputs, steps, strict=True):
        assert f"stopped by SIGINT at step {step};" in path.read_text()
    assert stopped(lambda: all(f".pt at step {step}\n" in path.read_text()
                               for path, step in zip(outputs, steps, strict=True))) == at_once


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc here")
def test_the_runs_of_a_killed_sweep_stop_and_save(tmp_path):
    with started(tmp_path, LONG) as first:
        wait_for(lambda: first.poll() is not None or is_training(tmp_path, 1)())
        assert len(processes_of(tmp_path)) == 1
        first.send_signal(signal.SIGKILL)
        wait_for(lambda: not processes_of(tmp_path))
    (output,) = tmp_path.glob("runs/*/output.txt")
    assert "stopped by SIGHUP at step" in output.read_text()
