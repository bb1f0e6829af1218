"""The numbers of a history: what rises later and how surely; the summary, the tables, and what belongs together."""

import numpy as np
import pytest
from scipy import stats

from analysis import report, runs, statistics


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
                   "epsilons": [*map(float, robust)], "n_steps": int(steps[-1]) if n else 1, "log_dir": "logs"},
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
    history["config"] |= {"epsilons": grid, **config}
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


def rise_of(rows, start, statements=1):
    return statistics.delayed_rise(statistics.Curve(np.array([row.mean() for row in rows]), rows), start, statements)


def rise_of_values(values, start):
    curve = statistics.Curve(np.array(values, dtype=float), outcomes_of(values, 1000))
    return statistics.delayed_rise(curve, start)


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


def test_two_log_points_are_compared_by_an_exact_sign_test():
    for gains, losses in [(45, 5), (0, 0), (7, 7), (3, 9), (1, 0)]:
        before, after = pairs(gains, losses)
        expected = stats.binomtest(gains, gains + losses, alternative="greater").pvalue if gains + losses else 1.0
        assert statistics.p_values(before[None], after[None]) == pytest.approx([expected])
    high, low = pairs(0, 12)
    middle = low.copy()
    middle[:6] = True
    assert statistics.p_values(np.stack([low, middle]), np.stack([high, low])) == pytest.approx([0.5**6, 1])


def counts_at_5_percent(rows, start, name, p):
    """Whether a rise's `name` is there as long as its p-value, times the number of statements, is 5% or less."""
    most = int(0.05 / p)
    return [getattr(rise_of(rows, start, statements), name) not in (None, False) for statements in (most, most + 1)]


def test_a_level_counts_only_if_every_one_of_its_log_points_is_better():
    before, after = pairs(45, 5)
    single = stats.binomtest(45, 50, alternative="greater").pvalue
    rows = [before] * 6 + [after] * 3 + [before] * 3
    assert rise_of(rows, 1).half == 6
    assert counts_at_5_percent(rows, 1, "half", 8 * single) == [True, False]  # eight stretches were searched
    rows[7] = before
    rise = rise_of(rows, 1)
    assert rise.half is None and rise.brief
    assert counts_at_5_percent(rows, 1, "brief", 10 * single) == [True, False]  # ten log points were searched


def test_a_dip_and_the_recovery_from_it_are_seen_and_paid_for():
    high, low = pairs(0, 20)
    rows = [high] * 3 + [low] * 4 + [high] * 5
    rise = rise_of(rows, 0)
    assert rise.half is None and rise.recovery == 7
    assert (rise.start, rise.dip) == pytest.approx((0.32, 0.3))
    # Nine stretches could have been the lowest; four come after it.
    assert counts_at_5_percent(rows, 0, "recovery", 9 * 4 * 0.5**20) == [True, False]
    fallen = rise_of([high] * 3 + [low] * 4, 0)
    assert fallen.recovery is None and fallen.dip == pytest.approx(0.3)
    high, low = pairs(0, 60)
    from_below = rise_of([low] * 5 + [high] * 5, 0)
    assert from_below.half == 5 and from_below.recovery is None and np.isnan(from_below.dip)


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


@pytest.mark.parametrize("values, start, half, level", [
    ([0.1] * 5 + [0.4] * 25 + [0.9] + [0.4] * 29, 0, 5, 0.4),
    ([0.1, 0.1, 0.1, 0.9, 0.9, None], 2, None, np.nan),  # a level is not held by fewer than three log points
    ([0.1] * 5 + [0.7] + [0.1] * 4 + [0.3, 0.44, 0.46, 0.5, 0.6, 0.8, 0.8, 0.8, 0.8], 2, 12, 0.8),  # half is 0.45
    ([0.2] * 10 + [0.9] * 2 + [0.2] * 18, 2, None, 0.2),
    ([0.1, 0.1, None, 0.1, None, 0.8, None, 0.8, 0.8, None], 1, 5, 0.8)])
def test_half_of_a_rise_is_that_of_the_held_level(values, start, half, level):
    rise = rise_of_values(values, start)
    assert rise.half == half and rise.brief == (half is None)
    np.testing.assert_equal(rise.level, level)


def test_what_is_not_known_is_passed_over():
    for start in (None, 0, 3):  # never fitted; no value at interpolation; nothing after it
        nothing = rise_of_values([None, 0.1, 0.8, 0.8, None], start)
        assert nothing.half is None and not nothing.brief and nothing.recovery is None and np.isnan(nothing.final)
    without = statistics.delayed_rise(statistics.Curve(np.array([0.1, 0.9, 0.9, 0.9]), [None] * 4), 0)
    assert without.half is None and np.isnan(without.largest) and without.final == 0.9
    assert statistics.interpolation_of({"step": [0, 1, 2, 3, 4], "train_acc": [0.5, None, 0.9899, 0.99, 1.0]}) == 3
    assert statistics.interpolation_of({"step": [0, 1], "train_acc": [1.0, 1.0]}) == 0
    assert statistics.interpolation_of({"step": [900, 1000], "train_acc": [0.99, 1.0]}) is None  # fitted before


def test_what_could_not_be_compared_is_not_called_not_seen():
    history = make_history([0, 10, 20, 30, 40], [0.5] + [1.0] * 4, [0.8] + [0.9] * 4, {"0.1": [0.1] * 2 + [0.6] * 3})
    assert "Delayed robustness: seen" in report.summary(history)
    for change, why in (
            ({"outcomes": {}}, "Delayed robustness: not tested (which images were right is not recorded)."),
            ({"train_acc": [0.5] * 2 + [1.0] * 3}, "Delayed robustness: too short to say (2 log steps after"),
            ({"train_acc": [0.5] * 4 + [1.0]}, "Delayed generalisation: too short to say (no log step after"),
            ({"step": [5, 10, 20, 30, 40], "train_acc": [1.0] * 5}, "when it reached 99% is not known"),
            # Measured again: the run's own step of interpolation is kept beside the columns.
            ({"interpolation": 15}, "99% at step 15 (the run ends at step 40); that checkpoint was not measured again"),
            ({"interpolation": None}, "is 100.0% at step 10, the first of those measured with 99% or more")):
        text = sentences(report.summary(history | change))
        assert "seen" not in text and why in text
    assert "seen; test" in sentences(report.summary(history | {"interpolation": 10}))


def test_a_branch_is_judged_on_its_own_epsilons():
    """Its history also has columns for its parent's, which its outcomes do not count."""
    history = make_history(2 ** np.arange(8), [0.5] + [1.0] * 7, [0.9] * 8, {"0.02": [0.2] * 8, "0.03": [0.1] * 8})
    both = history | {"robust_acc": {"0.01": [0.3] * 2 + [None] * 6} | history["robust_acc"]}
    assert report.middle_epsilon(both) == "0.02"
    curves = statistics.accuracy_curves(both)
    assert [images.mean() for images in curves["robust ε 0.03"].outcomes] == [0.1] * 8
    assert curves["robust ε 0.01"].outcomes == [None] * 8
    assert np.isnan(statistics.rises_of(both)["robust ε 0.01"].final)


def test_a_branch_is_told_by_its_own_radius():
    parents, own = [[[4.0]] * 2 + [None] * 2], [[None] * 2 + [[3.0], [1.0]]]
    history = make_history([0, 1, 2, 4], [0.5, 1, 1, 1], [0.9] * 4, {"0.1": [0.2] * 4})
    history["config"]["lc_radius"] = [0.2]
    history |= {"local_complexity": {"train": {"0.05": parents[0], "0.2": own[0]}}, "branch": {"step": 1, "of": "p.pt"}}
    assert statistics.total_complexity(history).tolist()[2:] == [3.0, 1.0]
    text = sentences(report.summary(history))
    assert text.startswith("A branch: what lies before step 1 is of p.pt.")
    assert "Local complexity (training points, r = 0.2): 3.00 at step 2, 1.00 at step 4" in text


def test_a_rise_beyond_chance_counts_from_two_points_on_in_every_curve():
    for height, counts in ((0.019, False), (0.02, True)):
        before, after = pairs(round(height * 10_000), 0, images=10_000)
        rows = np.array([before] * 5 + [after] * 5)
        rises = statistics.rises_of(history_of(rows, 1 + rows, {"0.1": rows})).values()
        assert [rise.half is not None for rise in rises] == [counts] * 3
        low = np.array([after] * 3 + [before] * 4 + [after] * 5)
        assert (rise_of(low, 0).recovery is not None) == counts
        assert rise_of(np.array([before] * 5 + [after]), 1).brief == counts


def test_a_group_is_the_seeds_of_one_configuration_each_once():
    one, other = chosen(["seed"]), chosen(["seed"], seed=2)
    again = chosen(["seed"], log_dir="again")
    assert runs.grouped([one, other]) == ([[one, other]], [])
    groups, flags = runs.grouped([one, other, again])
    assert [len(group) for group in groups] == [2, 1]
    assert runs.group_title(groups[1], flags) == "log\N{NBSP}dir\N{NBSP}again"
    short, other, long = chosen(["n_steps"]), chosen(["n_steps"], seed=2), chosen([], n_steps=500_000, n_epochs=80_000)
    assert runs.grouped([short, other, long]) == ([[short, other], [long]], ["n_steps"])
    epochs = [chosen(["n_epochs"], n_epochs=100, n_steps=steps) for steps in (500, 1500)]
    assert runs.differing_flags(epochs) == []  # the same length, whatever a batch is
    folders = [chosen(["dataset"], dataset="imagefolder", data_dir=place, seed=k) for k, place in enumerate("xy")]
    assert len(runs.grouped(folders)[0]) == 2


def test_mean_and_range_over_seeds_with_other_log_steps():
    group = [make_history(steps, [0] * len(steps), values) for steps, values in (
        ([0, 1, 3], [0.0, 0.2, 0.6]), ([0, 3], [0.2, 0.4]), ([0], [0.1]))]
    steps, *found = runs.together(group, lambda history: statistics.column_of(history, "test_acc"))
    assert steps.tolist() == [0, 1, 3]
    # At step 1, the second is half-way between its points in log(1 + step).
    np.testing.assert_allclose(found, [[0.1, (0.2 + 0.3) / 2, 0.5], [0.0, 0.2, 0.4], [0.2, 0.3, 0.6]])


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
    # The level held over three log points is 30%; half of the rise from 10% is held from step 10,000 on.
    assert table_line(text, "robust ε 0.1") == "10.0% - 30.0% 46.0% half by step 10,000, 100.0x".split()
    assert table_line(text, "adv ε 0.1") == "10.0% - 80.0% 86.0% half by step 10,000, 100.0x".split()
    assert table_line(text, "robust ε 8/255") == ["60.0%", "-", "60.0%", "60.0%", "no", "delayed", "rise"]
    assert "At ε 8/255 adv rises and robust does not; how much of that is rounding was not measured." in sentences(text)
    assert "Training loss: no spike" in text and "Local complexity" not in text and "sign test" in text
    large = known_history(images=2000)
    large["step"] = [step * 100_000 for step in STEPS]
    large["config"]["n_steps"] = 50_000_000_000
    assert "has come to step 8,000,000,000 of 50,000,000,000" in sentences(report.summary(large))
    assert max(map(len, text.splitlines())) <= 80 and max(map(len, report.summary(large).splitlines())) <= 100


def test_summary_says_what_of_the_gap_is_rounding():
    for late, cause, part in ((0.28, "Numerical", 28), (0.1, "By the weaker attack", 10)):
        text = sentences(report.summary(known_history(rounding={
            "0.1": [0.0] * 7 + [0.38], "0.0313725": [0.0] * 5 + [late] * 3})))
        assert (f"{cause}: at ε 8/255 adv rises and robust does not. At its highest adv is 30 points above "
                f"interpolation; the part that is rounding has grown by {part}.") in text
        assert ("At the end adv_acc exceeds robust_acc by 40 points at ε = 0.1: 38 of them rounding, 2 the weaker "
                "attack.") in text
    assert "the weaker attack" not in report.summary(known_history())
    history = known_history(rounding={"0.1": [0.0] * 7 + [0.05], "0.0313725": [0.0] * 7 + [0.2]})
    assert "points at ε = 0.1: 5 of them rounding, 35 the weaker attack. Rounding is most at ε = 8/255: 20 of 30 " \
           "points." in sentences(report.summary(history))


def test_summary_gives_the_bounds_of_the_certified_images():
    history = make_history([0, 1], [0.5, 1], [0.9, 0.9], {"0.03": [0.5, 0.5], "0.1": [0.4, 0.4]}, images=10)
    history["outcomes"] |= {"robust": ["3333222111", "3333222111"], "certified": [None, "3221"]}
    assert ("Certified: at ε = 0.03 between 75% and 100% and at ε = 0.1 between 25% and 100% of 4 images withstand "
            "every attack.") in sentences(report.summary(history))
    history["outcomes"]["certified"] = [None, "-3----1-1-"]
    assert "at ε = 0.03 between 33% and 67%" in sentences(report.summary(history))
    history["outcomes"]["certified"] = ["3221", None]
    assert "Certified" not in report.summary(history)


def test_summary_explains_only_what_it_shows():
    words = ("robust:", "adv:", "at 99%:", "dip, highest held:", "beyond chance")
    for history, shown in ((known_history(), words), (make_history(STEPS, TRAIN, [0.9] * 8), words[2:]),
                           (make_history([0, 10], [0.1, 0.5], [0.1, 0.4], {"0.1": [0.0, 0.2]}), words[:2])):
        notes = sentences(report.summary(history).split("\n\n")[-1])
        assert [word for word in words if word in notes] == list(shown)
    assert "Measured on 1,000 images, 50.0% means 46.9% to 53.1%." in notes  # Wilson's score interval


def test_delayed_generalisation_is_a_rise_of_test_accuracy_after_interpolation():
    late, noise = (sentences(report.summary(make_history(STEPS, TRAIN, test, images=images))) for test, images in [
        ([0.2, 0.5, 0.60, 0.74, 0.757, 0.9, 0.9, 0.9], 1000),
        ([0.1, 0.7, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8], 10)])  # one image of ten is noise
    assert ("Delayed generalisation: seen; test accuracy is 60.0% at interpolation and 90.0% at the end, with half of "
            "its rise by step 10,000.") in late
    assert "not seen; test accuracy is 70.0% at interpolation and 80.0% at the end." in noise


@pytest.mark.parametrize("halves, said", [
    ((4, 4, 7), "8.0x to 64.0x the step of interpolation, the later the larger ε."),
    ((4, 7, 6), "8.0x to 64.0x the step of interpolation."), ((4, 4), "8.0x the step of interpolation.")])
def test_summary_says_the_later_the_larger_only_where_it_is_so(halves, said):
    adv = {f"0.{k}": np.where(np.arange(12) >= half, 0.6, 0.1) for k, half in enumerate(halves, 1)}
    history = make_history(2 ** np.arange(12), [0.5] + [1.0] * 11, [0.9] * 12, adv=adv)
    rises = statistics.rises_of(history)
    rises |= {f"robust{label[3:]}": rise for label, rise in rises.items() if label != "test"}
    assert report.robustness_texts(history, rises)[0].endswith(f"Half of the rise is reached at {said}")


@pytest.mark.parametrize("curve, sentence, verdict", [
    ([0.5] * 3 + [0.2] * 6 + [0.45] * 6, "it falls after interpolation and recovers", "dips, recovers by step 512"),
    ([0.1] * 13 + [0.6] * 2, "it rises, but holds that level for fewer", "rises at the end, not held"),
    ([0.1] * 6 + [0.6] * 2 + [0.1] * 7, "it rises, but holds that level for fewer", "rises, not held")])
def test_summary_speaks_of_dips_and_of_brief_rises(curve, sentence, verdict):
    text = report.summary(make_history(2 ** np.arange(15), [0.5] + [1.0] * 14, [0.9] * 15, {"0.1": curve}))
    assert "Delayed robustness: not seen" in text and f"At ε 0.1 {sentence}." in sentences(text)
    assert table_line(text, "robust ε 0.1")[4:] == verdict.split()


def test_summary_quotes_complexity_and_spikes_as_measured():
    complexity = [6, 5, 2, 1, 1, 1, 1, 1.5, 2, 2, 2.4, 2, 2, 1, *[0.5] * 8]
    n = len(complexity)
    history = make_history(10 * np.arange(n), [0.1] + [1.0] * (n - 1), [0.9] * 12 + [0.8] * 10, complexity=complexity)
    history["train_loss"] = [1.0, 1e-2] + [1e-7] * 10 + [1e-5] * 10
    history["weight_norm"] = [10.0] * 12 + [20.0] * 10
    text = sentences(report.summary(history))
    assert "Local complexity (training points, r = 0.05): first descent from 6.00 at step 0 to 1.00 at step 30, " \
           "ascent from 1.00 at step 60 to 2.00 at step 80, second descent from 2.00 at step 120 to 0.50 at step " \
           "140, 0.50 at the end." in text
    assert "Training loss: 1 spike after interpolation" in text
    assert "Step 110 to 120: loss 1.0e-07 to 1.0e-05, weight norm 10.0 to 20.0, local complexity 2.00 to 2.00, test " \
           "accuracy 90.0% to 80.0%." in text
    history["max_batch_loss"] = [None, 1.0, 1e-2] + [1e-6] * 9 + [3.5] + [1e-5] * 9
    text = sentences(report.summary(history))
    assert "loss 1.0e-07 to 1.0e-05 (in between up to 3.5e+00 in a batch), weight norm" in text
    for last, said in ((0.3, "second descent from 2.00 at step 120 on, still falling, 0.30 at the end."),
                       (0.46, "to 0.50 at step 140, 0.46 at the end.")):  # less than a tenth of the way
        history["local_complexity"]["train"]["0.05"][-1] = [last, 0.0]
        assert said in sentences(report.summary(history))
    short = make_history([0, 1, 2], [0.1, 0.5, 0.6], [0.5] * 3, complexity=[15.79, 12, 6.81])
    assert "15.79 at step 0, 6.81 at step 2; no change" in sentences(report.summary(short))


def sparse_histories():
    full = flat_history(np.random.default_rng(3), points=12, images=40)
    full |= {"local_complexity": {"train": {"0.05": [[0.75, 0.25]] * 12}}, "max_batch_loss": [None] + [0.1] * 11,
             "asked": ["seed"]}
    for name in ("outcomes", "max_batch_loss", "asked"):  # older programs did not write them
        yield {key: value for key, value in full.items() if key != name}
    for name in ("outcomes", "robust_acc", "adv_acc", "local_complexity"):
        yield {**full, name: {}}

    def each(value, change):
        return {key: each(entry, change) for key, entry in value.items()} if isinstance(value, dict) else change(value)

    measured = ("outcomes", "robust_acc", "adv_acc", "local_complexity", "train_loss", "weight_norm")
    for n in (6, 12):
        yield {**full, **{name: each(full[name], lambda column, n=n: [None] * n + column[n:]) for name in measured}}
    columns = ("step", "train_acc", "test_acc", "max_batch_loss", *measured)
    for n in range(5):
        yield {**full, **{name: each(full[name], lambda column, n=n: column[:n]) for name in columns}}


@pytest.mark.filterwarnings("error")
def test_nothing_that_a_history_lacks_stops_the_numbers():
    for history in sparse_histories():
        text = report.summary(history)
        assert text and "nan" not in text and max(map(len, text.splitlines())) <= 100
        other = {**history, "config": {**history["config"], "seed": 2}}
        for group in ([history], [history, other], [history, make_history([], [], [])]):
            assert "nan" not in report.table(group, "ab"[:len(group)])


def test_only_what_the_user_chose_tells_runs_apart():
    one, two = chosen(["seed"], adv_size=797, depth=4), chosen(["depth", "seed"], adv_size=1000, depth=6, seed=2)
    assert runs.differing_flags([one, two]) == ["seed", "depth"]
    assert runs.differing_flags([one, two], also_same={"seed"}) == ["depth"]
    older = chosen(None, adv_size=797, depth=4)
    assert set(runs.differing_flags([older, two])) == {"adv_size", "depth", "seed"}
    today, other = chosen(["seed"], pgd_start="random", seed=2), chosen(["pgd_start"], pgd_start="image")
    groups, flags = runs.grouped([older | {"asked": ["seed"]}, today, other])  # an older program had no --pgd_start
    assert [len(group) for group in groups] == [2, 1] and flags == ["pgd_start"]
    assert runs.differing_flags([one, chosen(["log_dir", "threads"], threads=3, log_dir="x", depth=4)]) == []


def test_titles_say_what_was_trained_and_what_was_chosen():
    history = chosen(["loss", "depth", "adv_size", "n_steps", "log_dir", "weight_decay"], loss="mse", weight_decay=0.1,
                     adv_size="all", lr=0.001, batch_norm=True, plot=False, epsilons=[0.5 / 255, 0.03, 8 / 255])
    assert runs.run_title(history) == ("mlp (depth 3, width 8) on digits, 1,000 training images, loss\N{NBSP}mse, "
                                       "weight\N{NBSP}decay\N{NBSP}0.1")
    assert runs.run_title(history, ["loss", "depth"]) == ("mlp (width 8) on digits, 1,000 training images, "
                                                          "weight\N{NBSP}decay\N{NBSP}0.1")
    assert (runs.group_title([history], ["batch_norm", "plot", "epsilons"]).replace("\N{NBSP}", "_")
            == "batch_norm, no_plot,\nepsilons_0.5/255_0.03_8/255")
    assert report.command_flags(history["config"], ["batch_norm", "plot", "train_size", "lr", "epsilons"]) == (
        "--batch_norm --lr=0.001 --epsilons=0.5/255,0.03,8/255")
    short = make_history([0], [0.1], [0.1])
    assert runs.group_title([known_history()], []) == ""
    assert runs.group_title([known_history(), short, short], []) == "mean and range of 3 runs, 2 of them not at the end"
    assert runs.short_names(["runs/a/logs/h.json", "runs/b/logs/h.json"]) == ["a", "b"]
    assert runs.short_names(["r/h.json", "r/c/h.json"]) == ["r", "c"] and runs.short_names(["/x", "y"]) == ["/x", "y"]
    assert runs.short_names(["x/h.json"]) == ["x/h.json"] and runs.short_names(["h.json", "x/h.json"]) == [".", "x"]


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
