"""The phases of local complexity and the spikes of the training loss."""

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import phases, statistics
from records.history import read_history


def names(complexity):
    return [name for name, _, _ in phases.phases(np.asarray(complexity, dtype=float))]


def test_a_change_by_a_tenth_is_a_phase_and_less_is_none():
    for change, expected in ((0.92, []), (0.89, ["first descent"]), (1.08, []), (1.12, ["ascent"])):
        assert names(np.concatenate([np.ones(20), np.geomspace(1, change, 10), np.full(20, change)])) == expected


def test_noise_is_no_phase_and_five_times_the_noise_is_one():
    random, said = np.random.default_rng(0), 0
    for _ in range(50):
        noise = np.exp(0.06 * random.normal(size=60))
        said += names(noise) != []
        assert names(noise * np.where(np.arange(60) < 30, 3.0, 1.0)) == ["first descent"]
    assert said <= 1
    rough = np.exp(0.2 * random.normal(size=200))
    assert names(rough * np.linspace(1.6, 1, 200)) == []  # a fall by 0.47 in the logarithm, noise of 0.2


def test_what_follows_a_rise_is_no_first_descent():
    collapse = np.concatenate([np.full(20, 6.0), np.geomspace(6, 9, 10), np.geomspace(9, 0.5, 10), np.full(20, 0.5)])
    assert names(collapse) == ["ascent", "descent"]
    # A small rise before and larger ones after the collapse do not make the collapse a first descent, either.
    levels = np.repeat([6.0, 6.9, 0.5, 1.0, 0.6, 0.9], 5)
    assert names(levels) == ["ascent", "descent", "second ascent", "second descent"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 20, allow_subnormal=False), max_size=50)
       | st.lists(st.sampled_from([0.0, 1.0, 1.05, 2.0, 3.0]), max_size=50))
def test_phases_follow_each_other_and_go_the_way_their_names_say(values):
    complexity = np.array(values)
    found = phases.phases(complexity)
    assert [name for name, _, _ in found] in [list(order[:len(found)]) for order in (
        ("first descent", "ascent", "second descent", "second ascent"),
        ("ascent", "descent", "second ascent", "second descent"))]
    places = [place for _, first, last in found for place in (first, last)]
    assert places == sorted(places) and all(first < last for _, first, last in found)
    assert all(0 <= place < len(values) for place in places)
    if found:
        log = phases.smoothed(np.log(np.maximum(complexity, 0.02 * complexity.max())))
        for name, first, last in found:
            change = log[last] - log[first]
            assert (change if name.endswith("ascent") else -change) > 0.06


def test_plateaus_belong_to_no_phase():
    """What lies within 15% of a move's height of its ends, and within a tenth of the curve, is plateau."""
    curve = np.concatenate([np.full(20, 5.0), np.geomspace(5, 6.5, 31), np.full(20, 6.5)])
    assert phases.phases(curve) == phases.phases(1000 * curve) == [("ascent", 24, 46)]
    steep = np.concatenate([np.full(20, 5.0), np.geomspace(5, 100, 31), np.full(20, 100.0)])
    assert [place for _, *place in phases.phases(steep / 1000)] == [[20, 50]]


@pytest.mark.parametrize("runs, expected", [
    ("first mnist mnist_seed1 mnist_depth6 mnist_adam digits resnet18", ["first descent", "ascent", "second descent"]),
    ("mnist_exact mnist_float64 mnist_decay0.1_exact digits_exact cnn", ["first descent", "ascent"]),
    ("mnist_gelu mnist_width1000 mnist_decay1", ["first descent"]),
    ("modular_exact modular_decay_ce cnn_batch_norm resnet18_whole", ["ascent"]),
    ("mnist_large_init digits_large_init modular_ce", ["ascent", "descent"])])
def test_phases_of_recorded_runs(runs, expected):
    for run in runs.split():
        assert names(statistics.total_complexity(read_history(ROOT / "results" / f"{run}.json")))[:3] == expected, run


def training(losses, peaks=None):
    n = len(losses)
    return {"step": [2**i for i in range(n)], "train_acc": [0.5] + [1.0] * (n - 1), "train_loss": losses,
            **({"max_batch_loss": peaks} if peaks else {}), "config": {"batch_size": 200}, "sizes": {"train": 1000}}


def test_an_spike_between_two_log_points_is_seen_by_its_largest_batch():
    losses = [2.0, 1e-2, 1e-4, 1e-6, 1e-6, 1e-7, 1e-7]
    peaks = [None, 2.0, 1e-2, 1e-4, 1e-3, 1e-6, 6e-5]
    assert phases.spikes(training(losses, peaks)) == [4, 6]
    assert phases.spikes(training(losses)) == []
    # A batch is a fifth of the training set here: the loss of the whole set rose to a fifth of the batch's or more.
    assert phases.spikes(training(losses, [*peaks[:4], 4.9e-4, *peaks[5:]])) == [6]
    small = training(losses, peaks)
    small["config"]["batch_size"] = 2
    assert phases.spikes(small) == []


def test_the_losses_of_different_loss_functions_are_not_compared():
    history = training([2.0, 1e-2, 1e-4, 1e-4, 1e-1, 1e-1, 1e-3, 0.5])
    assert phases.spikes(history) == [4, 7]
    for branch, found in (({"step": 9, "loss_changed": [9]}, [7]), ({"step": 9, "loss_changed": []}, [4, 7]),
                          ({"step": 9}, [7]), ({"step": 70, "loss_changed": [9, 70]}, [])):
        assert phases.spikes(history | {"branch": {"of": "x.pt", **branch}}) == found


@pytest.mark.parametrize("losses, found", [
    ([2.0, 1e-2, 0.0, 9e-8, 0.0], []),  # rounding
    ([2.0, 1e-2, 0.0, 2e-7, 0.0], [3]),
    ([2.0, None, None, 1e-3, None, 1.0], [5]),
    ([2.0, 1e-2, 1e-5, 1e-3, 1e-2, 5e-2], [3]),  # it goes on, it does not begin anew
    ([2.0, 1e-2, 1e-6, 1e-8, 1e-5, 1e-6, 1e-8, 2e-6], [4, 7]),
    ([2.0, 1e-2, 1e-6, 1e-8, 9e-7, 9.9e-7], [])])
def test_spikes_in_the_loss_at_log_points(losses, found):
    assert phases.spikes(training(losses)) == found
    for train_acc in ([0.5] * len(losses), [0.5] * (len(losses) - 1) + [1.0]):  # never fitted; only at the end
        assert phases.spikes(training(losses) | {"train_acc": train_acc}) == []


@pytest.mark.parametrize("name, steps", [
    ("mnist", [15_706, 39_630, 57_387, 69_057, 83_101, 100_000]), ("mnist_long_exact", []), ("mnist_float64", []),
    ("resnet18", [29_222])])
def test_spikes_of_the_recorded_runs(name, steps):
    history = read_history(ROOT / "results" / f"{name}.json")
    assert [history["step"][i] for i in phases.spikes(history)] == steps
