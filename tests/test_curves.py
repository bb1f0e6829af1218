"""The numbers of a history: what rises later and how surely; the summary, the tables, and what belongs together."""


import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis import report, runs, statistics
from runtime.history import read_history


def hexed(right):
    """Booleans as the history writes them: four a hexadecimal digit, the first in the highest bit."""
    bits = "".join("1" if r else "0" for r in right)
    bits += "0" * (-len(bits) % 4)
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def outcomes_of(fractions, images):
    """For each log point its first images right, or None where the fraction is null."""
    return [None if f is None else np.arange(images) < round(f * images) for f in fractions]


def make_history(steps, train, test, robust=None, adv=None, complexity=None, images=1000, **columns):
    """A history with these curves (robust: {key: curve}, falling with the key) and the outcomes that give them."""
    n, robust = len(steps), robust or {}
    adv = robust if adv is None else adv
    layers = None if complexity is None else [[0.75 * c, 0.25 * c] for c in complexity]
    right = [outcomes_of(robust[key], images) for key in robust]
    known = [all(curve[t] is not None for curve in right) for t in range(n)]
    ranks = ["".join(chr(49 + rank) for rank in sum(curve[t].astype(int) for curve in right)) if known[t] else None
             for t in range(n)] if robust else None
    hexes = {key: [right if right is None else hexed(right) for right in outcomes_of(values, images)]
             for key, values in {"test": test, **adv}.items()}
    return {
        "version": 1, "step": list(map(int, steps)), "train_loss": [0.1] * n, "train_acc": list(train),
        "test_acc": list(test), "weight_norm": [1.0] * n,
        "robust_acc": {key: list(values) for key, values in robust.items()},
        "adv_acc": {key: list(values) for key, values in adv.items()},
        "local_complexity": {"train": {"0.05": layers}} if layers else {},
        "outcomes": {"test": hexes.pop("test"), "adv": hexes, **({"robust": ranks} if robust else {})},
        "config": {"model": "mlp", "dataset": "digits", "depth": 3, "width": 8, "seed": 1, "batch_size": 200,
                   "n_steps": int(steps[-1]) if n else 1, "log_dir": "logs"},
        "sizes": {"train": 1000, "test": images, "attacked": images}, "warnings": [], **columns}


def history_of(test, ranks, adv, **config):
    """A history whose accuracies come from outcomes: bool (log points, images), ranks alike, {key: bool} alike."""
    n, images = test.shape
    history = make_history(2 ** np.arange(n), [0.5, 0.9] + [1.0] * (n - 2), test.mean(1), images=images)
    grid = sorted(map(float, adv))
    history["robust_acc"] = {key: (ranks > 1 + grid.index(float(key))).mean(1).tolist() for key in adv}
    history["adv_acc"] = {key: right.mean(1).tolist() for key, right in adv.items()}
    history["outcomes"] = {"test": [*map(hexed, test)],
                           "robust": ["".join(chr(48 + rank) for rank in row) for row in ranks],
                           "adv": {key: [*map(hexed, right)] for key, right in adv.items()}}
    history["config"] |= config
    return history


def flat_history(random, points=40, images=500):
    """All accuracies are noise about a level that never changes."""
    def margins():
        """Standard normal (points, images): what an image keeps for the whole run, and noise that fades."""
        memory, spread = random.choice([0.0, 0.9, 0.99]), random.choice([0.0, 1.0, 3.0])
        noise = random.normal(size=(points, images))
        for t in range(1, points):
            noise[t] = memory * noise[t - 1] + np.sqrt(1 - memory**2) * noise[t]
        return (noise + spread * random.normal(size=images)) / np.sqrt(1 + spread**2)

    base = margins()
    ranks = sum((base > level).astype(int) for level in random.uniform(-2.5, 2, size=4))
    return history_of(ranks > 0, ranks, {key: margins() > random.uniform(-2.5, 2)
                                         for key in ("0.03", "0.1", "0.0313725")})


def pairs(gains, losses, images=1000, both=300):
    """(before, after): so many images gained, lost, right at both times, and the rest wrong at both."""
    before, after = np.zeros((2, images), dtype=bool)
    before[:losses + both], after[losses:both + losses + gains] = True, True
    return before, after


def rise_of(rows, start):
    return statistics.delayed_rise(statistics.Curve(np.array([row.mean() for row in rows]), rows), start)


def rise_of_values(values, start):
    known = [None if value is None or np.isnan(value) else value for value in values]
    return statistics.delayed_rise(statistics.Curve(np.array(known, dtype=float), outcomes_of(known, 1000)), start)


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
    assert found["adv ε 0.03"].outcomes == [None, None]
    zero = make_history([0], [1], [0.5], {"0": [0.5], "0.1": [0.25]}, images=4)  # epsilon 0 is the clean image
    zero["outcomes"] = {"robust": ["0112"]}
    found = statistics.accuracy_curves(zero)
    assert found["robust ε 0"].outcomes[0].tolist() == [0, 1, 1, 1]
    assert found["robust ε 0.1"].outcomes[0].tolist() == [0, 0, 0, 1]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_hexadecimal_digits_hold_every_image(right):
    assert statistics.from_hex(hexed(right), len(right)).tolist() == right


# ---- what rises, and how surely ----

def test_two_log_points_are_compared_by_an_exact_sign_test():
    for gains, losses in [(45, 5), (0, 0), (7, 7), (3, 9), (1, 0)]:
        before, after = pairs(gains, losses)
        expected = stats.binomtest(gains, gains + losses, alternative="greater").pvalue if gains + losses else 1.0
        assert statistics.p_values(before[None], after[None]) == pytest.approx([expected])
    high, low = pairs(0, 12)
    middle = low.copy()
    middle[:6] = True
    assert statistics.p_values(np.stack([low, middle]), np.stack([high, low])) == pytest.approx([0.5**6, 1])


def test_a_level_counts_only_if_every_one_of_its_log_points_is_better():
    before, after = pairs(45, 5)
    single = stats.binomtest(45, 50, alternative="greater").pvalue
    rows = [before] * 6 + [after] * 3 + [before] * 3
    rise = rise_of(rows, 1)
    assert rise.half == 6 and rise.p == pytest.approx(8 * single)  # eight stretches were searched
    rows[7] = before
    rise = rise_of(rows, 1)
    assert rise.p >= 1 and rise.half is None and rise.brief
    assert rise.p_once == pytest.approx(10 * single)  # ten log points were searched


def test_a_dip_and_the_recovery_from_it_are_seen_and_paid_for():
    high, low = pairs(0, 12)
    rise = rise_of([high] * 3 + [low] * 4 + [high] * 5, 0)
    assert rise.half is None and rise.recovery == 7
    assert (rise.start, rise.dip) == pytest.approx((0.312, 0.3))
    # Nine stretches could have been the lowest; four come after it.
    assert rise.p_recovery == pytest.approx(9 * 4 * 0.5**12)
    fallen = rise_of([high] * 3 + [low] * 4, 0)
    assert fallen.recovery is None and fallen.dip == pytest.approx(0.3)
    high, low = pairs(0, 60)
    from_below = rise_of([low] * 5 + [high] * 5, 0)
    assert from_below.half == 5 and from_below.recovery is None  # no dip below the value at interpolation


def test_flat_curves_are_called_rising_in_at_most_five_percent_of_the_runs():
    random, said, naive = np.random.default_rng(7), 0, 0
    for _ in range(60):
        history = flat_history(random)
        rises = statistics.rises_of(history).values()
        assert len(rises) == 7
        said += any(rise.half is not None or rise.brief or rise.recovery is not None for rise in rises)
        naive += any(statistics.p_values(curve.outcomes[2][None], np.stack(curve.outcomes[3:])).min() < 0.05
                     for curve in statistics.accuracy_curves(history).values())
    assert said <= 3
    assert naive > 30  # the test can fail: uncorrected, the same comparisons say so in most runs


def test_a_rise_of_four_points_is_found_in_a_thousand_images():
    random = np.random.default_rng(1)
    for _ in range(8):
        ranks = np.full((40, 1000), 1)
        ranks[:, random.permutation(1000)[:340]] = 2
        wrong = random.permutation(np.flatnonzero(ranks[0] == 1))
        for t in range(25, 40):
            ranks[t, wrong[:45]] = 2
            ranks[t, random.permutation(np.flatnonzero(ranks[0] == 2))[:5]] = 1
        rises = statistics.rises_of(history_of(ranks > 0, ranks, {"0.1": ranks > 1}))
        assert rises["robust ε 0.1"].half == 25 and rises["adv ε 0.1"].half == 25 and rises["test"].half is None
        assert rises["robust ε 0.1"].level - rises["robust ε 0.1"].start == pytest.approx(0.04)


def test_all_curves_of_a_run_are_paid_for_together():
    """What is enough for one curve is not for the best of seven, of each of which three questions are asked."""
    quiet = np.zeros((9, 1000), dtype=bool)
    before, after = pairs(7, 0)
    rising = np.array([before] * 3 + [after] * 6)
    alone = rise_of([*rising], 2)
    assert alone.half == 3 and alone.p == pytest.approx(4 * 0.5**7)
    rise = statistics.rises_of(history_of(quiet, 1 + rising, {"0.1": quiet, "0.2": quiet, "0.3": quiet}))
    assert rise["robust ε 0.1"].p == pytest.approx(21 * 4 * 0.5**7) and rise["robust ε 0.1"].half is None
    assert rise["robust ε 0.1"].p_once == pytest.approx(21 * 6 * 0.5**7)


@pytest.mark.parametrize("values, start, half, level", [
    ([0.1] * 5 + [0.4] * 25 + [0.9] + [0.4] * 29, 0, 5, 0.4),
    ([0.1, 0.1, 0.1, 0.9], 2, 3, 0.9),
    ([0.1, 0.1, 0.1, 0.9, None], 2, 3, 0.9),
    ([0.1] * 10 + [0.9] * 3, 2, 10, 0.9),
    ([0.1] * 5 + [0.7] + [0.1] * 4 + [0.3, 0.44, 0.46, 0.5, 0.6, 0.8, 0.8, 0.8, 0.8], 2, 12, 0.8),  # half is 0.45
    ([0.1] * 5 + [0.45] * 3 + [0.8] * 3, 2, 5, 0.8),
    ([0.2] * 10 + [0.9] * 2 + [0.2] * 18, 2, None, 0.2),
    ([0.1, 0.1, None, 0.1, None, 0.8, None, 0.8, 0.8, None], 1, 5, 0.8)])
def test_half_of_a_rise_is_that_of_the_held_level(values, start, half, level):
    rise = rise_of_values(values, start)
    assert rise.half == half and rise.level == level and rise.brief == (half is None)


def test_what_is_not_known_is_passed_over():
    values = [0.1, 0.1, None, 0.1, None, 0.8, None, 0.8, 0.8, None]
    for start in (None, 2, 9):  # never fitted; no value at interpolation; nothing after it
        nothing = rise_of_values(values, start)
        assert nothing.half is None and not nothing.brief and nothing.recovery is None and nothing.final == 0.8
    assert np.isnan(rise_of_values([None], 0).final)
    without = statistics.delayed_rise(statistics.Curve(np.array([0.1, 0.9, 0.9, 0.9]), [None] * 4), 0)
    assert without.half is None and np.isnan(without.largest) and without.final == 0.9
    assert statistics.interpolation_of({"train_acc": [0.5, None, 0.9899, 0.99, 1.0]}) == 3
    assert statistics.interpolation_of({"train_acc": [0.5, None]}) is None


# ---- several seeds ----

def test_pooled_seeds_find_what_one_does_not():
    """14 gained and 4 lost on 300 images are too few for one run, their sum over four seeds is not."""
    def history(seed, points=12):
        before, after = pairs(14, 4, images=300, both=100)
        rows = np.array([before] * 5 + [after] * (points - 5))[:, np.random.default_rng(seed).permutation(300)]
        return history_of(rows, 1 + rows, {"0.1": rows}, seed=seed, n_steps=2**11)

    group = [history(seed) for seed in range(4)]
    assert [statistics.rises_of(one)["robust ε 0.1"].half for one in group] == [None] * 4
    steps, rises = statistics.pooled_rises(group)
    assert steps == group[0]["step"][2:]  # from interpolation on
    rise = rises["robust ε 0.1"]
    assert steps[rise.half] == 2**5
    single = stats.binomtest(4 * 14, 4 * 18, alternative="greater").pvalue
    assert rise.p == pytest.approx(7 * 9 * single)  # seven stretches; three questions on each of three curves
    assert rise.start == pytest.approx(104 / 300) and rise.level == pytest.approx(114 / 300)

    unfinished, unfitted = history(4, points=7), history(5)
    unfitted["train_acc"] = [0.5] * 12
    assert statistics.pooled_rises([*group, unfinished, unfitted])[1]["robust ε 0.1"].p == rise.p
    assert statistics.pooled_rises([unfitted]) == ([], {})
    assert "(6 seeds, 4 of them tested)" in report.markdown_table([*group, unfinished, unfitted], list("abcdef"))


def test_each_seed_is_compared_with_its_own_interpolation():
    def history(fitted_at):
        train = np.where(np.arange(10) >= fitted_at, 1.0, 0.5)
        one = make_history(range(10), train, [0.9] * 10, {"0.1": np.where(np.arange(10) > fitted_at, 0.5, 0.2)})
        one["config"]["seed"] = fitted_at
        return one

    steps, rises = statistics.pooled_rises([history(2), history(4), history(5)])
    assert steps == [4, 6, 7, 8, 9]
    assert rises["robust ε 0.1"].start == pytest.approx(0.2) and rises["robust ε 0.1"].level == pytest.approx(0.5)


def test_a_seed_counts_once():
    one, other = chosen(["seed"]), chosen(["seed"], seed=2)
    again = chosen(["seed"], log_dir="again")
    assert runs.grouped([one, other]) == ([[one, other]], [])
    groups, flags = runs.grouped([one, other, again])
    assert [len(group) for group in groups] == [2, 1]
    assert runs.group_title(groups[1], flags) == "log\N{NBSP}dir\N{NBSP}again"


def test_runs_of_different_length_or_data_are_not_seeds_of_one_configuration():
    short, other, long = chosen(["n_steps"]), chosen(["n_steps"], seed=2), chosen([], n_steps=500_000, n_epochs=80_000)
    assert runs.grouped([short, other, long]) == ([[short, other], [long]], ["n_steps"])
    epochs = [chosen(["n_epochs"], n_epochs=100, n_steps=steps) for steps in (500, 1500)]
    assert runs.differing_flags(epochs) == []  # the same length, whatever a batch is
    folders = [chosen(["dataset"], dataset="imagefolder", data_dir=place, seed=k) for k, place in enumerate("xy")]
    assert len(runs.grouped(folders)[0]) == 2


def test_recorded_seeds_are_four_and_pooled():
    """The published statements on MNIST: seeds 42, 1, 2 and 3 of 100,000 steps, apart from the run of 500,000."""
    def pool(name):
        *group, long = (read_history(ROOT / "results" / f"{stem}.json") for stem in (
            name, f"{name}_seed1", f"{name}_seed2", f"{name}_seed3", name.replace("mnist", "mnist_long")))
        assert [len(found) for found in runs.grouped([*group, long])[0]] == [4, 1]
        return statistics.pooled_rises(group)

    steps, rises = pool("mnist")
    assert steps[rises["adv ε 0.1"].half] == 47_689 and steps[0] == 73
    assert steps[rises["robust ε 0.1"].recovery] == 18_900 and rises["robust ε 0.1"].half is None
    assert [rises[f"robust ε {e}"].p_recovery < 1e-7 for e in ("0.03", "0.06", "0.1", "0.13", "0.16", "0.2")] == [
        True] * 5 + [False]
    steps, rises = pool("mnist_exact")
    attacked = {label: rise for label, rise in rises.items() if label != "test"}
    assert all(rise.half is None and not rise.brief for rise in attacked.values())
    assert [label for label, rise in attacked.items() if rise.recovery is not None] == ["robust ε 0.06"]


def test_mean_and_range_over_seeds_with_other_log_steps():
    def column(history):
        return statistics.column_of(history, "test_acc")

    a = make_history([0, 1, 3], [0] * 3, [0.0, 0.2, 0.6])
    steps, mean, low, high = runs.together([a, make_history([0, 3], [0] * 2, [0.2, 0.4]),
                                            make_history([0], [0], [0.1])], column)
    assert steps.tolist() == [0, 1, 3]
    # At step 1, the second is half-way between its points in log(1 + step).
    np.testing.assert_allclose(mean, [0.1, (0.2 + 0.3) / 2, 0.5])
    np.testing.assert_allclose(low, [0.0, 0.2, 0.4])
    np.testing.assert_allclose(high, [0.2, 0.3, 0.6])


# ---- the summary ----

STEPS = [0, 10, 100, 1000, 10_000, 20_000, 40_000, 80_000]
TRAIN = [0.1, 0.6, 0.995, 1, 1, 1, 1, 1]


def known_history(**changes):
    test = [0.1, 0.88, 0.90, 0.90, 0.90, 0.91, 0.91, 0.90]
    robust = {"0.1": [0, 0.1, 0.10, 0.10, 0.20, 0.30, 0.50, 0.46], "0.0313725": [0, 0.5, 0.6, 0.6, 0.6, 0.61, 0.6, 0.6]}
    adv = {"0.1": [0, 0.1, 0.10, 0.12, 0.60, 0.80, 0.90, 0.86], "0.0313725": [0, 0.5, 0.6, 0.6, 0.6, 0.9, 0.9, 0.9]}
    return make_history(STEPS, TRAIN, test, robust, adv, **changes)


def chosen(asked, **config):
    history = known_history()
    history["config"] |= config
    if asked is not None:
        history["asked"] = asked
    return history


def sentences(text):
    """The summary without its line breaks."""
    return " ".join(text.split())


def table_line(text, label):
    """The cells of a summary's table about one curve, split into words."""
    (line,) = [line for line in text.splitlines() if line.startswith(label + " ")]
    return line[len(label):].split()


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
    assert "Training loss: no outbreak" in text and "Local complexity" not in text and "sign test" in text
    assert max(map(len, text.splitlines())) <= 80
    unfinished = known_history()
    unfinished["config"]["n_steps"] = 500_000
    assert "has come to step 80,000 of 500,000" in sentences(report.summary(unfinished))
    large = known_history(images=2000)
    large["step"] = [step * 100_000 for step in STEPS]
    assert max(map(len, report.summary(large).splitlines())) <= 100


def test_summary_explains_only_what_it_shows():
    words = ("robust:", "adv:", "at 99%:", "dip, highest:", "beyond chance")
    for history, shown in ((known_history(), words), (make_history(STEPS, TRAIN, [0.9] * 8), words[2:]),
                           (make_history([0, 10], [0.1, 0.5], [0.1, 0.4], {"0.1": [0.0, 0.2]}), words[:2]),
                           (make_history([0, 10], [0.1, 0.5], [0.1, 0.4]), ())):
        notes = report.summary(history).split("\n\n")[-1]
        assert [word for word in words if word in sentences(notes)] == list(shown)
    assert "Measured on 100 images, 50.0% means 40.4% to 59.6%." in sentences(
        report.summary(known_history(images=100)))  # Wilson's score interval


def test_delayed_generalisation_is_a_rise_to_95_percent_of_the_final_value_after_interpolation():
    def text(test, **changes):
        return sentences(report.summary(make_history(STEPS, TRAIN, test, **changes)))

    late = text([0.2, 0.5, 0.60, 0.84, 0.857, 0.9, 0.9, 0.9])  # 95% of 90% is 85.5%
    assert "Delayed generalisation: seen; test accuracy reaches 95% of its final value (90.0%) at step 10,000" in late
    assert "is 60.0% at interpolation" in late
    assert "Delayed generalisation: not seen" in text([0.1, 0.86, 0.87, 0.9, 0.9, 0.9, 0.9, 0.9])
    assert ("not seen; test accuracy reaches 95% of its final value (80.0%) at step 1,000"
            in text([0.1, 0.7, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8], images=10))  # one image of ten is noise


def test_summary_says_the_later_the_larger_only_where_it_is_so():
    def text(*halves):
        adv = {f"0.{k}": np.where(np.arange(12) >= half, 0.6, 0.1) for k, half in enumerate(halves, 1)}
        history = make_history(2 ** np.arange(12), [0.5] + [1.0] * 11, [0.9] * 12, adv=adv)
        rises = statistics.rises_of(history)
        return report.robustness_texts(history, {f"robust{label[3:]}": rises[label] for label in rises})[0]

    assert "rises at ε 0.1, 0.2 and 0.3. Half of the rise is reached at 8.0x to 64.0x the step of interpolation, " \
           "the later the larger ε." in text(4, 4, 7)
    assert "8.0x to 64.0x the step of interpolation." in text(7, 4, 4)
    assert "8.0x to 64.0x the step of interpolation." in text(4, 7, 6)
    assert "reached at 8.0x the step of interpolation." in text(4, 4)


def test_summary_speaks_of_dips_and_of_brief_rises():
    for curve, sentence, verdict in [
            ([0.5] * 3 + [0.2] * 6 + [0.45] * 6, "it falls after interpolation and recovers",
             "dips, recovers by step 512"),
            ([0.1] * 13 + [0.6] * 2, "it lies above it for less", "rises at the end, not held"),
            ([0.1] * 6 + [0.6] * 2 + [0.1] * 7, "it lies above it for less", "rises, not held")]:
        history = make_history(2 ** np.arange(15), [1.0] * 15, [0.9] * 15, {"0.1": curve})
        text = report.summary(history)
        assert "Delayed robustness: not seen" in text and f"At ε 0.1 {sentence}." in sentences(text)
        assert table_line(text, "robust ε 0.1")[4:] == verdict.split()
        cell = markdown_rows(report.markdown_table([history], ["a"]))[0]["9 half of the rise by step"]
        assert cell == ("out of the dip: 512" if "dips" in verdict else "-")


def test_summary_quotes_complexity_and_outbreaks_as_measured():
    complexity = [6, 5, 2, 1, 1, 1, 1, 1.5, 2, 2, 2.4, 2, 2, 1, 0.5, 0.5, 0.5, 0.5]
    n = len(complexity)
    history = make_history(10 * np.arange(n), [0.1] + [1.0] * (n - 1), [0.9] * 12 + [0.8] * 6, complexity=complexity)
    history["train_loss"] = [1.0, 1e-2] + [1e-7] * 10 + [1e-5] * 6
    history["weight_norm"] = [10.0] * 12 + [20.0] * 6
    text = sentences(report.summary(history))
    assert "Local complexity (training points, r = 0.05): first descent from 6.00 at step 0 to 1.00 at step 30, " \
           "ascent from 1.00 at step 60 to 2.00 at step 80, second descent from 2.00 at step 120 to 0.50 at step " \
           "140." in text
    assert "Training loss: 1 outbreak after interpolation" in text
    assert "Step 110 to 120: loss 1.0e-07 to 1.0e-05, weight norm 10.0 to 20.0, local complexity 2.00 to 2.00, test " \
           "accuracy 90.0% to 80.0%." in text
    history["max_batch_loss"] = [None, 1.0, 1e-2] + [1e-6] * 9 + [3.5] + [1e-5] * 5
    assert "loss 1.0e-07 to 1.0e-05 (up to 3.5e+00 in a batch), weight norm" in sentences(report.summary(history))
    short = make_history([0, 1, 2], [0.1, 0.5, 0.6], [0.5] * 3, complexity=[15.79, 12, 6.81])
    assert "15.79 at step 0, 6.81 at step 2; no change" in sentences(report.summary(short))


def test_every_value_quoted_of_a_recorded_complexity_was_measured_at_its_step():
    for name in ("first", "mnist", "mnist_adam", "resnet18"):
        history = read_history(ROOT / "results" / f"{name}.json")
        words = report.complexity_text(history)
        at = dict(zip(history["step"], statistics.total_complexity(history), strict=True))
        quoted = [part.split(" at step ") for part in words.rstrip(".").replace(" to ", ", ").split(", ")]
        numbers = [(value.split()[-1], step) for value, step in (part for part in quoted if len(part) == 2)]
        assert numbers and all(f"{at[int(step.replace(',', ''))]:.2f}" == value for value, step in numbers)


def sparse_histories():
    full = flat_history(np.random.default_rng(3), points=12, images=40)
    full |= {"local_complexity": {"train": {"0.05": [[0.75, 0.25]] * 12}}, "max_batch_loss": [None] + [0.1] * 11,
             "asked": ["seed"]}
    yield full
    for name in ("outcomes", "max_batch_loss", "asked"):  # older programs did not write them
        yield {key: value for key, value in full.items() if key != name}
    for name in ("outcomes", "robust_acc", "adv_acc", "local_complexity"):
        yield {**full, name: {}}
    for name in ("train_loss", "weight_norm", "max_batch_loss"):
        yield {**full, name: [None] * 12}

    def each(value, change):
        return {key: each(entry, change) for key, entry in value.items()} if isinstance(value, dict) else change(value)

    columns = {key: value for key, value in full.items() if isinstance(value, dict) and key not in ("config", "sizes")
               or isinstance(value, list) and len(value) == 12}
    for unknown in (6, 12):
        yield {**full, **each({key: columns[key] for key in ("outcomes", "robust_acc", "adv_acc", "local_complexity")},
                              lambda column, n=unknown: [None] * n + column[n:])}
    for n in range(5):
        yield {**full, **each(columns, lambda column, n=n: column[:n])}
    yield {**full, "local_complexity": {"train": {"0.05": [[None, 1.0], None, [None] * 2, *[[1.0, 2.0]] * 9]}}}


@pytest.mark.filterwarnings("error")
def test_nothing_that_a_history_lacks_stops_the_numbers():
    for history in sparse_histories():
        text = report.summary(history)
        assert text and "nan" not in text and max(map(len, text.splitlines())) <= 100
        other = {**history, "config": {**history["config"], "seed": 2}}
        for group in ([history], [history, other], [history, make_history([], [], [])]):
            assert "nan" not in report.table(group, "ab"[:len(group)]) + report.markdown_table(group, "ab"[:len(group)])


# ---- names, titles and tables ----

def test_only_what_the_user_chose_tells_runs_apart():
    one, two = chosen(["seed"], adv_size=797, depth=4), chosen(["depth", "seed"], adv_size=1000, depth=6, seed=2)
    assert runs.differing_flags([one, two]) == ["seed", "depth"]
    assert runs.differing_flags([one, two], also_same={"seed"}) == ["depth"]
    older = chosen(None, adv_size=797, depth=4)
    assert set(runs.differing_flags([older, two])) == {"adv_size", "depth", "seed"}
    assert runs.differing_flags([one, chosen(["log_dir", "threads"], threads=3, log_dir="x", depth=4)]) == []


def test_titles_say_what_was_trained_and_what_was_chosen():
    history = chosen(["loss", "depth", "adv_size", "n_steps", "log_dir", "weight_decay"], loss="mse", weight_decay=0.1,
                     adv_size="all", lr=0.001)
    assert runs.run_title(history) == ("mlp (depth 3, width 8) on digits, 1,000 training images, loss\N{NBSP}mse, "
                                       "weight\N{NBSP}decay\N{NBSP}0.1")
    assert runs.run_title(history, ["loss", "depth"]) == ("mlp (width 8) on digits, 1,000 training images, "
                                                          "weight\N{NBSP}decay\N{NBSP}0.1")
    history["config"] |= {"batch_norm": True, "orthogonal_gradient": False, "epsilons": [0.5 / 255, 0.03, 8 / 255]}
    assert (runs.group_title([history], ["batch_norm", "orthogonal_gradient"])
            == "batch\N{NBSP}norm, no\N{NBSP}orthogonal\N{NBSP}gradient")
    assert runs.group_title([history], ["epsilons"]) == "epsilons\N{NBSP}0.5/255\N{NBSP}0.03\N{NBSP}8/255"
    config = {"depth": 2, "batch_norm": True, "weight_decay": 0.0, "plot": False, "train_size": None,
              "epsilons": [0.5 / 255, 0.03], "lc_radius": [0.005, 0.0313725]}
    assert report.command_flags(config, list(config)) == (
        "--depth=2 --batch_norm --weight_decay=0 --epsilons=0.5/255,0.03 --lc_radius=0.005,0.0313725")
    short = make_history([0], [0.1], [0.1])
    assert runs.runs_text([known_history()]) == ""
    assert runs.runs_text([known_history(), short, short]) == "mean and range of 3 runs, 2 of them not at the end"
    assert runs.short_names(["runs/a/logs/h.json", "runs/b/logs/h.json"]) == ["a", "b"]
    assert runs.short_names(["x/h.json"]) == ["x/h.json"]
    assert runs.short_names(["h.json", "runs/h.json"]) == [".", "runs"]


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


def test_table_of_many_flags_stays_within_120_columns():
    flags = {"weight_decay": 0.1, "loss": "mse", "optimizer": "sgd", "depth": 6, "init_scale": 8.0, "batch_norm": True}
    text = report.table([chosen([*flags], **flags), chosen([])], ["a_run_with_a_name", "another_one"])
    assert max(map(len, text.splitlines())) <= 120
    assert "--weight_decay=0.1 --loss=mse --optimizer=sgd --depth=6 --init_scale=8 --batch_norm" in text


def markdown_rows(text):
    """[{head: cell}] of a Markdown table; each head has the number of its place."""
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert set(rule) == {"---"} and {len(row) for row in (head, rule, *rows)} == {len(head)}
    return [dict(zip([f"{k} {name}" for k, name in enumerate(head)], row, strict=True)) for row in rows]


def test_markdown_table_has_one_row_a_configuration():
    group = [chosen(["depth", "seed", "n_steps", "batch_norm", "epsilons"], depth=6, seed=seed, batch_norm=True,
                    epsilons=[0.1, 0.2]) for seed in (1, 2)]
    group[1]["test_acc"][-1] = 0.92
    first, second = markdown_rows(report.markdown_table([chosen([]), *group], ["mnist", "deep", "deep2"]))
    assert list(first.values()) == ["mnist", "-", "100", "90.0%", "90.0%", "0.1", "10.0%", "-", "30.0%",
                                    "10,000 (100.0x)", "10.0%", "80.0%", "10,000 (100.0x)"]
    assert second["0 run"] == "deep (2 seeds)"
    assert second["1 flags"] == "`--depth=6 --n_steps=80000 --batch_norm --epsilons=0.1,0.2`"
    assert second["4 at the end"] == "91.0% (90.0% to 92.0%)" and second["2 training 99% at step"] == "100"


def test_a_dip_comes_after_interpolation():
    curve = [0.05] * 4 + [0.3] * 2 + [0.2] * 4 + [0.4] * 2
    for start, dip in ((0.05, "-"), (0.25, "20.0%")):
        curve[3] = start
        history = make_history(2 ** np.arange(12), [0.5] * 3 + [1.0] * 9, [0.9] * 12, {"0.1": curve})
        row = markdown_rows(report.markdown_table([history], ["a"]))[0]
        assert row["7 dip"] == dip and row["8 highest later"] == "20.0%"
