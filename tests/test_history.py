"""The history: columns in memory, two files on the disk of which a kill loses nothing, and no faith in what is read."""

import copy
import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from flags import EXPERIMENT, LENGTH, MEASUREMENT, asked, flags_of, parse_args
from records.history import HistoryFile, append, forget_after, read_history, write_history

RESULTS = sorted(Path(__file__).parent.parent.joinpath("results").glob("*.json"))
BESIDE = {"version": 1, "config": {"lr": 0.1, "width": None, "epsilons": [0.1, 0.2]}, "asked": ["lr"],
          "derived": {"data": "0123", "threads": 1}, "environment": {"python": "3"}, "layers": {"names": ["a", "b"]},
          "sizes": {"train": 60, "test": 7, "attacked": 4, "num_classes": 10, "in_shape": [1, 8, 8]}, "warnings": []}


def row(step, **more):
    return {"epoch": step / 2, "step": step, "train_loss": 0.5, "train_acc": 0.25, "test_loss": 0.5, "test_acc": 0.25,
            "adv_acc": {"0.1": 0.5, "0.2": 0.25}, "robust_acc": {"0.1": 0.5, "0.2": 0.25},
            "local_complexity": {"train": {"0.05": [1.5, 2.5]}}, "weight_norm": 3.0, "seconds": 1.0 + step,
            "outcomes": {"test": "f8", "robust": "0001", "adv": {"0.1": "8"}}, **more}


def make_history(*steps):
    history = {**copy.deepcopy(BESIDE), "step": []}
    for step in steps:
        append(history, row(step))
    return history


def strictly(path):
    """Parse a file as strictly as JSON is defined."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# ---- in memory ------------------------------------------------------------------------------------------------------

def test_append_fills_what_is_missing_on_either_side_with_null():
    history = {"version": 1, "step": [], "config": {}, "warnings": []}
    append(history, {"step": 0, "loss": 1.0, "acc": {"a": 0.1}})
    append(history, {"step": 1, "loss": math.nan, "acc": {"a": 0.2, "b": 0.3}, "new": 5, "nested": {"x": {"y": "f8"}}})
    append(history, {"step": 2, "acc": {"b": 0.4}, "nested": None})
    assert history == {"version": 1, "config": {}, "warnings": [], "step": [0, 1, 2], "loss": [1.0, None, None],
                       "acc": {"a": [0.1, 0.2, None], "b": [None, 0.3, 0.4]}, "new": [None, 5, None],
                       "nested": {"x": {"y": [None, "f8", None]}}}


def test_forgetting_log_points_takes_their_warnings_along_and_leaves_the_rest():
    history = make_history(0, 1, 2)
    append(history, row(3, later=1.0))
    history["warnings"] = [{"step": 1, "text": "a"}, {"step": 3, "text": "b"}]
    forget_after(history, 2)
    expected = make_history(0, 1)
    assert history == {**expected, "later": [None, None], "warnings": [{"step": 1, "text": "a"}]}
    forget_after(history, 0)
    assert history["step"] == [] and history["warnings"] == []


# ---- one file -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_recorded_history_is_read_as_it_is(path):
    assert read_history(path) == json.loads(path.read_text())


def test_a_written_history_is_read_as_it_was_with_null_for_what_is_not_finite(tmp_path):
    path, history = tmp_path / "history.json", make_history(0, 1)
    append(history, row(2, weight_norm=math.inf, local_complexity={"train": {"0.05": [None, math.nan]}}, curvature=1.5,
                        max_batch_loss=None))
    write_history(path, history)
    assert strictly(path) == read_history(path) == history
    assert history["weight_norm"] == [3.0, 3.0, None] and history["curvature"] == [None, None, 1.5]
    write_history(path, {**history, "weight_norm": [3.0, math.inf, math.nan]})
    assert strictly(path)["weight_norm"] == [3.0, None, None]


def test_a_history_that_has_just_begun_and_one_of_an_older_program(tmp_path):
    path, history = tmp_path / "history.json", make_history()
    write_history(path, history)
    assert read_history(path)["step"] == []
    history = make_history(0)
    for name in ("environment", "outcomes", "layers", "derived"):
        del history[name]
    write_history(path, history)
    assert read_history(path) == {**history, "environment": {}}


@pytest.mark.parametrize("content, said", [
    ("", "is damaged or not a JSON file"), ("{", "is damaged or not a JSON file"),
    ("[]", "is not a history of this program"), ('{"version": 1, "step": []}', "is not a history of this program"),
    (json.dumps({**make_history(0), "version": 2}), "is a history of another version")])
def test_what_is_not_a_history_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "history.json").write_text(content)
    with pytest.raises(ValueError, match=f"history.json {said}[^\n]*$"):
        read_history(tmp_path / "history.json")


def test_a_missing_file_a_folder_and_a_fifo_are_no_history(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "none", tmp_path, tmp_path / "fifo"):
        with pytest.raises(FileNotFoundError, match="no history at"):
            read_history(path)


# ---- two files ------------------------------------------------------------------------------------------------------

@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved."""
    class Clock:
        now = 100.0

    monkeypatch.setattr("records.history.time.monotonic", lambda: Clock.now)
    return Clock


def start(folder, history):
    (folder / "logs").mkdir(exist_ok=True)
    file = HistoryFile(folder / "logs" / "training_history.json")
    file.begin(history)
    return file


def log(file, history, step, **more):
    entry = row(step, **more)
    append(history, entry)
    file.log(history, entry)


def test_the_two_files_of_a_run_are_read_as_one_history_at_any_moment(tmp_path, clock):
    history = make_history()
    file = start(tmp_path, history)
    for step in range(5):
        history["warnings"].append({"step": step, "kind": str(step), "text": "a"})
        log(file, history, step, weight_norm=math.nan)
        assert read_history(file.path) == history
        assert len(strictly(file.path)["step"]) == 0  # the clock stands still
    assert [line["step"] for line in map(json.loads, file.rows_path.read_text().splitlines())] == [0, 1, 2, 3, 4]
    clock.now += 1.1
    log(file, history, 5)
    written = strictly(file.path)
    assert written == {key: value for key, value in history.items() if key != "outcomes"}
    log(file, history, 6)
    assert strictly(file.path) == written and read_history(file.path) == history
    file.flush(history)
    assert len(strictly(file.path)["step"]) == 7 and read_history(file.path) == history
    write_history(tmp_path / "result.json", read_history(file.path))
    assert read_history(tmp_path / "result.json") == history


def test_the_json_is_written_less_often_when_writing_takes_long(tmp_path, clock, monkeypatch):
    def slow(path, history):
        clock.now += 2.0
        written.append(len(history["step"]))

    written = []
    monkeypatch.setattr("records.history.write_history", slow)
    history = make_history()
    file = start(tmp_path, history)
    for step in range(100):
        clock.now += 1.0
        log(file, history, step)
    assert 3 <= len(written) <= 6  # each takes 2 seconds of 20 or more
    file.flush(history)
    assert written[-1] == 100


def test_a_last_line_cut_off_by_a_kill_is_ignored_and_another_run_s_rows_are(tmp_path, clock):
    history = make_history()
    file = start(tmp_path, history)
    for step in range(3):
        log(file, history, step)
    content = file.rows_path.read_bytes()
    for torn in (content[:-5], content[:-1]):
        file.rows_path.write_bytes(torn)
        assert read_history(file.path)["step"] == [0, 1]
    file.rows_path.write_bytes(content.replace(b'"seconds": 1.0', b'"seconds": 1.5'))
    file.flush(history)
    assert read_history(file.path) == {key: value for key, value in history.items() if key != "outcomes"}


@pytest.mark.parametrize("line", [b"5", b'{"step', b'{"step": 9}', json.dumps({**row(9), "adv_acc": 5}).encode()])
def test_a_foreign_line_among_the_rows_is_refused_in_one_line(tmp_path, clock, line):
    history = make_history()
    file = start(tmp_path, history)
    log(file, history, 1)
    with open(file.rows_path, "ab") as rows:
        rows.write(line + b"\n")
    with pytest.raises(ValueError, match="training_history.rows.jsonl is damaged; remove it[^\n]*$"):
        read_history(file.path)


def test_a_continued_run_writes_its_rows_anew_and_a_kill_between_the_files_loses_nothing(tmp_path, clock, monkeypatch):
    history = make_history()
    file = start(tmp_path, history)
    for step in range(4):
        log(file, history, step)
    file.flush(history)
    cut = read_history(file.path)
    forget_after(cut, 2)
    expected = copy.deepcopy(cut)
    with monkeypatch.context() as patch:
        patch.setattr("records.history.write_history", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, cut)
    read = read_history(file.path)  # the old JSON and the new rows
    forget_after(read, 2)
    assert read == expected
    file = start(tmp_path, cut)
    assert read_history(file.path) == expected
    log(file, cut, 9)
    assert read_history(file.path) == cut


def test_a_history_of_one_file_is_continued_in_two(tmp_path, clock):
    path, history = tmp_path / "logs" / "training_history.json", make_history(0, 1)
    path.parent.mkdir()
    write_history(path, history)
    start(tmp_path, history)
    assert "outcomes" not in strictly(path) and read_history(path) == history


def test_the_commands_of_the_results_are_those_that_made_the_histories():
    environment = {name: value for name, value in os.environ.items() if name != "RUNS"}  # a user's own folder
    printed = subprocess.run(["bash", RESULTS[0].with_name("run.sh"), "--list"], capture_output=True, text=True,
                             env=environment)
    commands = dict(line.split(maxsplit=1) for line in printed.stdout.splitlines())
    assert commands.keys() == {path.stem for path in RESULTS}
    kinds = flags_of(EXPERIMENT, LENGTH, MEASUREMENT)
    for path in RESULTS:
        args, history = parse_args(commands[path.stem].split()), read_history(path)
        given = {*asked(args)} & kinds
        assert given == {*history["asked"]} & kinds, path.stem
        assert {name: getattr(args, name) for name in given} == {name: history["config"][name] for name in given}
