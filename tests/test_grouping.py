"""Which recorded runs belong together."""

from conftest import ROOT

from analysis import runs, statistics
from runtime.history import read_history


def test_a_longer_run_of_one_seed_is_not_another_seed():
    names = ("mnist", "mnist_seed1", "mnist_seed2", "mnist_seed3", "mnist_long")
    groups, flags = runs.grouped([read_history(ROOT / "results" / f"{name}.json") for name in names])
    assert [len(group) for group in groups] == [4, 1] and "n_steps" in flags
    steps, rises = statistics.pooled_rises(groups[0])
    assert steps[rises["adv ε 0.1"].half] == 47_689
    assert steps[rises["robust ε 0.1"].recovery] == 18_900
