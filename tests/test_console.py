"""What a run prints: a table that holds its labels, and a bar only on a real terminal."""

import sys
import time

import pytest

from flags import Config, history_key
from records.console import Console, thin

EPSILONS = [0.5 / 255, 0.03, 10 / 255]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def history():
    config = {**vars(Config()), "epsilons": EPSILONS, "n_steps": 1000, "device": "cpu", "augment": True,
              "label_smoothing": 0.1}
    sizes = {"parameters": 95_410, "train": 1000, "test": 797, "attacked": 20, "in_shape": [1, 8, 8],
             "num_classes": 10}
    return {"config": config, "asked": ["augment", "epsilons", "label_smoothing"], "sizes": sizes,
            "derived": {"threads": 2, "eval_threads": 1}, "environment": {"device": "cpu", "processes": 1}}


def row(step, complexity):
    of_epsilon = dict(zip(map(history_key, EPSILONS), (0.5, 0.25, 0.125), strict=True))
    return {"step": step, "train_loss": 1e-7, "train_acc": 1.0, "test_acc": 0.9, "robust_acc": of_epsilon,
            "adv_acc": of_epsilon, "local_complexity": complexity, "weight_norm": 12.5, "seconds": 7.4}


def test_each_value_is_below_its_label(history, capsys):
    console = Console()
    console.header(history)
    console.start(EPSILONS, [0.05], 0, 1000, 2)
    console.row(row(0, {"train": {"0.05": [1.5, 2.0]}}), ["a remark"])
    console.row(row(1000, {}))
    console.end()
    printed = capsys.readouterr().out
    assert "\nwith     augment, label_smoothing 0.1\n" in printed
    assert "95,410 parameters" in printed and "1 x 8 x 8" in printed
    assert "threads  2 in training, 1 in log steps\n" in printed
    head, first, remark, last = printed.splitlines()[-4:]
    assert head.split() == ["step", "loss", "train", "test", "0.5/255", "0.03", "10/255", "0.03", "r", "0.05", "|w|",
                            "s"]
    assert first.split() == ["0", "1.00e-07", "100.0", "90.0", "50.0", "25.0", "12.5", "25.0", "3.50", "12.50", "7"]
    assert last.split()[-3] == "-" and remark == "note: a remark"
    ends = [[end for end in range(1, len(line) + 1) if line[end - 1] != " " and line[end:end + 1] in ("", " ")]
            for line in (head, first, last)]
    assert ends[0][:8] + ends[0][9:] == ends[1] == ends[2]
    assert max(map(len, printed.splitlines())) <= 100


def test_two_radii_are_two_labelled_columns(history, capsys):
    console = Console()
    console.start(EPSILONS, [0.01, 0.1], 0, 1000, 2)
    console.row(row(0, {"train": {"0.01": [0.5, 0.25], "0.1": [7.0, 5.0]}}))
    titles, head, first = capsys.readouterr().out.splitlines()
    assert "compl." in titles and head.split()[-6:-2] == ["r", "0.01", "r", "0.1"]
    assert first.split()[-4:-2] == ["0.75", "12.00"] and len(head) == len(first)


@pytest.mark.parametrize("variable, value", [("JPY_PARENT_PID", "7"), (None, None),
                                             ("MPLBACKEND", "module://matplotlib_inline.backend_inline")])
def test_a_notebook_has_rows_and_a_terminal_a_bar(history, monkeypatch, variable, value):
    for name in ("JPY_PARENT_PID", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    console = Console()
    console.start(EPSILONS, [0.05], 0, 1000, 2)
    console.end()
    assert (console.bar is None) == (variable is not None)


def test_without_a_bar_a_line_a_minute_says_what_is_to_go(history, monkeypatch, capsys):
    clock = {"now": 100.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    console = Console()
    console.start(EPSILONS, [0.05], 0, 1000, 1)
    capsys.readouterr()
    for step in range(10, 500, 10):
        clock["now"] += 2 if step > 10 else 60  # the first steps compile the network
        console.progress(step, 2 if step > 10 else 60)
        clock["now"] += 3  # drawing a figure, say
    console.measuring("train accuracy", 0)
    clock["now"] += 4
    console.row(row(500, {}))
    console.log_steps_left = 30
    for step in range(500, 700, 10):
        clock["now"] += 5
        console.progress(step, 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0] == "…"]
    assert lines[0] == "… step 20 of 1,000: 5 steps/s, 03:16 to go"
    assert lines[-1] == "… step 650 of 1,000: 5 steps/s, 4.0 s for a log step, 03:10 to go" and len(lines) == 6


def test_quiet_prints_nothing(history, capsys):
    console = Console(quiet=True)
    console.header(history)
    console.start(EPSILONS, [0.05], 0, 1000, 2)
    console.row(row(0, {}))
    assert capsys.readouterr() == ("", "")


def test_few_values_stand_for_many():
    assert thin(list("abcdefg"), 3) == ["a", "d", "g"] and thin(["a", "b"], 6) == ["a", "b"]
