"""The phases of local complexity and the outbreaks of the training loss."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import phases, statistics
from runtime.history import read_history

RESULTS = sorted(Path(ROOT, "results").glob("*.json"))


def names(complexity):
    return [name for name, _, _ in phases.phases(np.asarray(complexity, dtype=float))]


def three_phases(n=60):
    x = np.linspace(0, 5, n)

    def rise(at):
        return 1 / (1 + np.exp(-6 * (x - at)))
    return 6 - 5 * rise(0.8) + 1.2 * rise(2.4) - 1.5 * rise(4)


def test_the_three_phases_are_found_where_they_are():
    curve = three_phases()
    found = {name: (first, last) for name, first, last in phases.phases(curve)}
    assert list(found) == ["first descent", "ascent", "second descent"]
    places = [(0, 9, 22), (18, 28, 40), (35, 47, 59)]
    for (first, last), (low, middle, high) in zip(found.values(), places, strict=True):
        assert low <= first <= middle <= last <= high


@pytest.mark.parametrize("change, expected", [(0.92, []), (0.89, ["first descent"]), (1.08, []), (1.12, ["ascent"])])
def test_a_change_by_a_tenth_is_a_phase_and_less_is_none(change, expected):
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


def test_two_points_are_no_descent_wherever_they_lie():
    """A dip, or a peak, of two log points on a plateau and on an ascent; at the end, too, nothing is held yet."""
    ascent = np.concatenate([np.geomspace(6, 1, 15), np.geomspace(1, 2, 15), np.full(30, 2.0)])
    for at in range(1, 60):
        for factor in (0.3, 0.5, 2.0):
            flat, rising = np.ones(60), ascent.copy()
            flat[at:at + 2] *= factor
            assert names(flat) == []
            if at >= 30:
                rising[at:at + 2] *= factor
                assert names(rising) == ["first descent", "ascent"]
    held = ascent.copy()
    held[40:] *= 0.5
    assert names(held) == ["first descent", "ascent", "second descent"]


def test_what_follows_a_rise_is_no_first_descent():
    collapse = np.concatenate([np.full(20, 6.0), np.geomspace(6, 9, 10), np.geomspace(9, 0.5, 10), np.full(20, 0.5)])
    assert names(collapse) == ["ascent", "descent"]
    # A small rise before and larger ones after the collapse do not make the collapse a first descent, either.
    levels = np.repeat([6.0, 6.9, 0.5, 1.0, 0.6, 0.9], 5)
    assert names(levels) == ["ascent", "descent", "second ascent", "second descent"]


def test_the_four_largest_moves_have_names():
    assert names(np.repeat([6, 1, 2, 1.2, 1.6], 5)) == ["first descent", "ascent", "second descent", "second ascent"]
    wiggling = np.repeat([6, 1, 1.5, 1.3, 2, 1.2, 1.6], 5)
    found = phases.phases(wiggling)
    assert [name for name, *_ in found] == ["first descent", "ascent", "second descent", "second ascent"]
    assert [last for *_, last in found] == [5, 20, 25, 30]  # the small descent within the ascent has none


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


def test_a_phase_that_has_a_smaller_one_within_begins_before_it_ends():
    levels = np.repeat([3.0, 0.0, 1.0, 0.08, 1.08, -1.92], 5)
    assert [name for name, *_ in phases.phases(np.exp(levels))] == ["first descent", "ascent", "second descent"]
    _, (_, first, last), _ = phases.phases(np.exp(levels))
    assert first == 19 and last == 20


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40))
def test_smoothing_removes_what_is_shorter_than_three_points_and_nothing_else(values):
    values = np.array(values)
    smooth = phases.smoothed(values)
    assert smooth[0] == values[0] or len(values) > 1
    np.testing.assert_array_equal(phases.smoothed(smooth), smooth)
    runs = np.diff(np.flatnonzero(np.concatenate([[True], np.diff(smooth) != 0, [True]])))
    turns = [k for k in range(1, len(runs) - 1)]
    levels = smooth[np.cumsum([0, *runs[:-1]])]
    for k in turns:
        if (levels[k] - levels[k - 1]) * (levels[k + 1] - levels[k]) < 0:
            assert runs[k] >= 3
    np.testing.assert_array_equal(phases.smoothed(np.sort(values))[:-2], np.sort(values)[:-2])


FALLS_RISES = ["first descent", "ascent"]
PHASES = {**dict.fromkeys(["digits_large_init", "mnist_large_init"], ["ascent", "descent"]),
          **dict.fromkeys(["digits_exact", "mnist_exact", "mnist_exact_seed1", "mnist_exact_seed2", "mnist_exact_seed3",
                           "mnist_exact_eps", "mnist_depth2_exact", "mnist_batch_norm_exact", "mnist_float64",
                           "mnist_float64_seed1", "mnist_long_exact", "cnn", "cnn_exact", "cnn_decay",
                           "mnist_stablemax_from_image"], FALLS_RISES),
          **dict.fromkeys(["cnn_batch_norm", "resnet18_batch_norm", "resnet18_whole"], ["ascent"]),
          "resnet18": ["first descent"]}


def test_phases_of_the_recorded_runs():
    """With rounding, or at depth 6, an MLP from PyTorch's weights descends, ascends, descends; otherwise see above."""
    found = {path.stem: names(statistics.total_complexity(read_history(path)))[:3] for path in RESULTS}
    assert len(found) > 30
    assert found == {name: PHASES.get(name, [*FALLS_RISES, "second descent"]) for name in found}


def training(losses, peaks=None):
    n = len(losses)
    return {"step": [2**i for i in range(n)], "train_acc": [0.5] + [1.0] * (n - 1), "train_loss": losses,
            **({"max_batch_loss": peaks} if peaks else {}), "config": {"batch_size": 200}, "sizes": {"train": 1000}}


def test_an_outbreak_between_two_log_points_is_seen_by_its_largest_batch():
    losses = [2.0, 1e-2, 1e-4, 1e-6, 1e-6, 1e-7, 1e-7]
    peaks = [None, 2.0, 1e-2, 1e-4, 1e-3, 1e-6, 6e-5]
    assert phases.outbreaks(training(losses, peaks)) == [4, 6]
    assert phases.outbreaks(training(losses)) == []
    # A batch is a fifth of the training set here: the loss of the whole set rose to a fifth of the batch's or more.
    assert phases.outbreaks(training(losses, [*peaks[:4], 4.9e-4, *peaks[5:]])) == [6]
    small = training(losses, peaks)
    small["config"]["batch_size"] = 2
    assert phases.outbreaks(small) == []


def test_older_histories_show_an_outbreak_that_lasts_to_the_log_point():
    assert phases.outbreaks(training([2.0, 1e-2, 1e-6, 1e-8, 1e-5, 1e-6, 1e-8, 2e-6])) == [4, 7]
    assert phases.outbreaks(training([2.0, 1e-2, 1e-6, 1e-8, 9e-7, 9.9e-7])) == []
    assert phases.outbreaks(training([2.0, 1e-2, 1e-6, 1e-8, 9e-7, 1.01e-6])) == [5]


def test_what_is_no_outbreak():
    early = training([1e-6, 2.0, 1e-3, 1e-4])
    early["train_acc"] = [0.1, 0.5, 1.0, 1.0]
    assert phases.outbreaks(early) == []  # before interpolation
    assert phases.outbreaks(training([2.0, 1e-2, 0.0, 9e-8, 0.0])) == []  # rounding
    assert phases.outbreaks(training([2.0, 1e-2, 0.0, 2e-7, 0.0])) == [3]
    assert phases.outbreaks(training([2.0, None, None, 1e-3, None, 1.0])) == [5]
    assert phases.outbreaks(training([2.0, 1e-2, 1e-5, 1e-3, 1e-2, 5e-2])) == [3]  # it goes on, it does not begin anew
    unfitted = training([2.0, 1e-6, 1.0])
    unfitted["train_acc"] = [0.5] * 3
    assert phases.outbreaks(unfitted) == []


@pytest.mark.parametrize("name, steps", [("mnist", [18_900, 39_630, 47_689, 57_387, 83_101]), ("mnist_exact", []),
                                         ("mnist_float64", []), ("mnist_float64_seed1", []),
                                         ("mnist_long_exact", []), ("resnet18", [29_222, 50_000]),
                                         ("mnist_depth2", [22_743, 47_689, 83_101, 100_000])])
def test_outbreaks_of_the_recorded_runs(name, steps):
    history = read_history(ROOT / "results" / f"{name}.json")
    assert [history["step"][i] for i in phases.outbreaks(history)] == steps
