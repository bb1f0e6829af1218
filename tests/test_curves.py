"""The numbers of a history: what rises later and how surely, the phases, the outbreaks, the summary, the tables."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis import phases, report, runs, statistics
from runtime.history import read_history

RESULTS = sorted(Path(ROOT, "results").glob("*.json"))


def hexed(right):
    """Booleans as the history writes them: four a hexadecimal digit, the first in the highest bit."""
    bits = "".join("1" if r else "0" for r in right)
    bits += "0" * (-len(bits) % 4)
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def make_history(steps, train, test, robust=None, adv=None, complexity=None, images=1000, **columns):
    """A history with these curves; robust and adv: {key: curve}; complexity: the sum over two layers."""
    n = len(steps)
    layers = complexity is not None and [None if c is None else [0.75 * c, 0.25 * c] for c in complexity]
    return {
        "version": 1, "step": list(map(int, steps)), "epoch": [0.0] * n, "train_loss": [0.1] * n,
        "test_loss": [0.1] * n, "train_acc": list(train), "test_acc": list(test), "weight_norm": [1.0] * n,
        "seconds": [1.0] * n,
        "robust_acc": {key: list(values) for key, values in (robust or {}).items()},
        "adv_acc": {key: list(values) for key, values in (adv or robust or {}).items()},
        "local_complexity": {"train": {"0.05": layers}} if layers else {},
        "config": {"model": "mlp", "dataset": "digits", "depth": 3, "width": 8, "seed": 1, "batch_size": 200,
                   "n_steps": int(steps[-1]) if n else 1, "log_dir": "logs"},
        "sizes": {"train": 1000, "test": images, "attacked": images}, "environment": {}, "warnings": [], **columns}


def paired_history(test, ranks, adv, keys, train=None, **config):
    """A history whose accuracies come from outcomes: bool (log points, images), ranks and {key: bool} alike."""
    n, images = test.shape
    train = [0.5, 0.9] + [1.0] * (n - 2) if train is None else train
    history = make_history(2 ** np.arange(n), train, test.mean(1), images=images)
    grid = sorted(map(float, keys))
    history["robust_acc"] = {key: (ranks > 1 + grid.index(float(key))).mean(1).tolist() for key in keys}
    history["adv_acc"] = {key: right.mean(1).tolist() for key, right in adv.items()}
    history["outcomes"] = {"test": [*map(hexed, test)],
                           "robust": ["".join(chr(48 + rank) for rank in row) for row in ranks],
                           "adv": {key: [*map(hexed, right)] for key, right in adv.items()}}
    history["config"] |= config
    return json.loads(json.dumps(history))


def margins(random, points, images, memory=0.9, spread=1.0):
    """Standard normal (points, images): what an image keeps for the whole run, and noise that fades over log points."""
    noise = random.normal(size=(points, images))
    for t in range(1, points):
        noise[t] = memory * noise[t - 1] + np.sqrt(1 - memory**2) * noise[t]
    return (noise + spread * random.normal(size=images)) / np.sqrt(1 + spread**2)


def flat_history(random, points=40, images=500, rise=0.0, at=20, keys=("0.03", "0.1", "0.0313725"), **config):
    """All accuracies are noise about a level that changes nowhere, but for `rise` standard deviations from `at` on."""
    def curve():
        step = rise * (np.arange(points) >= at)[:, None]
        return margins(random, points, images, random.choice([0.0, 0.9, 0.99]), random.choice([0.0, 1.0, 3.0])) + step

    base, levels = curve(), np.sort(random.uniform(-2.5, 2, size=1 + len(keys)))
    ranks = sum((base > level).astype(int) for level in levels)
    return paired_history(ranks > 0, ranks, {key: curve() > random.uniform(-2.5, 2) for key in keys}, keys, **config)


def table_line(text, label):
    """The cells of a summary's table about one curve, split into words."""
    (line,) = [line for line in text.splitlines() if line.startswith(label + " ")]
    return line[len(label):].split()


# ---- the outcomes of single images ----

def test_outcomes_are_decoded_as_the_format_says():
    history = make_history([0, 1], [1, 1], [1.0, 0.4], {"0.1": [0.6, 0.2], "0.03": [0.8, 0.4]}, images=5)
    history["outcomes"] = {"test": ["f8", "90"], "robust": ["33210", "3200;"], "adv": {"0.1": [None, "08"]}}
    found = statistics.accuracy_curves(history)
    assert [row.tolist() for row in found["test"].outcomes] == [[True] * 5, [True, False, False, True, False]]
    # Rank 2 withstands the smallest epsilon, rank 3 both; ';' is chr(48 + 11).
    assert [row.tolist() for row in found["robust ε 0.03"].outcomes] == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 1]]
    assert [row.tolist() for row in found["robust ε 0.1"].outcomes] == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]]
    assert found["adv ε 0.1"].outcomes[0] is None and found["adv ε 0.1"].outcomes[1].tolist() == [0, 0, 0, 0, 1]
    assert found["adv ε 0.03"].outcomes is None and found["test"].images == 5


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_hexadecimal_digits_hold_every_image(right):
    assert statistics.from_hex(hexed(right), len(right)).tolist() == right
    with pytest.raises(ValueError, match="damaged"):
        statistics.from_hex(hexed(right) + "0", len(right))


def test_an_epsilon_of_zero_is_the_clean_image():
    history = make_history([0], [1], [0.5], {"0": [0.5], "0.1": [0.25]}, images=4)
    history["outcomes"] = {"robust": ["0112"]}
    found = statistics.accuracy_curves(history)
    assert found["robust ε 0"].outcomes[0].tolist() == [0, 1, 1, 1]
    assert found["robust ε 0.1"].outcomes[0].tolist() == [0, 0, 0, 1]


# ---- what rises, and how surely ----

def pairs(gains, losses, images=1000, both=300):
    """(before, after): so many images gained, lost, right at both times, and the rest wrong at both."""
    before, after = np.zeros((2, images), dtype=bool)
    before[:losses + both], after[losses:both + losses + gains] = True, True
    return before, after


@pytest.mark.parametrize("gains, losses", [(45, 5), (0, 0), (7, 7), (3, 9), (1, 0)])
def test_two_log_points_are_compared_by_the_exact_mcnemar_test(gains, losses):
    before, after = pairs(gains, losses)
    curve = statistics.Curve(np.array([before.mean(), after.mean()]), 1000, [before, after])
    expected = stats.binomtest(gains, gains + losses, alternative="greater").pvalue if gains + losses else 1.0
    assert statistics.p_values(curve, [0], [1]) == pytest.approx([expected])


def test_a_log_point_has_to_be_better_than_each_of_several():
    high, low = pairs(0, 12)
    middle = low.copy()
    middle[:6] = True
    rows = [high] * 3 + [low, low, middle] + [high] * 5
    curve = statistics.Curve(np.array([row.mean() for row in rows]), 1000, rows)
    assert statistics.p_values(curve, [3, 5], [6, 4]) == pytest.approx([0.5**6, 1])
    # The dip is over these three; eight stretches could have been it.
    assert statistics.delayed_rise(curve.values, 0, 1000, rows).p_recovery == pytest.approx(8 * 0.5**6)


def test_without_outcomes_two_log_points_are_compared_by_their_wilson_intervals():
    a, n = 0.3, 1000
    for b in (0.32, 0.35, 0.4, 0.5):
        curve = statistics.Curve(np.array([a, b]), n)
        (p,) = statistics.p_values(curve, [0], [1])
        z = stats.norm.isf(p) / np.sqrt(2)  # at z standard deviations the two intervals touch
        confidence = stats.norm.cdf(z) - stats.norm.cdf(-z)
        ends = [stats.binomtest(round(x * n), n).proportion_ci(confidence, method="wilson") for x in (a, b)]
        assert ends[0].high == pytest.approx(ends[1].low)
    assert statistics.p_values(statistics.Curve(np.array([0.0, 1.0, 0.0]), n), [0, 1], [2]) == 1


def test_a_log_point_whose_images_are_not_known_is_compared_by_its_fraction():
    before, after = pairs(45, 5)
    values = np.array([before.mean(), after.mean()])
    bare = statistics.p_values(statistics.Curve(values, 1000), [0], [1])
    assert statistics.p_values(statistics.Curve(values, 1000, [before, None]), [0], [1]) == bare
    assert statistics.p_values(statistics.Curve(values, 1000, [before, after]), [0], [1]) < bare / 1e4


def test_p_values_are_corrected_as_published():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust, "holm"
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0] and statistics.holm([]) == []
    assert statistics.simes([0.01, 0.02, 0.5]) == pytest.approx(min(3 * 0.01 / 1, 3 * 0.02 / 2, 3 * 0.5 / 3))


def test_wilson_interval_agrees_with_published_values():
    # Newcombe 1998, Statistics in Medicine 17:857, Table I: 81/263 and 0/20, score method without correction.
    assert statistics.wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert statistics.wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_a_level_counts_only_if_every_one_of_its_log_points_is_better():
    before, after = pairs(45, 5)
    rows = [before] * 6 + [after] * 3 + [before] * 3
    rise = statistics.delayed_rise([row.mean() for row in rows], 1, 1000, rows)
    single = stats.binomtest(45, 50, alternative="greater").pvalue
    assert rise.half == 6 and rise.p == pytest.approx(8 * single)  # one of the eight stretches of three is held
    rows[7] = before
    rise = statistics.delayed_rise([row.mean() for row in rows], 1, 1000, rows)
    assert rise.p == 1 and rise.half is None and rise.brief
    assert rise.p_once == pytest.approx(10 / 2 * single)  # two of ten log points are better


def test_a_dip_and_the_recovery_from_it_are_seen_and_paid_for():
    high, low = pairs(0, 12)
    rows = [high] * 3 + [low] * 4 + [high] * 5
    rise = statistics.delayed_rise([row.mean() for row in rows], 0, 1000, rows)
    assert rise.half is None and rise.recovery == 7 and rise.lowest_at == 3
    assert (rise.start, rise.lowest, rise.recovered) == pytest.approx((0.312, 0.3, 0.312))
    # Nine stretches could have been the lowest; of the four disjoint ones after it three lie above it.
    assert rise.p_recovery == pytest.approx(9 * 4 / 3 * 0.5**12)
    fallen = statistics.delayed_rise([row.mean() for row in rows[:7]], 0, 1000, rows[:7])
    assert fallen.recovery is None and fallen.lowest == pytest.approx(0.3)
    high, low = pairs(0, 60)
    from_below = statistics.delayed_rise([row.mean() for row in [low] * 5 + [high] * 5], 0, 1000)
    assert from_below.half == 5 and from_below.recovery is None  # no dip below the value at interpolation


@pytest.mark.parametrize("paired", [True, False])
def test_flat_curves_are_called_rising_in_at_most_five_percent_of_the_runs(paired):
    random, said, naive = np.random.default_rng(7), 0, 0
    for _ in range(60):
        history = flat_history(random)
        if not paired:
            del history["outcomes"]
        rises, start = statistics.rises_of(history).values(), statistics.interpolation_index(history["train_acc"])
        assert len(rises) == 7
        said += any(rise.half is not None or rise.brief or rise.recovery is not None for rise in rises)
        naive += any(statistics.p_values(curve, [start], range(start + 1, 40)).min() < 0.05
                     for curve in statistics.accuracy_curves(history).values())
    assert said <= 3
    assert naive > 30  # the test can fail: the same comparisons, each for itself, say so in most runs


def test_a_rise_of_four_points_is_found_in_a_thousand_paired_images():
    random = np.random.default_rng(1)
    for _ in range(8):
        ranks = np.full((40, 1000), 1)
        ranks[:, random.permutation(1000)[:340]] = 2
        wrong = random.permutation(np.flatnonzero(ranks[0] == 1))
        for t in range(25, 40):
            ranks[t, wrong[:45]] = 2
            ranks[t, random.permutation(np.flatnonzero(ranks[0] == 2))[:5]] = 1
        history = paired_history(ranks > 0, ranks, {"0.1": ranks > 1}, ["0.1"])
        rises = statistics.rises_of(history)
        assert rises["robust ε 0.1"].half == 25 and rises["adv ε 0.1"].half == 25 and rises["test"].half is None
        assert rises["robust ε 0.1"].level - rises["robust ε 0.1"].start == pytest.approx(0.04)
        del history["outcomes"]
        assert statistics.rises_of(history)["robust ε 0.1"].half is None


def test_all_curves_of_a_run_are_paid_for_together():
    """A p-value of 1% is enough for one curve and not for the best of seven."""
    quiet = np.zeros((9, 1000), dtype=bool)
    before, after = pairs(7, 0)
    rising = np.array([before] * 3 + [after] * 6)
    rows = [*rising]
    alone = statistics.delayed_rise(rising.mean(1), 2, 1000, rows)
    assert alone.half == 3 and alone.p == pytest.approx(0.5**7)
    ranks = 1 + rising.astype(int)
    history = paired_history(quiet, ranks, {"0.1": quiet, "0.2": quiet, "0.3": quiet}, ["0.1", "0.2", "0.3"])
    rise = statistics.rises_of(history)["robust ε 0.1"]
    assert rise.p == pytest.approx(14 * 0.5**7) and rise.half is None
    assert rise.p_once == pytest.approx(7 * 0.5**7)


# ---- half of the rise ----

def test_half_of_the_rise_is_that_of_the_held_level():
    values = np.full(60, 0.1)
    values[5:], values[30] = 0.4, 0.9
    rise = statistics.delayed_rise(values, 0, 1000)
    assert rise.half == 5 and rise.level == 0.4 and rise.largest == 0.9


def test_the_last_log_point_can_be_the_half_of_a_rise():
    assert statistics.delayed_rise([0.1, 0.1, 0.1, 0.9], 2, 1000).half == 3
    assert statistics.delayed_rise([0.1, 0.1, 0.1, 0.9, None], 2, 1000).half == 3
    two_later = statistics.delayed_rise([0.1, 0.1, 0.1, 0.9, 0.9], 2, 1000)
    assert two_later.half == 3
    at_the_end = statistics.delayed_rise([0.1] * 10 + [0.9] * 3, 2, 1000)
    assert at_the_end.half == 10 and at_the_end.level == 0.9


def test_the_half_is_where_the_curve_stays_above_it():
    values = [0.1] * 5 + [0.7] + [0.1] * 4 + [0.3, 0.44, 0.46, 0.5, 0.6, 0.8, 0.8, 0.8, 0.8]
    assert statistics.delayed_rise(values, 2, 1000).half == 12  # half of the rise from 0.1 to 0.8 is 0.45
    exactly = [0.1] * 5 + [0.45, 0.45, 0.45, 0.8, 0.8, 0.8]
    assert statistics.delayed_rise(exactly, 2, 1000).half == 5


def test_a_spike_of_one_or_two_log_points_is_no_rise():
    values = np.full(30, 0.2)
    values[10:12] = 0.9
    rise = statistics.delayed_rise(values, 2, 1000)
    assert rise.half is None and rise.brief and rise.level == 0.2


def test_interpolation_is_at_99_percent_of_training_accuracy():
    assert statistics.interpolation_index([0.5, None, 0.9899, 0.99, 1.0]) == 3
    assert statistics.interpolation_index([0.5, None]) is None and statistics.interpolation_index([]) is None


def test_what_is_not_known_is_passed_over():
    values = [0.1, 0.1, np.nan, 0.1, np.nan, 0.8, np.nan, 0.8, 0.8, np.nan]
    rise = statistics.delayed_rise(values, 1, 1000)
    assert (rise.start, rise.final, rise.half) == (0.1, 0.8, 5)
    for start in (None, 2, 9):  # never fitted; no value at interpolation; nothing after it
        nothing = statistics.delayed_rise(values, start, 1000)
        assert nothing.half is None and not nothing.brief and nothing.recovery is None and nothing.final == 0.8
    assert np.isnan(statistics.delayed_rise([np.nan], 0, 1000).final)


# ---- several seeds ----

def test_pooled_seeds_find_what_one_does_not():
    """14 gained and 4 lost on 300 images are too few for one run, their sum over four seeds is not."""
    def history(seed, points=12):
        before, after = pairs(14, 4, images=300, both=100)
        rows = np.array([before] * 5 + [after] * (points - 5))[:, np.random.default_rng(seed).permutation(300)]
        ranks = 1 + rows.astype(int)
        return paired_history(ranks > 0, ranks, {"0.1": ranks > 1}, ["0.1"], seed=seed)

    group = [history(seed) for seed in range(4)]
    assert [statistics.rises_of(one)["robust ε 0.1"].half for one in group] == [None] * 4
    steps, rises = statistics.pooled_rises(group)
    assert steps == group[0]["step"][2:]  # from interpolation on
    rise = rises["robust ε 0.1"]
    assert steps[rise.half] == 2**5
    single = stats.binomtest(4 * 14, 4 * 18, alternative="greater").pvalue
    assert rise.p == pytest.approx(6 * 7 / 5 * single)  # of seven stretches five are held; six statements
    assert rise.start == pytest.approx(104 / 300) and rise.level == pytest.approx(114 / 300)

    unfinished, unfitted = history(4, points=7), history(5)
    unfitted["train_acc"] = [0.5] * 12
    empty = make_history([], [], [])
    assert statistics.pooled_rises([*group, unfinished, unfitted, empty])[1]["robust ε 0.1"].p == rise.p
    assert statistics.pooled_rises([unfitted, empty]) == ([], {})


def test_each_seed_is_compared_with_its_own_interpolation():
    def history(fitted_at):
        train = np.where(np.arange(10) >= fitted_at, 1.0, 0.5)
        robust = np.where(np.arange(10) > fitted_at, 0.5, 0.2)
        return make_history(range(10), train, [0.9] * 10, {"0.1": robust})

    steps, rises = statistics.pooled_rises([history(2), history(4), history(5)])
    assert steps == [4, 6, 7, 8, 9]
    assert rises["robust ε 0.1"].start == pytest.approx(0.2) and rises["robust ε 0.1"].level == pytest.approx(0.5)


def test_mean_and_range_over_seeds_with_other_log_steps():
    def column(history):
        return statistics.as_array(history["test_acc"])

    a = make_history([0, 1, 3], [0] * 3, [0.0, 0.2, 0.6])
    b = make_history([0, 3], [0] * 2, [0.2, 0.4])
    c = make_history([0], [0], [0.1])
    steps, mean, low, high = runs.together([a, b, c], column)
    assert steps.tolist() == [0, 1, 3]
    # At step 1, b is half-way between its points in log(1 + step).
    np.testing.assert_allclose(mean, [0.1, (0.2 + 0.3) / 2, 0.5])
    np.testing.assert_allclose(low, [0.0, 0.2, 0.4])
    np.testing.assert_allclose(high, [0.2, 0.3, 0.6])


# ---- phases ----

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


def smoothed_log(complexity):
    return phases.smoothed(np.log(np.maximum(complexity, 0.02 * complexity.max())))


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
        log = smoothed_log(complexity)
        for name, first, last in found:
            change = log[last] - log[first]
            assert (change if name.endswith("ascent") else -change) > 0.06
        if found[0][0] == "first descent":  # no rise by a tenth, and beyond noise, comes before
            noise = 1.4826 * np.median(np.abs(np.diff(np.log(np.maximum(complexity, 0.02 * complexity.max())), 2)))
            before = log[:found[0][1] + 1]
            assert (before - np.minimum.accumulate(before)).max() <= max(np.log(1.1), 5 * noise / np.sqrt(6)) + 1e-9


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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.5, 20), min_size=4, max_size=50))
def test_phases_do_not_depend_on_the_unit(values):
    complexity = np.array(values)
    assert phases.phases(complexity) == phases.phases(1024 * complexity) == phases.phases(complexity / 1024)


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
                           "mnist_float64_seed1", "mnist_long_exact", "cnn", "cnn_exact", "cnn_decay"], FALLS_RISES),
          **dict.fromkeys(["cnn_batch_norm", "resnet18_batch_norm"], ["ascent"]),
          "resnet18": ["first descent"]}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_phases_of_the_recorded_runs(path):
    """With rounding, or at depth 6, an MLP from PyTorch's weights descends, ascends, descends; otherwise see above."""
    expected = PHASES.get(path.stem, [*FALLS_RISES, "second descent"])
    assert names(statistics.total_complexity(read_history(path)))[:3] == expected


# ---- outbreaks of the training loss ----

def training(losses, peaks=None, **changes):
    n = len(losses)
    history = make_history(2 ** np.arange(n), [0.5] + [1.0] * (n - 1), [0.9] * n, **changes)
    history["train_loss"] = losses
    if peaks:
        history["max_batch_loss"] = peaks
    return history


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


# ---- the summary ----

STEPS = [0, 10, 100, 1000, 10_000, 20_000, 40_000, 80_000]
TRAIN = [0.1, 0.6, 0.995, 1, 1, 1, 1, 1]


def known_history(**changes):
    test = [0.1, 0.88, 0.90, 0.90, 0.90, 0.91, 0.91, 0.90]
    robust = {"0.1": [0, 0.1, 0.10, 0.10, 0.20, 0.30, 0.50, 0.46], "0.0313725": [0, 0.5, 0.6, 0.6, 0.6, 0.61, 0.6, 0.6]}
    adv = {"0.1": [0, 0.1, 0.10, 0.12, 0.60, 0.80, 0.90, 0.86], "0.0313725": [0, 0.5, 0.6, 0.6, 0.6, 0.9, 0.9, 0.9]}
    return make_history(STEPS, TRAIN, test, robust, adv, **changes)


def sentences(text):
    """The summary without its line breaks."""
    return " ".join(text.split())


def test_summary_states_the_known_numbers_of_a_run():
    text = report.summary(known_history())
    assert "train accuracy reaches 99% at step 100 (the run ends at step 80,000)" in sentences(text)
    assert ("Delayed generalisation: not seen; test accuracy reaches 95% of its final value (90.0%) at step 10 and is "
            "90.0% at interpolation.") in sentences(text)
    # The level held over three log points is 30%; half of the rise from 10% is held from step 10,000 on.
    assert table_line(text, "robust ε 0.1") == "10.0% - 30.0% 46.0% half by step 10,000, 100.0x".split()
    assert table_line(text, "adv ε 0.1") == "10.0% - 80.0% 86.0% half by step 10,000, 100.0x".split()
    assert table_line(text, "robust ε 8/255") == ["60.0%", "-", "60.0%", "60.0%", "no", "delayed", "rise"]
    assert "Delayed robustness: seen; after interpolation robust accuracy rises at ε 0.1. Half of the rise is " \
           "reached at 100.0x the step of interpolation." in sentences(text)
    assert "Numerical: at ε 8/255 adv rises and robust does not." in sentences(text)
    assert "Training loss: no outbreak" in text and "Local complexity" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_test_accuracy_reaches_95_percent_of_its_final_value_where_it_does():
    test = [0.2, 0.5, 0.60, 0.84, 0.857, 0.9, 0.9, 0.9]  # 95% of 90% is 85.5%
    text = sentences(report.summary(make_history(STEPS, TRAIN, test)))
    assert "Delayed generalisation: seen; test accuracy reaches 95% of its final value (90.0%) at step 10,000" in text
    assert "is 60.0% at interpolation" in text


def test_a_late_rise_of_test_accuracy_by_little_is_no_delayed_generalisation():
    test = [0.1, 0.86, 0.87, 0.9, 0.9, 0.9, 0.9, 0.9]
    text = report.summary(make_history(STEPS, TRAIN, test, images=10_000))
    assert "Delayed generalisation: not seen" in text
    assert table_line(text, "test")[-4:] == ["by", "step", "1,000,", "10.0x"]
    few = make_history(STEPS, TRAIN, [0.1, 0.7, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8], images=10)
    assert "Delayed generalisation: not seen; test accuracy reaches 95% of its final value (80.0%) at step 1,000" \
        in sentences(report.summary(few))  # one image of ten is noise


def test_summary_says_the_later_the_larger_only_where_it_is_so():
    def text(*halves):
        robust = {f"0.{k}": np.where(np.arange(12) >= half, 0.6, 0.1) for k, half in enumerate(halves, 1)}
        return sentences(report.summary(make_history(2 ** np.arange(12), [0.5] + [1.0] * 11, [0.9] * 12, robust)))

    assert "rises at ε 0.1, 0.2 and 0.3. Half of the rise is reached at 8.0x to 64.0x the step of interpolation, " \
           "the later the larger ε." in text(4, 4, 7)
    assert "8.0x to 64.0x the step of interpolation." in text(7, 4, 4)
    assert "8.0x to 64.0x the step of interpolation." in text(4, 7, 6)
    assert "reached at 8.0x the step of interpolation." in text(4, 4)


def test_summary_speaks_of_dips_of_brief_rises_and_of_what_is_held_alone():
    n = 15
    robust = {"0.1": [0.5] * 3 + [0.2] * 6 + [0.45] * 6, "0.2": [0.1] * 13 + [0.6] * 2,
              "0.3": [0.1] * 6 + [0.6] * 2 + [0.1] * 7}
    text = report.summary(make_history(2 ** np.arange(n), [1.0] * n, [0.9] * n, robust))
    assert "Delayed robustness: not seen" in text
    assert "At ε 0.2 and 0.3 it lies above it for less. At ε 0.1 it falls after interpolation and recovers." \
        in sentences(text)
    assert table_line(text, "robust ε 0.1")[4:] == "dips, recovers by step 512".split()
    assert table_line(text, "robust ε 0.2")[4:] == "rises at the end, not held".split()
    assert table_line(text, "robust ε 0.3")[4:] == "rises, not held".split()


def test_summary_names_phases_and_outbreaks_with_their_numbers():
    complexity = [6, 5, 2, 1, 1, 1, 1, 1.5, 2, 2, 2, 2, 2, 1, 0.5, 0.5, 0.5, 0.5]
    n = len(complexity)
    history = make_history(10 * np.arange(n), [0.1] + [1.0] * (n - 1), [0.9] * 12 + [0.8] * 6, complexity=complexity)
    history["train_loss"] = [1.0, 1e-2] + [1e-7] * 10 + [1e-5] * 6
    history["weight_norm"] = [10.0] * 12 + [20.0] * 6
    text = sentences(report.summary(history))
    assert "Local complexity (training points, r = 0.05): first descent from 6.00 to 1.00 by step 30, ascent to " \
           "2.00 by step 80, second descent to 0.50 by step 140." in text
    assert "Training loss: 1 outbreak after interpolation" in text
    assert "Step 110 to 120: loss 1.0e-07 to 1.0e-05, weight norm 10.0 to 20.0, local complexity 2.00 to 2.00, test " \
           "accuracy 90.0% to 80.0%." in text
    history["max_batch_loss"] = [None, 1.0, 1e-2] + [1e-6] * 9 + [3.5] + [1e-5] * 5
    assert "loss 1.0e-07 to 1.0e-05 (up to 3.5e+00 in a batch), weight norm" in sentences(report.summary(history))
    del history["weight_norm"], history["local_complexity"]
    assert "in a batch), test accuracy 90.0% to 80.0%." in sentences(report.summary(history))


def test_flat_robustness_beside_falling_complexity_is_not_explained_away():
    text = report.summary(read_history(ROOT / "results" / "mnist_adam.json"))
    paragraphs = text.split("\n\n")[0].replace("\n  ", " ").splitlines()
    (robust,) = [line for line in paragraphs if line.startswith("Delayed robustness")]
    (complexity,) = [line for line in paragraphs if line.startswith("Local complexity")]
    assert "not seen" in robust and "complexity" not in robust
    assert "second descent" in complexity and "robust" not in complexity


def test_summary_says_how_it_compared():
    random = np.random.default_rng(0)
    history = flat_history(random, images=100)
    assert "exact McNemar test" in report.summary(history)
    assert "Measured on 100 images, 50.0% means 40.4% to 59.6%." in sentences(report.summary(history))
    del history["outcomes"]
    assert "McNemar" not in report.summary(history) and "Wilson" in report.summary(history)


def test_summary_reads_at_100_columns_with_large_numbers():
    history = known_history(images=10**6)
    history["step"] = [step * 100_000 for step in history["step"]]
    history["robust_acc"]["0.0123457"] = history["robust_acc"]["0.1"]
    assert max(map(len, report.summary(history).splitlines())) <= 100


def test_summary_of_a_run_that_never_fits_its_training_set():
    text = report.summary(make_history([0, 10, 100], [0.1, 0.5, 0.7], [0.1, 0.4, 0.6], {"0.1": [0.0, 0.1, 0.25]}))
    assert "does not reach 99%" in text and "70.0%" in text and "no delay to measure" in sentences(text)
    assert table_line(text, "robust ε 0.1") == ["25.0%"]
    assert "rise" not in text.split("\n\n")[0] and "outbreak" not in text


def test_summary_of_a_run_that_is_not_at_its_end():
    history = known_history()
    history["config"]["n_steps"] = 500_000
    assert "has come to step 80,000 of 500,000" in sentences(report.summary(history))


def test_summary_of_short_and_empty_histories():
    assert "no log step" in report.summary({"step": [], "config": {}, "sizes": {}})
    assert "10.0%" in report.summary(make_history([0], [0.1], [0.1], {"0.1": [0.0]}))
    text = report.summary(make_history([0, 10, 20, 30], [0.1, None, 1.0, 1.0], [0.1, None, 0.9, None],
                                       {"0.1": [0, 0, None, 0.3]}))
    assert "reaches 99% at step 20 " in text
    assert table_line(text, "robust ε 0.1") == ["-", "-", "-", "30.0%", "-"]


def hostile_histories():
    full = flat_history(np.random.default_rng(3), points=12, images=40)
    full |= make_history(full["step"], full["train_acc"], full["test_acc"], complexity=np.ones(12), images=40,
                         max_batch_loss=[None] + [0.1] * 11, outcomes=full["outcomes"], asked=["seed"])
    full |= {name: full[name] for name in ("robust_acc", "adv_acc")}
    required = {"step", "config", "sizes"}
    yield "whole", full
    for name in sorted(full.keys() - required):
        yield f"without {name}", {key: value for key, value in full.items() if key != name}
    for name in ("outcomes", "robust_acc", "adv_acc", "local_complexity"):
        yield f"empty {name}", {**full, name: {}}
    for name in ("train_acc", "test_acc", "train_loss", "weight_norm", "max_batch_loss"):
        yield f"all null {name}", {**full, name: [None] * 12}

    def nulls(value):
        return {key: nulls(entry) for key, entry in value.items()} if isinstance(value, dict) else [None] * len(value)

    beside = {"version", "step", "config", "sizes", "environment", "warnings", "asked"}
    yield "all null", {key: value if key in beside else nulls(value) for key, value in full.items()}
    yield "null outcomes", {**full, "outcomes": nulls(full["outcomes"])}

    def cut(value, n):
        return {key: cut(entry, n) for key, entry in value.items()} if isinstance(value, dict) else value[:n]

    for n in (0, 1, 2, 3, 4):
        yield f"{n} log points", {key: value if key in beside - {"step"} else cut(value, n)
                                  for key, value in full.items()}
    resumed = copy.deepcopy(full)
    for column in (resumed["outcomes"]["test"], resumed["outcomes"]["robust"], *resumed["outcomes"]["adv"].values()):
        column[:6] = [None] * 6
    yield "resumed by a later version", resumed
    yield "no sizes", {**full, "sizes": {}, "outcomes": {}}
    layers = [[None, 1.0], None, [], *[[1.0, 2.0]] * 9]
    yield "null layers", {**full, "local_complexity": {"train": {"0.05": layers}}}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("history", [pytest.param(history, id=name) for name, history in hostile_histories()])
def test_nothing_that_a_history_lacks_stops_the_numbers(history):
    text = report.summary(history)
    assert text and "nan" not in text and max(map(len, text.splitlines())) <= 100
    other = {**history, "config": {**history["config"], "seed": 2}}
    for group in ([history], [history, other], [history, make_history([], [], [])]):
        assert "nan" not in report.table(group) + report.markdown_table(group)
        statistics.pooled_rises(group)
        runs.grouped(group)
        runs.runs_text(group)
    phases.outbreaks(history)


# ---- names and titles ----

def chosen(asked, **config):
    history = known_history()
    history["config"] |= config
    if asked is not None:
        history["asked"] = asked
    return history


def test_only_what_the_user_chose_tells_runs_apart():
    one, two = chosen(["seed"], adv_size=797, depth=4), chosen(["depth", "seed"], adv_size=1000, depth=6, seed=2)
    assert runs.differing_flags([one, two]) == ["seed", "depth"]
    assert runs.differing_flags([one, two], also_same={"seed"}) == ["depth"]
    older = chosen(None, adv_size=797, depth=4)
    assert set(runs.differing_flags([older, two])) == {"adv_size", "depth", "seed"}
    elsewhere = chosen(["log_dir", "threads"], threads=3, log_dir="x", adv_size=797, depth=4)
    assert runs.differing_flags([older, chosen(None, adv_size=797, depth=4, eval_threads=2)]) == []  # an older flag
    assert runs.differing_flags([one, elsewhere]) == []


def test_titles_say_what_was_trained_and_what_was_chosen():
    history = chosen(["loss", "depth", "adv_size", "n_steps", "log_dir", "weight_decay"], loss="mse", weight_decay=0.1,
                     adv_size="all", lr=0.001)
    assert runs.run_title(history) == ("mlp (depth 3, width 8) on digits, 1,000 training images, loss\N{NBSP}mse, "
                                         "weight\N{NBSP}decay\N{NBSP}0.1")
    assert runs.run_title(history, ["loss", "depth"]) == ("mlp (width 8) on digits, 1,000 training images, "
                                                            "weight\N{NBSP}decay\N{NBSP}0.1")
    assert runs.run_title(chosen(None, adv_size=797)) == "mlp (depth 3, width 8) on digits, 1,000 training images"
    assert runs.group_title([history], ["loss"]) == "loss\N{NBSP}mse"
    history["config"] |= {"batch_norm": True, "orthogonal_gradient": False}
    assert (runs.group_title([history], ["batch_norm", "orthogonal_gradient"])
            == "batch\N{NBSP}norm, no\N{NBSP}orthogonal\N{NBSP}gradient")


def test_flags_are_written_as_they_are_given():
    config = {"depth": 2, "batch_norm": True, "weight_decay": 0.0, "cuda_graph": False, "train_size": None}
    assert report.command_flags(config, list(config)) == "--depth=2 --batch_norm --weight_decay=0"


def test_an_epsilon_is_written_in_pixel_levels_where_it_is_one():
    config = {"epsilons": [0.5 / 255, 0.03, 8 / 255], "lc_radius": [0.005, 0.0313725]}
    assert report.command_flags(config, list(config)) == "--epsilons=0.5/255,0.03,8/255 --lc_radius=0.005,0.0313725"
    history = chosen(["epsilons"], epsilons=config["epsilons"])
    assert runs.group_title([history], ["epsilons"]) == "epsilons\N{NBSP}0.5/255\N{NBSP}0.03\N{NBSP}8/255"


def test_runs_that_are_not_at_the_end_are_counted():
    short = make_history([0], [0.1], [0.1])
    assert runs.runs_text([known_history()]) == ""
    assert runs.runs_text([known_history(), short, make_history([], [], [])]) == (
        "mean and range of 3 runs, 2 of them not at the end")


def test_short_names_are_the_parts_that_differ():
    assert runs.short_names(["runs/a/logs/h.json", "runs/b/logs/h.json"]) == ["a", "b"]
    assert runs.short_names(["x/h.json"]) == ["x/h.json"]
    assert runs.short_names(["h.json", "runs/h.json"]) == [".", "runs"]


# ---- the tables ----

def test_table_has_one_line_a_run_and_names_what_differs():
    histories = [chosen(None, seed=seed, weight_decay=decay) for decay in (0.0, 0.01) for seed in (1, 2)]
    histories.append({"step": [], "config": {**histories[0]["config"], "seed": 9}, "sizes": {}})
    for history in histories[:-1]:
        history["local_complexity"] = {"train": {"0.05": [[2.5, 0.5]] + [[1.5, 0.5]] * 3 + [[3.0, 1.25]] * 3 + [None]}}
    labels = [f"run{k}" for k in range(5)]
    head, *lines = report.table(histories, labels).splitlines()
    assert head.split() == ["run", "seed", "weight_decay", "steps", "train", "test", "99%", "at", "ε", "robust", "end",
                            "delay", "adv", "end", "delay", "LC", "min", "max"]
    assert [line.split()[0] for line in lines] == labels and len({len(line) for line in [head, *lines]}) == 1
    assert lines[2].split()[1:] == ["1", "0.01", "80,000", "100.0%", "90.0%", "100", "0.1", "10.0%", "46.0%", "100.0x",
                                    "10.0%", "86.0%", "100.0x", "2.00", "4.25"]
    assert lines[4].split()[1:4] == ["9", "0", "0"]


def markdown_rows(text):
    """[{head: cell}] of a Markdown table; a head that is there twice gets the number of its place."""
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert set(rule) == {"---"} and {len(row) for row in (head, rule, *rows)} == {len(head)}
    return [dict(zip([f"{k} {name}" for k, name in enumerate(head)], row, strict=True)) for row in rows]


def test_markdown_table_has_one_row_a_configuration():
    runs = [chosen(["depth", "seed", "n_steps", "batch_norm", "epsilons"], depth=6, seed=seed, batch_norm=True,
                   epsilons=[0.1, 0.2]) for seed in (1, 2)]
    runs[1]["test_acc"][-1] = 0.92
    text = report.markdown_table([chosen([]), *runs], ["mnist", "deep", "deep2"])
    first, second = markdown_rows(text)
    assert list(first.values()) == ["mnist", "-", "100", "90.0%", "90.0%", "0.1", "10.0%", "-", "30.0%",
                                    "10,000 (100.0x)", "10.0%", "80.0%", "10,000 (100.0x)"]
    assert second["0 run"] == "deep (2 seeds)"
    assert second["1 flags"] == "`--depth=6 --n_steps=80000 --batch_norm --epsilons=0.1,0.2`"
    assert second["4 at the end"] == "91.0% (90.0% to 92.0%)" and second["2 training 99% at step"] == "100"
    other = markdown_rows(report.markdown_table(runs[:1], ["deep"], epsilon="0.0313725"))[0]
    assert other["5 ε"] == "8/255" and other["9 half of the rise by step"] == "-" and "--seed=1" in other["1 flags"]


def test_a_dip_comes_after_interpolation():
    n = 12
    robust = {"0.1": [0.05] * 4 + [0.3] * 2 + [0.2] * 4 + [0.4] * 2}
    history = make_history(2 ** np.arange(n), [0.5] * 3 + [1.0] * 9, [0.9] * n, robust)
    row = markdown_rows(report.markdown_table([history], ["a"]))[0]
    assert row["6 `robust_acc` then"] == "5.0%" and row["7 dip"] == "-" and row["8 highest later"] == "20.0%"
    history["robust_acc"]["0.1"][3] = 0.25
    assert markdown_rows(report.markdown_table([history], ["a"]))[0]["7 dip"] == "20.0%"


def test_a_recovery_stands_in_the_markdown_table_as_one():
    robust = {"0.1": [0.5] * 3 + [0.2] * 6 + [0.45] * 6}
    history = make_history(2 ** np.arange(15), [1.0] * 15, [0.9] * 15, robust)
    row = markdown_rows(report.markdown_table([history], ["a"]))[0]
    assert row["9 half of the rise by step"] == "out of the dip: 512"


def test_flags_of_older_histories_are_those_that_are_not_usual():
    runs = [chosen(None, depth=depth, lr=0.001) for depth in (4, 4, 6)]
    rows = markdown_rows(report.markdown_table(runs, ["a", "b", "c"]))
    assert [row["1 flags"] for row in rows] == ["-", "`--depth=6`"]


# ---- what it loads ----

def test_neither_matplotlib_nor_scipy_is_loaded_before_it_is_needed():
    code = "import sys, curves; print(sorted({'matplotlib', 'scipy', 'torch'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "matplotlib" not in out and "scipy" not in out
