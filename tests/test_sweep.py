"""sweep.py: how it names and combines runs, and that a sweep that is stopped, continued or half wrong ends as it
should."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, PATIENCE, SMALL, command, handlers_kept, history_of, run_command, wait_for

import sweep
import train
from runtime import checkpoints, files

LONG = "--n_steps=300000"  # and not for ever: where a test fails, nobody ends the runs
FLAGS = [flag for flag in SMALL if flag not in ("--no_plot", "--threads=1")]


def folder(*flags):
    return str(sweep.folder_name(train.parse_args(flags)))


# ---- names ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, name", [
    ([], "seed_42"),
    (["--width=1000", "--seed=0"], "width_1000_seed_0"),
    (["--lr", "1e-2", "--width", "1000"], "lr_0.01_width_1000_seed_42"),
    (["--batch_norm", "--model=cnn", "--dataset=cifar10"], "batch_norm_dataset_cifar10_model_cnn_seed_42"),
    (["--lr=0.00012345678"], "lr_0.00012345678_seed_42"),
    (["--epsilons", "0.2", "0.1", "--lc_radius=0.05,0.1"], "epsilons_0.1,0.2_lc_radius_0.05,0.1_seed_42"),
    (["--dataset=imagefolder", "--data_dir=/some/where/my cats/"], "data_dir_my_cats_dataset_imagefolder_seed_42"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_folder_is_named_by_the_flags_that_are_the_experiment(flags, name):
    assert folder(*flags) == f"runs/{name}"


@pytest.mark.parametrize("flags", [
    ["--depth=3", "--width=50"],  # their order
    ["--n_steps=7"], ["--n_epochs=7"], ["--threads=2"], ["--no_plot"], ["--log_dir=x"], ["--save_dir=x"], ["--resume"],
    ["--device=cpu"], ["--data_dir=x"], ["--keep_checkpoints=last"], ["--checkpoint_minutes=1"], ["--on_nan=continue"],
    ["--seed=42"], ["--dataset=mnist"], ["--train_size=1000"],  # what they are without the flag
], ids=" ".join)
def test_the_name_does_not_depend_on_what_is_no_part_of_the_experiment(flags):
    experiment = ["--width=50", "--depth=3"]
    assert folder(*flags, *experiment) == folder(*experiment, *flags) == "runs/depth_3_width_50_seed_42"


def test_what_a_flag_left_out_stands_for_depends_on_the_model_and_the_data():
    assert folder("--width=200", "--depth=4") == folder()
    assert folder("--model=cnn", "--width=32") == folder("--model=cnn") != folder("--model=cnn", "--width=200")
    assert folder("--model=cnn", "--depth=4") != folder("--model=cnn")
    assert folder("--dataset=cifar10", "--train_size=all") == folder("--dataset=cifar10")
    assert folder("--dataset=cifar10", "--train_size=1000") != folder("--dataset=cifar10")


def test_a_long_name_is_cut_and_stays_its_own():
    def long(last, seed=1):
        return Path(folder("--epsilons", *(f"0.{i}" for i in range(100, 200)), f"0.{last}", f"--seed={seed}")).name

    assert long(95) == long(95) != long(96)
    assert len(long(95)) < 200 and long(95).endswith("_seed_1")
    assert long(95).removesuffix("_seed_1") == long(95, seed=2).removesuffix("_seed_2")


def test_the_folder_can_be_asked_for(tmp_path):
    done = run_command(tmp_path, "--folder", "--seed=3", "--n_steps=5", "--width=7", script="sweep.py")
    assert done.stdout == "runs/width_7_seed_3\n" and done.stderr == ""
    assert not list(tmp_path.iterdir())


# ---- combinations ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, names", [
    ([], ["seed_42"]),
    (["--seed=0-3"], ["seed_0", "seed_1", "seed_2", "seed_3"]),
    (["--seed", "0-1,5", "--depth=2,6"], ["depth_2_seed_0", "depth_6_seed_0", "depth_2_seed_1", "depth_6_seed_1",
                                          "depth_2_seed_5", "depth_6_seed_5"]),
    (["--model=cnn,mlp", "--batch_norm"], ["batch_norm_model_cnn_seed_42", "batch_norm_seed_42"]),
    (["--weight_decay=1e-3,0"], ["weight_decay_0.001_seed_42", "weight_decay_0_seed_42"]),
    (["--epsilons=0.1,0.2", "--lc_radius", "0.1,0.2", "0.3", "--seed=1,1"],
     ["epsilons_0.1,0.2_lc_radius_0.1,0.2,0.3_seed_1"]),
    (["--data_dir=a,1-3", "--width=100,200"], ["width_100_seed_42", "seed_42"]),
], ids=lambda value: " ".join(value))
def test_lists_and_ranges_are_combined(flags, names):
    runs = sweep.combinations(flags)
    assert [path.name for path in runs] == names
    for path, (words, args) in runs.items():
        assert sweep.folder_name(args) == path and train.parse_args(words) == args


@pytest.mark.parametrize("flags, message", [
    (["--n_steps=5,6"], "--n_steps: several values make no other experiment"),
    (["--seed=1-2", "--device=cpu,cuda"], "--device: several values make no other experiment"),
    (["--log_dir=elsewhere"], "leave --log_dir and --save_dir out"),
])
def test_what_cannot_have_a_folder_of_its_own_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        sweep.combinations(flags)


@pytest.mark.parametrize("flag, message", [
    ("--seed=3-1", "'3-1' is no whole number"), ("--depth=2,x", "'x' is no whole number"), ("--depth=", "''"),
    ("--nonsense=1,2", "unrecognized arguments: --nonsense=1"), ("--n_steps=5,6", "several values")])
def test_a_wrong_command_ends_in_one_line_before_anything_is_made(tmp_path, monkeypatch, capsys, flag, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = sweep.main([*FLAGS, flag])
    except SystemExit as end:
        status = end.code
    said, error = capsys.readouterr()
    assert status == 2 and said == "" and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, gpus, devices", [
    ([], 0, ["cpu"] * 6), (["--threads=2"], 0, ["cpu"] * 3), (["--threads=99"], 0, ["cpu"]),
    ([], 2, ["cuda:0", "cuda:1"]), (["--device=cuda"], 2, ["cuda:0", "cuda:1"]), (["--device=cuda:1"], 2, ["cuda:1"]),
    (["--device=cpu"], 2, ["cpu"] * 6), (["--device=cuda"], 0, ["cuda"])])
def test_a_run_has_a_core_or_a_gpu_of_its_own(monkeypatch, flags, gpus, devices):
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda _process: set(range(6)), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert sweep.places(train.parse_args(flags)) == devices


# ---- whole sweeps ---------------------------------------------------------------------------------------------------

def files(place):
    return {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}


def test_a_failed_run_is_named_and_the_others_go_on_and_are_not_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def swept(*flags, status=0):
        with handlers_kept():
            assert sweep.main([*FLAGS, *flags]) == status
        return capsys.readouterr()

    said, error = swept("--train_size=2000,500,600", "--n_steps=30", status=1)
    failed, first, second = sweep.combinations([*FLAGS, "--train_size=2000,500,600"])
    assert {path.parent for path in tmp_path.glob("runs/*/output.txt")} == {
        tmp_path / folder for folder in (failed, first, second)}
    assert "3 runs, 0 of them complete already" in said
    assert f"{failed}: failed: train.py: error: train_size 2000 is more than the 1000 training" in said
    assert error == f"1 of 3 runs failed: {failed}\n"
    for folder in (first, second):
        assert f"{folder}: complete\n" in said and f"{folder.name}  " in said  # as a row of the table
        history = history_of(folder)
        assert history["step"][-1] == 30 and history["config"]["threads"] == 1
        assert "training 30 steps" in (folder / "output.txt").read_text()
    assert "wrote runs/sweep.png" in said and Path("runs/sweep.png").stat().st_size > 10_000

    # Only what has something to do is started again.
    before = files(first), files(second)
    said, _ = swept("--n_steps=30", "--train_size=500,600", "--no_plot")
    assert (files(first), files(second)) == before and "complete" not in said and f"{first.name}  " in said
    said, _ = swept("--n_steps=40", "--train_size=600", "--no_plot")
    assert files(first) == before[0] and history_of(second)["step"][-2:] == [30, 40]
    assert "at step 30" in (second / "output.txt").read_text()


def test_ctrl_c_stops_all_runs_each_saved_and_the_same_command_continues(tmp_path):
    flags = [*FLAGS, "--seed=0-2", "--log_points=30", "--no_plot"]
    first = subprocess.Popen(command(*flags, LONG, script="sweep.py"), cwd=tmp_path, env=ENVIRONMENT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    at_once = min(3, len(sweep.places(train.parse_args(FLAGS))))
    try:
        wait_for(lambda: first.poll() is not None or
                 sum(len(list(path.glob("checkpoints/*.pt"))) > 2 for path in tmp_path.glob("runs/*")) == at_once)
        os.killpg(first.pid, signal.SIGINT)  # as a terminal does
        said, error = first.communicate(timeout=PATIENCE)
    finally:
        first.kill()
    assert first.returncode == 128 + signal.SIGINT and error == ""
    assert said.endswith("stopped by SIGINT; continue with the same command\n") and "failed" not in said
    started = sorted(tmp_path.glob("runs/*"))
    assert len(started) == at_once == said.count(": stopped\n")
    steps = []
    for path in started:
        steps.append(checkpoints.newest_checkpoint(path / "checkpoints", pytest.fail)[0]["step"])
        assert f"stopped by SIGINT at step {steps[-1]};" in (path / "output.txt").read_text()
        files.lock_folders(path / "checkpoints")  # ValueError if a run still held it
    done = run_command(tmp_path, *flags, f"--n_steps={max(steps) + 100}", script="sweep.py", timeout=2 * PATIENCE)
    assert done.stdout.count(": complete\n") == 3
    for path, step in zip(started, steps, strict=True):
        assert f".pt at step {step}\n" in (path / "output.txt").read_text()
        assert history_of(path)["step"][-1] == max(steps) + 100


def test_a_run_that_was_killed_is_named(tmp_path):
    first = subprocess.Popen(command(*FLAGS, LONG, "--no_plot", script="sweep.py"), cwd=tmp_path,
                             env={**ENVIRONMENT, "LC_ALL": "C", "PYTHONUTF8": "0"}, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: first.poll() is not None or list(tmp_path.glob("runs/*/checkpoints/.holder.lock")))
        (holder,) = tmp_path.glob("runs/*/checkpoints/.holder.lock")
        wait_for(holder.read_text)
        run = files.read_holder(holder)["pid"]
        assert os.getsid(run) == run  # Ctrl-C in a terminal does not reach it beside the sweep's own signal
        os.kill(run, signal.SIGKILL)
        said, error = first.communicate(timeout=PATIENCE)
    finally:
        first.kill()
    assert first.returncode == 1 and f"{sweep.folder_name(train.parse_args(FLAGS))}: failed: ended by SIGKILL\n" in said
    assert error.startswith("1 of 1 runs failed: ") and "Traceback" not in error
