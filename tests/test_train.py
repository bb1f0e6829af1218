"""The program as a whole, through its command line and its files."""

import argparse
import contextlib
import dataclasses
import io
import math
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, SMALL, by_interval, columns, command, handlers_kept, history_of, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import attacks
import data
import flags
import losses
import models
import train
from compute import device as devices
from compute.seeds import seed_for
from flags import parse_epsilon
from measure import remarks
from records import checkpoints, trackers
from records.history import read_history
from train import log_schedule, parse_args

COLUMNS = ["epoch", "step", "train_loss", "train_acc", "train_saturated", "test_loss", "test_acc", "weight_norm",
           "saturated", "zero_gradient", "max_batch_loss", "seconds"]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run of the default network, with what it prints."""
    folder = tmp_path_factory.mktemp("digits")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.chdir(folder):
        run_here(".", "--dataset=digits", "--n_steps=600", "--log_points=8", "--adv_size=200", "--lc_samples=64",
                 "--device=cpu", "--threads=1")
    return folder, out.getvalue()


def test_a_short_digits_run_learns(digits_run):
    history = history_of(digits_run[0])
    assert history["test_acc"][0] < 0.4
    assert history["test_acc"][-1] > 0.9
    assert history["train_acc"][-1] > 0.99
    assert history["train_loss"][-1] < 0.05


def test_history_has_equal_columns_and_says_how_it_was_made(digits_run):
    history = history_of(digits_run[0])
    assert history["step"] == log_schedule(600, 8) and len(history["step"]) == 8
    for name in COLUMNS:
        assert len(history[name]) == 8, name
    grid = ["0.03", "0.06", "0.1", "0.13", "0.16", "0.2"]
    for name in ("adv_acc", "robust_acc", "rounding"):
        assert list(history[name]) == grid
        assert all(len(column) == 8 for column in history[name].values())
    for kind in ("train", "test", "random"):
        column = history["local_complexity"][kind]["0.05"]
        assert [len(layers) for layers in column] == [3] * 8
        assert all(0 <= count <= 200 for layers in column for count in layers)
    assert history["layers"]["units"] == [200, 200, 200]
    assert history["epoch"] == [step / 5 for step in history["step"]]
    assert history["config"]["train_size"] == 1000 and history["config"]["optimizer"] == "adamw"
    assert history["config"]["n_steps"] == 600 and history["config"]["epsilons"] == [float(eps) for eps in grid]
    assert history["sizes"] == {"train": 1000, "test": 797, "attacked": 200, "parameters": 95410, "num_classes": 10,
                                "in_shape": [1, 8, 8]}
    assert history["environment"]["torch"] == torch.__version__


def test_checkpoints_hold_the_step_and_rebuild_the_network(digits_run):
    history = history_of(digits_run[0])
    paths = sorted((digits_run[0] / "checkpoints").glob("checkpoint_epoch_*.pt"))
    assert [checkpoints.step_in_name(path) for path in paths] == history["step"]
    state = torch.load(paths[-1], weights_only=True)
    assert state["step"] == 600 and state["epoch"] == 120
    assert state["test_acc"] == history["test_acc"][-1]
    assert state["robust_acc"]["0.1"] == history["robust_acc"]["0.1"][-1]
    assert state["optimizer_state_dict"]["state"][0]["step"] == 600
    config = state["config"]
    model = models.build_model(config["model"], (1, 8, 8), 10, depth=config["depth"], width=config["width"])
    model.load_state_dict(state["model_state_dict"])
    norm = math.sqrt(sum(p.double().square().sum().item() for p in model.parameters()))
    assert norm == pytest.approx(history["weight_norm"][-1])


def test_the_output_is_a_table_that_fits_100_columns_and_ends_with_the_summary(digits_run):
    folder, out = digits_run
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line for line in lines if line.split()[:1] == ["600"]]
    assert len(rows) == 1
    for said in ("95,410 parameters", "1,000 train, 797 test", "logs/training_history.json", "training_history.png",
                 "cpu"):
        assert said in out
    assert "train accuracy reaches 99%" in out
    assert (folder / "logs" / "training_history.png").stat().st_size > 10_000
    assert (folder / "logs" / "training_history.svg").stat().st_size > 10_000


def test_the_seed_decides_everything(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_here(tmp_path / name, *SMALL, "--n_steps=12", f"--seed={seed}")
    a, b, c = (columns(tmp_path / name) for name in "abc")
    assert a == b
    assert a["train_loss"] != c["train_loss"] and a["local_complexity"] != c["local_complexity"]


@pytest.mark.parametrize("model, width", [("mlp", 16), ("cnn", 4), ("resnet18", 4)])
@pytest.mark.parametrize("side, colour", [(8, False), (33, True)])
def test_every_model_trains_on_every_shape(tmp_path, model, width, side, colour):
    flags = [*SMALL, f"--model={model}", f"--width={width}", "--n_steps=3", "--batch_size=8", "--lc_samples=2"]
    if colour:
        rng = np.random.default_rng(0)
        for split, images in (("train", 8), ("test", 2)):
            for label in ("a", "b"):
                folder = tmp_path / "images" / split / label
                folder.mkdir(parents=True)
                for i in range(images):
                    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        flags += ["--dataset=imagefolder", f"--data_dir={tmp_path / 'images'}"]
    run_here(tmp_path, *flags)
    history = history_of(tmp_path)
    assert history["step"] == [0, 1, 2, 3]
    assert history["train_loss"][3] != history["train_loss"][0]
    assert len(set(history["weight_norm"])) == 4
    assert len(history["local_complexity"]["train"]) == 1


@pytest.mark.parametrize("flags", [
    ["--optimizer=adam"], ["--optimizer=sgd", "--lr=0.3"], ["--loss=mse"], ["--dtype=float64"], ["--batch_norm"],
    ["--activation=gelu"], ["--activation=tanh"], ["--init_scale=2"], ["--label_noise=0.3"],
], ids=lambda flags: flags[0])
def test_every_variant_lowers_the_training_loss(tmp_path, flags):
    run_here(tmp_path, *SMALL, "--n_steps=150", *flags)
    history = history_of(tmp_path)
    assert history["train_loss"][-1] < 0.9 * history["train_loss"][0]


def test_log_interval_logs_every_n_epochs(tmp_path):
    # 1,000 images: 3 steps an epoch
    run_here(tmp_path, *by_interval(SMALL), "--n_epochs=7", "--log_interval=3", "--batch_size=300")
    assert history_of(tmp_path)["epoch"] == [0, 3, 6, 7]


def test_without_lc_samples_there_is_no_local_complexity(tmp_path):
    run_here(tmp_path, *(flag for flag in SMALL if "lc_directions" not in flag), "--n_steps=2", "--lc_samples=0")
    assert history_of(tmp_path)["local_complexity"] == {}


def test_several_radii_and_fractions_of_255(tmp_path):
    run_here(tmp_path, *SMALL, "--n_steps=2", "--lc_radius", "0.01", "0.5", "--epsilons", "8/255,0", "1/255")
    history = history_of(tmp_path)
    assert list(history["robust_acc"]) == ["0", "0.00392157", "0.0313725"]
    small, large = (np.array(column) for column in history["local_complexity"]["random"].values())
    assert (small <= large).all() and small.sum() < large.sum()


def test_a_second_run_moves_the_first_aside(tmp_path, capsys):
    run_here(tmp_path, *SMALL, "--n_steps=3")
    first = (tmp_path / "logs" / "training_history.json").read_bytes()
    run_here(tmp_path, *SMALL, "--n_steps=2")
    run_here(tmp_path, *SMALL, "--n_steps=1")
    aside = sorted((tmp_path / "logs").glob("earlier-*"))
    assert len(aside) == 2 and str(aside[1]) in capsys.readouterr().out
    assert (aside[0] / "training_history.json").read_bytes() == first
    kept = [len(list(folder.glob("*.pt"))) for folder in sorted((tmp_path / "checkpoints").glob("earlier-*"))]
    assert kept == [4, 3] and len(list((tmp_path / "checkpoints").glob("*.pt"))) == 2
    assert history_of(tmp_path)["step"] == [0, 1]


@given(n_steps=st.integers(1, 10**7), log_points=st.integers(3, 300))
def test_log_schedule_is_even_in_log_step(n_steps, log_points):
    steps = log_schedule(n_steps, log_points)
    assert steps[0] == 0 and steps[1] == 1 and steps[-1] == n_steps
    assert all(a < b for a, b in zip(steps, steps[1:], strict=False))
    assert len(steps) == min(log_points, n_steps + 1)
    # Where whole numbers leave room, the ratio of neighbours stays nearly the same to the end.
    ratios = [b / a for a, b in zip(steps, steps[1:], strict=False) if a > 200]
    if len(ratios) > 1:
        assert max(ratios) - 1 < 1.5 * (min(ratios) - 1) + 2 / 200


@given(st.floats(0, 1, allow_subnormal=False), st.integers(1, 10_000))
def test_epsilons_are_read_as_numbers_and_fractions(value, denominator):
    assert parse_epsilon(repr(value)) == value
    numerator = int(value * denominator)
    assert parse_epsilon(f"{numerator}/{denominator}") == numerator / denominator


@given(st.text(max_size=12))
@settings(max_examples=300)
def test_no_text_passes_as_an_epsilon_outside_the_pixels_range(text):
    try:
        assert 0 <= parse_epsilon(text) <= 1
    except argparse.ArgumentTypeError as error:
        assert "\n" not in str(error) or "\n" in text


def test_seeds_differ_by_purpose_and_number():
    seeds = {seed_for(seed, purpose, number) for seed in range(5) for purpose in ("a", "b") for number in range(5)}
    assert len(seeds) == 50 and all(0 <= seed < 2**63 for seed in seeds)


def test_the_gap_between_the_measures_is_explained_beyond_five_points():
    config = argparse.Namespace(loss="ce")
    row = {"adv_acc": {"0.1": 0.55, "0.2": 0.50}, "robust_acc": {"0.1": 0.52, "0.2": 0.10}, "saturated": 0.3,
           "rounding": {"0.1": 0.01, "0.2": 0.38}, "zero_gradient": 0.0, "train_saturated": 0.5}
    said = "at epsilon 0.2 adv_acc is 50.0% and robust_acc 10.0%: 38.0 points are rounding"
    assert list(remarks(row, config)) == ["rounding"] and said in remarks(row, config)["rounding"]
    row["rounding"]["0.2"] = 0.02  # most images saturated or not: what is measured decides
    assert "38.0 are found by a stronger attack" in remarks({**row, "saturated": 1.0}, config)["stronger attack"]
    row["robust_acc"]["0.2"] = 0.46
    assert remarks(row, config) == {}
    assert list(remarks({**row, "zero_gradient": 0.02}, config)) == ["zero gradient"]


def test_saturated_training_is_explained_for_the_loss_that_suffers_from_it():
    row = {"adv_acc": {"0.1": 0.5}, "robust_acc": {"0.1": 0.5}, "rounding": {"0.1": 0.0},
           "saturated": 0.0, "zero_gradient": 0.0, "train_saturated": 0.51}
    said = remarks(row, argparse.Namespace(loss="ce"))
    assert list(said) == ["training saturated"]
    assert "51% of the training images" in said["training saturated"]
    assert "--loss=exact_ce" in said["training saturated"]
    assert remarks(row, argparse.Namespace(loss="exact_ce")) == {}


def test_log_points_after_the_first_begin_at_log_from(tmp_path):
    steps = log_schedule(100_000, 25, log_from=100)
    assert steps[:2] == [0, 100] and steps[-1] == 100_000 and len(steps) == 25
    ratios = np.diff(np.log(steps[1:]))
    assert ratios.max() - ratios.min() < 0.02
    assert log_schedule(50, 25, log_from=100) == [0, 50]
    run_here(tmp_path, *SMALL, "--n_steps=12", "--log_points=3", "--log_from=5")
    assert history_of(tmp_path)["step"] == [0, 5, 12]


def test_the_authors_attack_never_moves_where_the_gradient_is_zero(tmp_path):
    run_here(tmp_path, *SMALL, "--n_steps=40", "--init_scale=30", "--adv_size=100", "--epsilons=0.02", "--log_points=3",
             "--pgd_start=image", "--pgd_step_size=0.8/255")
    history = history_of(tmp_path)
    assert history["config"]["pgd_step_size"] == 0.8 / 255
    assert history["zero_gradient"][-1] > 0.1
    assert history["adv_acc"]["0.02"] == history["zero_gradient"]  # all that it counts as robust has no gradient
    assert "zero gradient" in {warning["kind"] for warning in history["warnings"]}


def test_a_saturated_run_says_so_once_and_records_it(tmp_path, capsys):
    # Weights this large saturate the softmax from the start.
    run_here(tmp_path, *SMALL, "--n_steps=40", "--init_scale=30", "--adv_size=100", "--epsilons=0.02,0.05,0.1")
    history = history_of(tmp_path)
    said, = (warning["text"] for warning in history["warnings"] if warning["kind"] == "rounding")
    assert "points are rounding" in said and " ".join(capsys.readouterr().out.split()).count(said) == 1
    assert history["saturated"][-1] > 0.5 and history["rounding"]["0.1"][-1] > 0.1


@pytest.mark.parametrize("seconds, best", [({1: 8, 2: 4, 4: 1, 6: 3}, 4), ({1: 1, 2: 60, 4: 60, 6: 60}, 1),
                                           ({1: 4, 2: 2, 4: 1.96, 6: 2}, 2), ({1: 8, 2: 8, 4: 8, 6: 4}, 6)])
def test_the_fastest_number_of_threads_is_taken_and_of_equals_the_smallest(monkeypatch, seconds, best):
    now = {"time": 0.0, "threads": 1}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr(time, "perf_counter", lambda: now["time"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.update(threads=n))

    def work():
        now["time"] += seconds[now["threads"]]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert devices.fastest_thread_count(work) == best
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert devices.fastest_thread_count(work) == 1


def test_the_threads_are_measured_stored_and_kept_unless_they_are_given(tmp_path, monkeypatch, capsys):
    flags = [flag for flag in SMALL if flag != "--threads=1"]
    counts = iter([1, 2])

    def measured(work):
        work()
        return next(counts)

    inputs = []
    monkeypatch.setattr(torch.autograd, "grad", lambda outputs, images: inputs.append(len(images)))
    monkeypatch.setattr(devices, "fastest_thread_count", measured)
    try:
        run_here(tmp_path, *flags, "--n_steps=2", "--eval_batch_size=70")
        assert inputs == [70]  # no more memory than in a log step
        assert "threads  1 in training, 2 in log steps" in capsys.readouterr().out
        run_here(tmp_path, *flags, "--n_steps=3", "--resume")  # a third measurement would raise StopIteration
        derived = history_of(tmp_path)["derived"]
        assert (derived["threads"], derived["eval_threads"]) == (1, 2)
        run_here(tmp_path, *flags, "--n_steps=4", "--resume", "--threads=2")
        assert history_of(tmp_path)["derived"]["threads"] == 2
    finally:
        torch.set_num_threads(1)


# ---- branches -------------------------------------------------------------------------------------------------------

def test_a_branch_begins_with_its_parents_columns_and_goes_its_own_way(tmp_path, capsys):
    parent, branch, plain = tmp_path / "parent", tmp_path / "branch", tmp_path / "plain"
    run_here(parent, *SMALL, "--n_steps=20")
    source = sorted((parent / "checkpoints").glob("*.pt"))[3]
    step = checkpoints.step_in_name(source)
    run_here(branch, *SMALL, "--n_steps=40", "--loss=exact_ce", f"--branch_from={source}")
    assert f"\nbranch   from step {step}, {source}\n" in capsys.readouterr().out
    run_here(plain, *SMALL, "--n_steps=40", f"--branch_from={source}")
    before, after = columns(parent), columns(branch)
    assert after["branch"] == {"of": str(source), "step": step, "epoch": before["epoch"][3], "schedule_from": step,
                               "loss_changed": [step]}
    i = before["step"].index(step) + 1
    assert after["step"][:i] == before["step"][:i] and after["train_loss"][:i] == before["train_loss"][:i]
    assert after["step"][-1] == 40 and after["train_loss"][i] != before["train_loss"][i]
    # the same flags take the parent's way
    run_here(parent, *SMALL, "--n_steps=40", "--resume")
    ends = [columns(folder)["weight_norm"][-1] for folder in (parent, plain)]
    assert ends[0] == ends[1]
    # a branch resumes like any run, and refuses what is not its parent's network
    run_here(branch, *SMALL, "--n_steps=60", "--loss=exact_ce", f"--branch_from={source}", "--resume")
    assert columns(branch)["step"][-1] == 60
    again = sorted((branch / "checkpoints").glob("*.pt"))[-1]
    run_here(tmp_path / "twig", *SMALL, "--n_steps=61", f"--branch_from={again}")
    assert columns(tmp_path / "twig")["branch"] == {"of": str(again), "step": 60, "epoch": after["epoch"][-1] * 1.5,
                                                    "schedule_from": 60, "loss_changed": [step, 60]}
    # another batch size: the epochs go on from there
    run_here(tmp_path / "half", *SMALL, "--n_steps=61", "--batch_size=10", f"--branch_from={again}")
    epochs, per_epoch = columns(tmp_path / "half")["epoch"], history_of(branch)["config"]["train_size"] // 10
    assert epochs == sorted(epochs) and epochs[-1] == pytest.approx(after["epoch"][-1] * 1.5 + 1 / per_epoch)
    for flag in ("--width=8", "--activation=tanh", "--init_scale=8", f"--n_steps={step}"):
        capsys.readouterr()
        run_here(tmp_path / "other", *SMALL, "--n_steps=40", flag, f"--branch_from={source}", status=2)
        assert flag.partition("=")[0] in capsys.readouterr().err
    # which images were right is not known of a parent that attacked others
    run_here(tmp_path / "fewer", *SMALL, "--adv_size=10", f"--n_steps={step + 1}", f"--branch_from={source}")
    assert f"--adv_size was 20, is 10: measurements before and after step {step} are not" in capsys.readouterr().out
    outcomes = columns(tmp_path / "fewer")["outcomes"]
    assert outcomes["robust"][:-1] == [None] * i and len(outcomes["robust"][-1]) == 10
    assert outcomes["test"][:-1] == before["outcomes"]["test"][:i]  # the test images are the same


def test_warm_up_and_schedule_of_a_branch_count_from_its_first_step(tmp_path, capsys):
    run_here(tmp_path / "parent", *SMALL, "--n_steps=20")
    (source,) = (tmp_path / "parent" / "checkpoints").glob("*_step_000000020.pt")
    flags = [*by_interval(SMALL), "--warmup_steps=10", "--lr_schedule=triangle", "--log_interval=1",
             f"--branch_from={source}"]
    run_here(tmp_path / "branch", *flags, "--n_steps=50")
    assert "lr_schedule triangle" in capsys.readouterr().out
    history = history_of(tmp_path / "branch")
    assert history["step"][-7:] == [20, 25, 30, 35, 40, 45, 50]
    assert history["lr"][-6:] == pytest.approx([0.0006, 0.001, 0.00075, 0.0005, 0.00025, 0])  # of the following step
    (tmp_path / "branch" / "checkpoints" / "checkpoint_epoch_0000010_step_000000050.pt").unlink()
    run_here(tmp_path / "branch", *flags, "--n_steps=50", "--resume")
    assert columns(tmp_path / "branch")["weight_norm"] == history["weight_norm"]
    run_here(tmp_path / "other", *flags, "--n_steps=30", status=2)
    assert "is at step 20: raise --n_steps=30 above 30 (warm-up included)" in capsys.readouterr().err


def test_a_branch_in_its_parents_folders_moves_the_parents_files_aside(tmp_path, capsys):
    run_here(tmp_path, *SMALL, "--n_steps=2")
    (source,) = (tmp_path / "checkpoints").glob("*_step_000000002.pt")
    run_here(tmp_path, *SMALL, "--n_steps=9", f"--branch_from={source}")
    assert history_of(tmp_path)["step"] == [0, 1, 2, 3, 5, 9] and list(tmp_path.glob(f"checkpoints/*/{source.name}"))


def test_a_branch_takes_the_history_of_its_own_parent(tmp_path, capsys):
    run_here(tmp_path, *SMALL, "--n_steps=20")
    run_here(tmp_path, *SMALL, "--n_steps=20", "--lr=0.01")  # moves the first aside
    (source,) = (tmp_path / "checkpoints").glob("earlier-*/*_step_000000020.pt")
    (history,) = (tmp_path / "logs").glob("earlier-*/training_history.json")
    run_here(tmp_path / "branch", *SMALL, "--n_steps=21", f"--branch_from={source}")
    assert columns(tmp_path / "branch")["train_loss"][:-1] == read_history(history)["train_loss"]
    shutil.copy(tmp_path / "logs" / "training_history.json", history)
    history.with_suffix(".rows.jsonl").unlink()
    capsys.readouterr()
    run_here(tmp_path / "other", *SMALL, "--n_steps=21", f"--branch_from={source}", status=2)
    assert "are not of one run" in capsys.readouterr().err


def test_other_moments_than_the_parents_start_anew(tmp_path, capsys):
    run_here(tmp_path / "parent", *SMALL, "--n_steps=5")
    source = sorted((tmp_path / "parent" / "checkpoints").glob("*.pt"))[-1]
    run_here(tmp_path / "branch", *SMALL, "--n_steps=9", "--optimizer=sgd", f"--branch_from={source}")
    assert "the optimizer starts anew" in capsys.readouterr().out
    assert columns(tmp_path / "branch")["step"][-1] == 9


# ---- figures and trackers never end a run ---------------------------------------------------------------------------

def test_a_figure_that_cannot_be_drawn_is_one_note(tmp_path, monkeypatch, capsys):
    from analysis import figure

    def fail(*_args):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(figure, "draw", fail)
    run_here(tmp_path, *[flag for flag in SMALL if flag != "--no_plot"], "--n_steps=3")
    out = capsys.readouterr().out
    assert out.count("the figure cannot be drawn") == 1 and "No module named 'matplotlib'" in out
    assert out.index("Interpolation:") < out.index("the figure cannot")
    assert history_of(tmp_path)["step"][-1] == 3


class Tracker:
    """A stand-in for a tracker that fails at its third log step."""

    rows = []

    def __init__(self, log_dir, config, step):
        self.rows.clear()

    def log(self, values, step):
        if len(self.rows) == 2:
            raise OSError("no network")
        self.rows.append((step, values))

    def end(self, figure, step):
        raise AssertionError("a tracker that failed is left alone")


def test_a_tracker_gets_every_column_and_its_failure_is_one_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Tracker)
    monkeypatch.setattr(trackers, "check", lambda names: None)
    run_here(tmp_path, *SMALL, "--n_steps=6", "--tracker", "wandb")
    assert capsys.readouterr().out.count("wandb failed (OSError: no network)") == 1
    history = history_of(tmp_path)
    assert [step for step, _ in Tracker.rows] == history["step"][:2] and history["step"][-1] == 6
    values = Tracker.rows[1][1]
    assert values["accuracy/test"] == history["test_acc"][1]
    assert values["robust_acc/0.1"] == history["robust_acc"]["0.1"][1]
    assert values["local_complexity/train/0.05/layer2"] == history["local_complexity"]["train"]["0.05"][1][1]


def test_tensorboard_reads_back_what_was_logged_and_a_resumed_run_writes_no_step_twice(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for n_steps in (4, 9):
        shown = [flag for flag in SMALL if flag != "--no_plot"]
        run_here(tmp_path, *shown, f"--n_steps={n_steps}", "--tracker", "tensorboard", "--resume")
    events = accumulator.EventAccumulator(str(tmp_path / "logs" / "tensorboard")).Reload()
    history = history_of(tmp_path)
    for name, column in (("accuracy/test", history["test_acc"]), ("robust_acc/0.1", history["robust_acc"]["0.1"])):
        assert [event.step for event in events.Scalars(name)] == history["step"]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(column)
    run_here(tmp_path, *SMALL, "--n_steps=4", "--seed=7", "--tracker", "tensorboard")  # another run, its own track
    fresh = accumulator.EventAccumulator(str(tmp_path / "logs" / "tensorboard")).Reload()
    assert [event.step for event in fresh.Scalars("accuracy/test")] == history_of(tmp_path)["step"]
    assert list((tmp_path / "logs").glob("earlier-*/tensorboard"))
    assert [image.step for image in events.Images("figure")] == [4, 9]


def test_a_tracker_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match="pip install not_installed"):
        trackers.check(["not_installed"])


def test_a_resumed_run_continues_its_run_of_wandb(tmp_path, monkeypatch):
    begun = []

    class Run:
        def __init__(self, **given):
            begun.append(given)

        def log(self, values, step):
            assert step in (0, 1, 2, 4) and values["accuracy/test"] >= 0

        def finish(self):
            begun[-1]["finished"] = True

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Run, __spec__=True))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for n_steps in (2, 4):
        run_here(tmp_path, *SMALL, f"--n_steps={n_steps}", "--log_points=3", "--tracker=wandb", "--resume")
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["config"]["width"] == 16
    assert all(given["project"] == "mine" and given["finished"] for given in begun)


# ---- the flags ------------------------------------------------------------------------------------------------------

def test_help_and_errors_come_without_pytorch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch was imported')")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command("--help"), capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    for name, field in flags.FIELDS.items():
        assert field.metadata.get("option", f"--{name}") in done.stdout
    done = subprocess.run(command("--learning_rate=1"), capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--learning_rate" in done.stderr


def test_choices_and_implied_values_are_those_of_the_registries():
    choices = {name: field.metadata.get("choices") for name, field in flags.FIELDS.items()}
    assert choices["model"] == list(models.MODELS) and choices["dataset"] == list(data.DATASETS)
    assert choices["activation"] == list(models.ACTIVATIONS) and choices["optimizer"] == list(train.OPTIMIZERS)
    assert choices["loss"] == list(losses.LOSSES) and choices["robust_budget"] == list(attacks.BUDGETS)
    assert choices["tracker"] == list(trackers.TRACKERS)
    assert list(flags.IMPLIED["width"]) == list(models.MODELS)
    assert set(flags.IMPLIED["train_size"]) < set(data.DATASETS)


@pytest.mark.parametrize("preset", flags.PRESETS)
def test_a_preset_stands_for_its_flags_and_flags_beside_it_override_them(preset, capsys):
    config, written = parse_args([f"--preset={preset}"]), parse_args(flags.PRESETS[preset][2].split())
    assert (config.log_dir, config.save_dir) == (f"runs/{preset}/logs", f"runs/{preset}/checkpoints")
    assert dataclasses.replace(config, preset=None, log_dir="logs", save_dir="checkpoints") == written
    assert set(flags.asked(config)) == {*flags.asked(written), "preset", "log_dir", "save_dir"}
    other = parse_args(["--n_epochs=7", "--model=resnet18", "--log_interval=2", f"--preset={preset}", "--log_dir=x",
                        "--dataset=digits", "--width=5"])
    assert (other.n_epochs, other.n_steps, other.model, other.width, other.depth) == (7, None, "resnet18", 5, None)
    assert (other.log_interval, other.log_points, other.modulus) == (2, 60, None)
    assert (other.log_dir, other.save_dir) == ("x", f"runs/{preset}/checkpoints") and other.lr == written.lr
    for words in (["--help"], ["--preset=list"]):
        with pytest.raises(SystemExit) as end:
            parse_args(words)
        shows, takes, line = flags.PRESETS[preset]
        assert not end.value.code and f"{shows}; {takes} {line}" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_preset_has_files_of_its_own_and_is_resumed_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*(word for word in SMALL if "dataset" not in word), "--width=200"]
    with handlers_kept():
        for more in (["--n_steps=2"], ["--n_steps=4", "--resume"]):
            assert train.main(["--preset=first", *words, *more]) == 0
    history = history_of(tmp_path / "runs" / "first")
    assert history["step"][-1] == 4 and history["config"]["preset"] == "first" and "loss" in history["asked"]
    assert history["config"]["init_scale"] == 6 and not list(tmp_path.rglob("earlier-*"))


@pytest.mark.parametrize("given, left_out", [
    (["--dataset=modular_addition", "--modulus=97", "--train_fraction=0.5", "--train_size=all", "--lc_radius=0.05"],
     ["--dataset=modular_addition"]),
    (["--preset=first", "--width=200", "--loss=mse"], ["--preset=first"]),
    (["--dataset=cifar10", "--train_size=all", "--epsilons", "8/255,4/255,2/255", "1/255"], ["--dataset=cifar10"]),
    (["--dataset=imagenette", "--image_size=128"], ["--dataset=imagenette"])], ids=lambda words: words[0])
def test_a_value_given_as_it_is_meant_makes_no_other_folder(given, left_out):
    assert flags.folder_name(parse_args(given)) == flags.folder_name(parse_args(left_out))


OTHER = {"depth": 3, "modulus": 7, "train_fraction": 0.3, "image_size": 8, "momentum": 0.5, "adam_eps": 0.1,
         "log_points": 60, "log_from": 1, "lc_directions": 25, "lc_radius": 0.05}
USELESS = {"modulus", "train_fraction", "image_size", "momentum"}


@pytest.mark.parametrize("mode, useless", [
    ("--dataset=digits", USELESS), ("--model=cnn", USELESS | {"depth"}), ("--preset=first", USELESS),
    ("--optimizer=sgd", USELESS - {"momentum"} | {"adam_eps"}),
    ("--lc_samples=0", USELESS | {"lc_directions", "lc_radius"}),
    ("--log_interval=1", USELESS | {"log_points", "log_from"}), ("--dataset=imagefolder", USELESS - {"image_size"}),
    ("--preset=modular", USELESS - {"modulus", "train_fraction"})])
def test_a_flag_without_effect_is_refused(mode, useless, capsys):
    refused = set()
    for name, value in OTHER.items():
        try:
            assert getattr(parse_args([mode, f"--{name}={value}"]), name) in (value, [value])
        except SystemExit:
            refused.add(name)
            assert capsys.readouterr().err.startswith(f"train.py: error: --{name} has an effect only with")
    assert refused == useless


def test_a_schedule_may_span_a_length_given_at_its_default():
    assert parse_args(["--n_epochs=100000", "--lr_schedule=cosine"]).lr_schedule == "cosine"


@pytest.mark.parametrize("channels, epsilons, radius", [
    (1, [0.03, 0.06, 0.10, 0.13, 0.16, 0.20], 0.05), (3, [1 / 255, 2 / 255, 4 / 255, 8 / 255], 0.005)])
def test_what_is_measured_by_default_depends_on_colour(channels, epsilons, radius):
    images, labels = torch.zeros(200, channels, 16, 16, dtype=torch.uint8), torch.zeros(200, dtype=torch.int64)
    dataset = data.Dataset("black", images, labels, images, labels, 10, [0.0], [1.0])
    config = train.complete(parse_args([]), dataset, torch.device("cpu"))
    assert (config.epsilons, config.lc_radius) == (epsilons, [radius])


@pytest.mark.parametrize("words, name", [
    ([], "seed_42"), (["--preset=first", "--depth=2", "--train_size=1000"], "first_depth_2_train_size_1000_seed_42"),
    (["--width=1000", "--n_steps=5", "--threads=2"], "width_1000_seed_42"),
    (["--model=mlp", "--train_size=1000", "--width=200", "--seed=3"], "seed_3"),
    (["--epsilons", "0.2", "0.1", "--batch_norm"], "batch_norm_epsilons_0.1,0.2_seed_42")], ids=str)
def test_a_folder_is_named_by_what_is_trained_and_measured(words, name):
    assert flags.folder_name(parse_args(words)).as_posix() == f"runs/{name}"


def test_image_folders_of_one_name_have_folders_of_their_own():
    names = [flags.folder_name(parse_args(["--dataset=imagefolder", f"--data_dir={path}"])) for path in (
        "/x/pets", "/y/pets", "/x/кошки", "/x/собаки")]
    assert len(set(names)) == 4 and "кошки" in str(names[2])
