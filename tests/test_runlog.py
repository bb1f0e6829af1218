"""runlog's functions by themselves: what is written and in which order, what is read and what is refused."""

import copy
import errno
import fcntl
import json
import math
import os
import re
import resource
import signal
import subprocess

import pytest
import torch

from runtime import checkpoints, files
from runtime.history import MAY_CHANGE, append, forget_after, read_history, write_history

CONFIG = {"lr": 0.1, "adv_size": 1000, "n_steps": 100, "optimizer": "adamw", "log_dir": "logs", "momentum": 0.0}
DEFAULTS = {"lr": 0.001, "adv_size": 1000, "momentum": 0.0, "optimizer": "adamw"}
SIZES = {"train": 60, "test": 797, "attacked": 797}


def row(step, **more):
    return {"epoch": step / 2, "step": step, "train_loss": 0.5, "train_acc": 0.25, "test_loss": 0.5, "test_acc": 0.25,
            "adv_acc": {"0.1": 0.5, "0.2": 0.25}, "robust_acc": {"0.1": 0.5, "0.2": 0.25},
            "local_complexity": {"train": {"0.05": [1.5, 2.5]}}, "weight_norm": 3.0, "seconds": 1.0, **more}


def make_history(*steps, **beside):
    history = {"version": 1, "step": [], "config": dict(CONFIG), "sizes": dict(SIZES), "environment": {},
               "warnings": [], **beside}
    for step in steps:
        append(history, row(step))
    return history


def make_state(step, logged=0, config=CONFIG, weight=1.0, **more):
    return {"epoch": step / 2, "step": step, "seconds": 1.0, "logged": logged, "config": dict(config),
            "sizes": dict(SIZES), "model_state_dict": {"weight": torch.full((2, 2), weight)},
            "optimizer_state_dict": {"state": {}}, **more}


def refuse(line):
    pytest.fail(f"unexpected note: {line}")


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text


# ---- writing --------------------------------------------------------------------------------------------------------

def test_content_is_synced_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    calls = []

    def fsync(descriptor):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    def replace(source, target, replace=os.replace):
        calls.append(("replace", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    files.write_atomically(tmp_path / "file", b"12345")
    part = str(tmp_path / ".file.part")
    assert [call[:2] for call in calls] == [("fsync", part), ("replace", part), ("fsync", str(tmp_path))]
    assert calls[0][2] == 5 and (tmp_path / "file").read_bytes() == b"12345"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_a_full_disk_is_told_with_the_path_and_leaves_the_earlier_file(tmp_path, monkeypatch, fault):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(os, fault, full)
    with pytest.raises(OSError) as error:
        files.write_atomically(path, b"new")
    assert error.value.errno == errno.ENOSPC and str(path) in one_line(error) and "No space left" in one_line(error)
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


def test_an_interruption_within_a_write_leaves_no_part(tmp_path, monkeypatch):
    def interrupted(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code, raised", [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_does_not_sync_folders(tmp_path, monkeypatch, code, raised):
    def fsync(descriptor, fsync=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if raised:
        with pytest.raises(OSError, match=re.escape(str(tmp_path))):
            files.write_atomically(tmp_path / "file", b"new")
    else:
        files.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_writing_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    def windows(path, *_args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "open", windows)
    files.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_room_is_checked_by_writing_and_nothing_stays(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: written.append(os.fstat(descriptor).st_size))
    files.check_room(tmp_path, 12_345)
    assert written == [12_345] and not list(tmp_path.iterdir())


def test_too_little_room_is_an_error_with_the_folder(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        files.check_room(tmp_path, 1000)
        with pytest.raises(OSError, match="File too large") as error:
            files.check_room(tmp_path, 1001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and str(tmp_path) in one_line(error)


# ---- the history ----------------------------------------------------------------------------------------------------

def test_append_fills_what_is_missing_on_either_side_with_null():
    history = {"version": 1, "step": [], "config": {}, "warnings": []}
    append(history, {"step": 0, "loss": 1.0, "acc": {"a": 0.1}})
    append(history, {"step": 1, "loss": 2.0, "acc": {"a": 0.2, "b": 0.3}, "new": 5,
                            "nested": {"x": {"y": "f8"}}})
    append(history, {"step": 2, "acc": {"b": 0.4}, "nested": None})
    assert history == {"version": 1, "config": {}, "warnings": [], "step": [0, 1, 2], "loss": [1.0, 2.0, None],
                       "acc": {"a": [0.1, 0.2, None], "b": [None, 0.3, 0.4]}, "new": [None, 5, None],
                       "nested": {"x": {"y": [None, "f8", None]}}}


def test_append_leaves_what_is_no_column_alone():
    beside = {"version": 1, "config": {"lr": 1}, "asked": ["lr"], "derived": {"data": "ab"}, "sizes": {"train": 5},
              "environment": {"python": "3"}, "layers": {"names": ["a"], "units": [5]}, "warnings": []}
    history = {**copy.deepcopy(beside), "step": []}
    append(history, row(0))
    assert {key: history[key] for key in beside} == beside and history["step"] == [0]


def test_a_written_history_is_read_as_it_was_with_null_for_what_is_not_finite(tmp_path):
    history = make_history(0, 1)
    append(history, row(2, weight_norm=math.inf, outcomes={"test": "f8", "robust": "0;1", "adv": {"0.1": "80"}},
                               local_complexity={"train": {"0.05": [None, math.nan]}}, max_batch_loss=None))
    write_history(tmp_path / "history.json", history)
    read = read_history(tmp_path / "history.json")
    assert read["weight_norm"] == [3.0, 3.0, None] and read["outcomes"]["adv"] == {"0.1": [None, None, "80"]}
    assert read["local_complexity"]["train"]["0.05"] == [[1.5, 2.5], [1.5, 2.5], [None, None]]
    assert read.keys() == history.keys() and read["step"] == [0, 1, 2]


def test_a_history_of_an_older_program(tmp_path):
    """Neither environment nor the newer columns; a column from a still newer program is none of ours."""
    history = make_history(0, 1)
    del history["environment"]
    append(history, row(2, curvature={"train": 1.5}))
    write_history(tmp_path / "history.json", history)
    assert read_history(tmp_path / "history.json") == {**history, "environment": {}}


def test_a_history_that_has_just_begun(tmp_path):
    write_history(tmp_path / "history.json", make_history())
    assert read_history(tmp_path / "history.json")["step"] == []


@pytest.mark.parametrize("edit, said", [
    ({"step": [0, "1"]}, "its step"),
    ({"step": [0, None]}, "its step"),
    ({"step": [-1, 0]}, "its step"),
    ({"step": [1, 0]}, "its step"),
    ({"step": [0, 0]}, "its step"),
    ({"step": [False, True]}, "its step"),
    ({"step": "ab"}, "its step"),
    ({"step": None}, "its step"),
    ({"warnings": None}, "its warnings"),
    ({"warnings": [None]}, "its warnings"),
    ({"warnings": ["late"]}, "its warnings"),
    ({"warnings": [{"step": 0}]}, "its warnings"),
    ({"warnings": [{"text": "late", "step": "0"}]}, "its warnings"),
    ({"adv_acc": [0.5, 0.5]}, "its adv_acc"),
    ({"adv_acc": {"0.1": [0.5, "0.5"]}}, "its adv_acc"),
    ({"adv_acc": {"small": [0.5, 0.5]}}, "its adv_acc"),
    ({"robust_acc": {"0.1": 0.5}}, "its robust_acc"),
    ({"robust_acc": {"0.1": [[0.5], 0.5]}}, "its robust_acc"),
    ({"local_complexity": {"train": [1.5, 1.5]}}, "its local_complexity"),
    ({"local_complexity": {"train": {"0.05": [1.5, 1.5]}}}, "its local_complexity"),
    ({"local_complexity": {"train": {"0.05": [[1.5], [1.5, 2.5]]}}}, "its local_complexity"),
    ({"local_complexity": {"train": {"wide": [[1.5], [1.5]]}}}, "its local_complexity"),
    ({"outcomes": ["f8", "f8"]}, "its outcomes"),
    ({"outcomes": {"test": ["f8", "g8"]}}, "its outcomes"),
    ({"outcomes": {"test": ["f8", 1]}}, "its outcomes"),
    ({"outcomes": {"robust": {"0.1": ["01", "01"]}}}, "its outcomes"),
    ({"outcomes": {"adv": ["f8", "f8"]}}, "its outcomes"),
    ({"train_loss": [0.5, True]}, "its train_loss"),
    ({"train_loss": [0.5, 10**400]}, "its train_loss"),
    ({"train_loss": {"a": [0.5, 0.5]}}, "its train_loss"),
    ({"environment": 5}, "its environment"),
    ({"derived": ["x"]}, "its derived"),
    ({"sizes": None}, "its sizes"),
    ({"sizes": {"train": 60, "test": 797}}, "its sizes"),
    ({"version": True}, "its version"),
    ({"train_loss": [0.5]}, "its columns differ in length"),
    ({"unknown": {"deep": [1, 2, 3]}}, "its columns differ in length"),
    ({"note": "mine"}, "its columns differ in length"),
    ({"adv_acc": {"0.1": [0.5, 0.5], "0.2": [0.5]}}, "its columns differ in length"),
    ({"config": None}, "is no training history"),
])
def test_an_edited_history_is_refused_in_one_line(tmp_path, edit, said):
    path = tmp_path / "history.json"
    path.write_text(json.dumps({**make_history(0, 1), **edit}))
    with pytest.raises(ValueError) as error:
        read_history(path)
    assert said in one_line(error) and str(path) in one_line(error)


@pytest.mark.parametrize("column", ["test_acc", "local_complexity", "robust_acc", "seconds", "sizes"])
def test_a_history_without_what_every_program_wrote_is_refused(tmp_path, column):
    history = make_history(0, 1)
    del history[column]
    (tmp_path / "history.json").write_text(json.dumps(history))
    with pytest.raises(ValueError, match=f"it has no {column}"):
        read_history(tmp_path / "history.json")


def test_forgetting_log_points_takes_their_warnings_along():
    history = make_history(0, 1, 2)
    append(history, row(3, outcomes={"test": "8"}))
    history["warnings"] = [{"step": 1, "text": "a"}, {"step": 3, "text": "b"}]
    forget_after(history, 2)
    assert history["step"] == [0, 1] and history["outcomes"] == {"test": [None, None]}
    assert history["warnings"] == [{"step": 1, "text": "a"}]


# ---- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("edit", [
    {"step": -1}, {"step": 1.0}, {"step": "1"}, {"step": None}, {"step": True}, {"logged": -1}, {"logged": None},
    {"epoch": "1"}, {"epoch": math.nan}, {"seconds": None}, {"config": None}, {"config": []}, {"sizes": 5},
    {"derived": []}, {"largest_loss": "1"}, {"model_state_dict": None}, {"model_state_dict": {"weight": 5}},
    {"model_state_dict": {1: torch.ones(2)}}, {"optimizer_state_dict": None},
], ids=str)
def test_an_edited_checkpoint_is_refused_in_one_line(tmp_path, edit):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_state(path, make_state(5, derived={"data": "0123"}, largest_loss=-math.inf))
    checkpoints.load_checkpoint(path)
    checkpoints.save_state(path, {**make_state(5), **edit})
    with pytest.raises(ValueError, match="is no checkpoint of this program") as error:
        checkpoints.load_checkpoint(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("lacking", ["step", "logged", "seconds", "epoch", "config", "sizes", "model_state_dict",
                                     "optimizer_state_dict"])
def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path, lacking):
    state = make_state(5)
    del state[lacking]
    checkpoints.save_state(tmp_path / "checkpoint.pt", state)
    with pytest.raises(ValueError, match="is no checkpoint of this program"):
        checkpoints.load_checkpoint(tmp_path / "checkpoint.pt")


def test_a_checkpoint_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        checkpoints.load_checkpoint(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        checkpoints.load_checkpoint(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rolling", [False, True])
def test_weights_that_are_not_finite_are_passed_over_unless_asked_for(tmp_path, bad, rolling):
    good = checkpoints.save_checkpoint(tmp_path, make_state(5))
    state = make_state(9)
    state["model_state_dict"] |= {"counts": torch.tensor(3), "last": torch.tensor([1.0, bad])}
    newest = checkpoints.save_rolling(tmp_path, state) if rolling else checkpoints.save_checkpoint(tmp_path, state)
    notes = []
    found, path = checkpoints.newest_checkpoint(tmp_path, notes.append)
    assert (found["step"], path) == (5, good) and notes == [f"{newest}: its weights are not finite; passed over"]
    found, path = checkpoints.newest_checkpoint(tmp_path, refuse, finite=False)
    assert (found["step"], path) == (9, newest)


def test_the_newest_checkpoint_before_a_step(tmp_path):
    for step in (0, 5, 9):
        checkpoints.save_checkpoint(tmp_path, make_state(step))
    checkpoints.save_rolling(tmp_path, make_state(12))
    found = {before: checkpoints.newest_checkpoint(tmp_path, refuse, before=before)[0] for before in (0, 1, 9, 10, 12, 13)}
    assert {before: state and state["step"] for before, state in found.items()} == {
        0: None, 1: 0, 9: 5, 10: 9, 12: 9, 13: 12}


def steps_left(folder):
    return sorted(checkpoints.step_in_name(path) for path in checkpoints.saved_checkpoints(folder))


@pytest.mark.parametrize("keep, left", [("all", [1, 2, 3, 4]), ("last", [4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_so_many_checkpoints_are_kept(tmp_path, keep, left):
    for step in (1, 2, 3, 4):
        rolling = checkpoints.save_rolling(tmp_path, make_state(step))
        checkpoints.save_checkpoint(tmp_path, make_state(step), keep)
    assert steps_left(tmp_path) == left and not rolling.exists()


@pytest.mark.parametrize("keep, left", [("last", [5]), (1, [5]), (2, [4, 5, 9]), (3, [2, 4, 5, 9]),
                                        ("all", [1, 2, 3, 4, 5, 9])])
def test_damaged_checkpoints_do_not_count_among_those_kept(tmp_path, keep, left):
    """A run went back from a damaged step 9 to 4 (3 is damaged, too) and now writes 5."""
    for step in (1, 2, 3, 4, 9):
        path = checkpoints.save_checkpoint(tmp_path, make_state(step))
        if step in (3, 9):
            path.write_bytes(path.read_bytes()[:-50])
    path = checkpoints.save_checkpoint(tmp_path, make_state(5), keep)
    assert [step for step in steps_left(tmp_path) if step != 3] == [step for step in left if step != 3]
    assert checkpoints.load_checkpoint(path)["step"] == 5
    sound = [step for step in steps_left(tmp_path) if step not in (3, 9)]
    assert keep == "all" or len(sound) == (1 if keep == "last" else keep)


@pytest.mark.parametrize("keep", ["last", 1, 2])
def test_the_checkpoint_just_written_stays_whatever_newer_names_lie_there(tmp_path, keep):
    for step in (7, 8, 9):
        checkpoints.save_checkpoint(tmp_path, make_state(step))
    path = checkpoints.save_checkpoint(tmp_path, make_state(5), keep)
    assert checkpoints.load_checkpoint(path)["step"] == 5 and len(steps_left(tmp_path)) == (2 if keep == 2 else 1)


def test_a_checkpoint_that_cannot_be_read_stays(tmp_path, monkeypatch):
    for step in (3, 4, 5):
        checkpoints.save_checkpoint(tmp_path, make_state(step))

    def intact(path, intact=checkpoints.intact):
        if checkpoints.step_in_name(path) == 5:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return intact(path)

    monkeypatch.setattr(checkpoints, "intact", intact)
    checkpoints.save_checkpoint(tmp_path, make_state(6), 2)
    assert steps_left(tmp_path) == [4, 5, 6]


# ---- what belongs to the experiment ---------------------------------------------------------------------------------

@pytest.mark.parametrize("before, now, lines", [
    ({"lr": 0.1}, {"lr": 0.1}, []),
    ({"lr": 0.1}, {"lr": 0.2}, ["--lr was 0.1, is 0.2"]),
    ({"lr": 0.1, "b": 1}, {"lr": 0.2, "b": 2}, ["--b was 1, is 2", "--lr was 0.1, is 0.2"]),
    ({}, {"momentum": 0.0}, []),
    ({}, {"momentum": 0.9}, ["--momentum was 0.0, is 0.9"]),
    ({"momentum": 0.9}, {}, ["--momentum was 0.9, is 0.0"]),
    ({"momentum": 0.0}, {}, []),
    ({"of_a_newer_program": 1}, {}, ["--of_a_newer_program was 1, is None"]),
    ({"of_a_newer_program": None}, {}, []),
    ({"eval_threads": 2}, {}, []),
])
def test_differences(before, now, lines):
    assert checkpoints.differences(before, now, DEFAULTS) == lines


def test_what_may_change_makes_no_difference():
    flags = ("n_steps n_epochs data_dir log_dir save_dir resume device threads eval_batch_size cuda_graph "
             "deterministic checkpoint_minutes keep_checkpoints plot on_nan quiet products compile").split()
    assert set(flags) == MAY_CHANGE
    assert checkpoints.differences(dict.fromkeys(flags, 1), dict.fromkeys(flags, 2), {}) == []


# ---- continuing -----------------------------------------------------------------------------------------------------

def run_on_disk(folder, step=5, logged=3, steps=(0, 1, 5), both=(), **checkpoint):
    """Write a run's history and its newest checkpoint; both: what stands in either."""
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    write_history(folder / "logs" / files.HISTORY_NAME, make_history(*steps, **dict(both)))
    return checkpoints.save_checkpoint(folder / "checkpoints", make_state(step, logged, **{**dict(both), **checkpoint}))


def continued(folder, config=None, data="0123", note=lambda line: None, **options):
    return checkpoints.continue_from(folder / "logs", folder / "checkpoints", {**CONFIG, **(config or {})}, DEFAULTS, data,
                                note, **options)


def test_with_nothing_to_resume_a_run_starts(tmp_path):
    notes = []
    assert continued(tmp_path, note=notes.append) is None
    assert notes == [f"nothing to resume in {tmp_path / 'checkpoints'}: starting"]


def test_a_run_continues_from_its_newest_checkpoint_with_the_history_cut(tmp_path):
    path, notes = run_on_disk(tmp_path, step=3, logged=2, derived={"data": "0123"}), []
    found = continued(tmp_path, note=notes.append)
    assert found["path"] == path and found["step"] == 3 and found["history"]["step"] == [0, 1]
    assert found["history"]["local_complexity"]["train"]["0.05"] == [[1.5, 2.5]] * 2
    assert notes == [f"continuing from {path} at step 3"]


@pytest.mark.parametrize("config, said", [
    ({"lr": 0.2}, "another experiment: --lr was 0.1, is 0.2; give this one its own --log_dir and --save_dir"),
    ({"adv_size": 100}, "--adv_size was 1000, is 100"),
    ({"n_steps": 4}, "is at step 5, past --n_steps=4"),
])
def test_another_experiment_is_refused(tmp_path, config, said):
    path = run_on_disk(tmp_path, both={"derived": {"data": "0123"}})
    with pytest.raises(ValueError) as error:
        continued(tmp_path, config)
    assert said in one_line(error) and str(path) in one_line(error)


def test_a_history_of_another_experiment_is_refused(tmp_path):
    run_on_disk(tmp_path)
    history = make_history(0, 1, 5, config={**CONFIG, "lr": 0.3})
    write_history(tmp_path / "logs" / files.HISTORY_NAME, history)
    with pytest.raises(ValueError) as error:
        continued(tmp_path)
    assert "--lr was 0.3, is 0.1" in one_line(error) and files.HISTORY_NAME in one_line(error)


def test_a_run_that_is_exactly_at_its_end_is_continued(tmp_path):
    run_on_disk(tmp_path)
    assert continued(tmp_path, {"n_steps": 5})["step"] == 5


@pytest.mark.parametrize("missing", [True, False])
def test_flags_missing_in_an_edited_config_count_as_their_defaults(tmp_path, missing):
    config = {key: value for key, value in CONFIG.items() if key not in ("momentum", "lr")}
    run_on_disk(tmp_path, both={"config": config if missing else {**config, "lr": 0.001}})
    assert continued(tmp_path, {"lr": 0.001})["step"] == 5
    with pytest.raises(ValueError, match="--lr was 0.001, is 0.1"):
        continued(tmp_path)


@pytest.mark.parametrize("asked", [1000, "all", 797])
def test_a_run_of_an_older_program_is_continued(tmp_path, asked):
    """Its config held the number of images in place of the flag, and threads that no flag sets."""
    run_on_disk(tmp_path, both={"config": {**CONFIG, "adv_size": 797, "eval_threads": 2}})
    assert continued(tmp_path, {"adv_size": asked})["step"] == 5
    with pytest.raises(ValueError, match="--adv_size was 797, is 500"):
        continued(tmp_path, {"adv_size": 500})


def test_a_newer_run_keeps_the_flag_as_it_was_asked_for(tmp_path):
    run_on_disk(tmp_path, both={"config": {**CONFIG, "adv_size": 797}, "derived": {"data": "0123"}})
    assert continued(tmp_path, {"adv_size": 797})["step"] == 5
    with pytest.raises(ValueError, match="--adv_size was 797, is all"):
        continued(tmp_path, {"adv_size": "all"})


def test_what_followed_is_not_compared_but_the_data_are(tmp_path):
    path = run_on_disk(tmp_path, both={"derived": {"data": "0123", "threads": 2, "attacked": 797}, "asked": ["lr"]})
    assert continued(tmp_path)["step"] == 5
    with pytest.raises(ValueError, match="fingerprint 0123, now 4567") as error:
        continued(tmp_path, data="4567")
    assert str(path) in one_line(error)


def test_the_data_of_the_history_are_compared_too(tmp_path):
    run_on_disk(tmp_path, both={"derived": {"data": "4567"}}, derived={"data": "0123"})
    with pytest.raises(ValueError, match=f"{files.HISTORY_NAME} belongs to other data.*fingerprint 4567, now 0123"):
        continued(tmp_path)


def test_a_history_older_than_its_checkpoint_is_refused(tmp_path):
    path = run_on_disk(tmp_path, steps=(0, 1))
    with pytest.raises(ValueError, match=f"is older than {re.escape(str(path))}: its log points are missing") as error:
        continued(tmp_path)
    one_line(error)


def test_a_history_that_is_ahead_of_its_checkpoint_is_refused(tmp_path):
    run_on_disk(tmp_path, steps=(0, 1, 6))
    with pytest.raises(ValueError, match="are not of one run") as error:
        continued(tmp_path)
    one_line(error)


def test_a_missing_history_is_named(tmp_path):
    run_on_disk(tmp_path)
    (tmp_path / "logs" / files.HISTORY_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="no history at"):
        continued(tmp_path)


def test_a_run_goes_on_from_weights_that_are_not_finite_only_if_asked_to(tmp_path):
    run_on_disk(tmp_path, step=1, logged=2)
    path, notes = run_on_disk(tmp_path, weight=math.nan), []
    assert continued(tmp_path, note=notes.append)["step"] == 1
    assert notes[0] == f"{path}: its weights are not finite; passed over"
    assert continued(tmp_path, finite=False)["step"] == 5


# ---- loading the state ----------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
}
STATEFUL = [kind for kind in OPTIMIZERS if kind != "sgd"]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2, bias=False), torch.nn.BatchNorm2d(3), torch.nn.Flatten(),
                               torch.nn.Linear(27, 4)).to(dtype)


def train(model, optimizer, steps):
    for step in steps:
        images = torch.rand(5, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images.to(next(model.parameters()))).square().mean().backward()
        optimizer.step()


def trained(kind, steps=2, dtype=torch.float32):
    model = network(dtype)
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, range(steps))
    return model, optimizer


def checkpoint_of(model, optimizer, step=2, path="checkpoints/5.pt"):
    return {"step": step, "path": path, "model_state_dict": copy.deepcopy(model.state_dict()),
            "optimizer_state_dict": copy.deepcopy(optimizer.state_dict())}


def assert_same(model, other):
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_state_goes_on_as_if_it_had_not_been_saved(kind, dtype):
    model, optimizer = trained(kind, dtype=dtype)
    checkpoint = checkpoint_of(model, optimizer)
    train(model, optimizer, range(2, 5))
    again, its_optimizer = trained(kind, 0, dtype)
    checkpoints.load_state(again, its_optimizer, checkpoint)
    train(again, its_optimizer, range(2, 5))
    assert_same(again, model)


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last])
def test_the_moments_take_on_the_memory_layout_of_this_runs_weights(kind, first):
    """Fused optimizers read weights and moments as if they lay in memory alike."""
    model, optimizer = network().to(memory_format=first), None
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, range(2))
    checkpoint = checkpoint_of(model, optimizer)
    second = {torch.contiguous_format: torch.channels_last, torch.channels_last: torch.contiguous_format}[first]
    again = network().to(memory_format=second)
    its_optimizer = OPTIMIZERS[kind](again.parameters())
    checkpoints.load_state(again, its_optimizer, checkpoint)
    for parameter, state in its_optimizer.state.items():
        assert all(value.stride() == parameter.stride() for value in state.values() if value.ndim)
    train(model, optimizer, [2])
    train(again, its_optimizer, [2])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)


def test_the_settings_of_the_parameter_groups_stay_this_runs():
    model, optimizer = trained("adamw")
    again = network()
    its_optimizer = torch.optim.AdamW(again.parameters(), lr=0.5, weight_decay=0.25)
    checkpoints.load_state(again, its_optimizer, checkpoint_of(model, optimizer))
    (group,) = its_optimizer.param_groups
    assert group["lr"] == 0.5 and group["weight_decay"] == 0.25 and not group["fused"]


def moment(kind):
    return "momentum_buffer" if kind == "momentum" else "exp_avg"


def refused(model, optimizer, checkpoint, said):
    """Loading fails in one line that names the file, and leaves model and optimizer as they were."""
    weights, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError) as error:
        checkpoints.load_state(model, optimizer, checkpoint)
    assert checkpoint["path"] in one_line(error) and said in one_line(error)
    assert_same(model, weights)
    assert optimizer.state_dict()["state"].keys() == state.keys()


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("wrong", [
    lambda value: value[:1], lambda value: value.flatten(), lambda value: torch.zeros(0), lambda value: value.double(),
    lambda value: value.long(), lambda value: value.to_sparse(), lambda value: 1.0, lambda value: None,
    lambda value: torch.ones(())])
def test_moments_of_the_wrong_shape_or_dtype_are_refused(kind, wrong):
    checkpoint = checkpoint_of(*trained(kind))
    entries = checkpoint["optimizer_state_dict"]["state"][0]
    entries[moment(kind)] = wrong(entries[moment(kind)])
    refused(*trained(kind, 0), checkpoint, f"the optimizer that its config describes: see {moment(kind)} 0")


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("edit", [
    lambda state: state.clear(), lambda state: state.pop(3), lambda state: state[3].clear(),
    lambda state: state.update({17: state[0]}), lambda state: state[1].update(extra=torch.ones(3))])
def test_missing_or_additional_moments_are_refused(kind, edit):
    checkpoint = checkpoint_of(*trained(kind))
    edit(checkpoint["optimizer_state_dict"]["state"])
    refused(*trained(kind, 0), checkpoint, "does not fit the optimizer")


@pytest.mark.parametrize("state", [None, [], {"a": {}}, {0: 5}, {0: None}])
def test_a_state_that_is_none_is_refused(state):
    checkpoint = checkpoint_of(*trained("adamw"))
    checkpoint["optimizer_state_dict"]["state"] = state
    refused(*trained("adamw", 0), checkpoint, "holds no state of an optimizer")
    checkpoint["optimizer_state_dict"] = {}
    refused(*trained("adamw", 0), checkpoint, "holds no state of an optimizer")


def test_moments_before_the_first_step_have_to_fit_too():
    checkpoint = {**checkpoint_of(*trained("adamw")), "step": 0}
    checkpoint["optimizer_state_dict"]["state"][0]["exp_avg"] = torch.ones(1)
    refused(*trained("adamw", 0), checkpoint, "does not fit the optimizer")


def test_moments_for_an_optimizer_that_keeps_none_are_refused():
    refused(*trained("sgd", 0), checkpoint_of(*trained("momentum")), "does not fit the optimizer")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_before_the_first_step_there_is_no_state_yet(kind):
    model, optimizer = trained(kind, 0)
    checkpoint = checkpoint_of(model, optimizer, step=0)
    assert checkpoint["optimizer_state_dict"]["state"] == {}
    again = trained(kind, 1)
    checkpoints.load_state(*again, checkpoint)
    assert_same(again[0], model)
    assert not again[1].state_dict()["state"]


def test_sgd_of_an_older_pytorch_kept_buffers_that_are_none():
    model, optimizer = trained("sgd")
    checkpoint = checkpoint_of(model, optimizer)
    checkpoint["optimizer_state_dict"]["state"] = {index: {"momentum_buffer": None} for index in range(5)}
    again, its_optimizer = trained("sgd", 0)
    checkpoints.load_state(again, its_optimizer, checkpoint)
    train(again, its_optimizer, [2])
    train(model, optimizer, [2])
    assert_same(again, model)


@pytest.mark.parametrize("edit", [
    lambda weights: weights.pop("3.bias"),
    lambda weights: weights.update(extra=torch.ones(2)),
    lambda weights: weights.update({"3.weight": weights["3.weight"].T}),
    lambda weights: weights.update({"3.weight": weights["3.weight"].double()}),
    lambda weights: weights.update({"3.bias": torch.ones(1, 4)}),
    lambda weights: weights.update({"1.num_batches_tracked": torch.tensor(1.0)}),
])
def test_weights_that_do_not_fit_are_refused(edit):
    checkpoint = checkpoint_of(*trained("adamw"))
    edit(checkpoint["model_state_dict"])
    refused(*trained("adamw", 0), checkpoint, "does not fit the network that its config describes")


# ---- the locks ------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(files, "SECONDS_TO_SAY_WHO", 0)


def edit_holder(folder, **changes):
    path = folder / ".holder.lock"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def gone():
    """Return the number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_locked_folder_is_refused_with_its_holder_and_free_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    held = files.lock_folders(tmp_path / "a", tmp_path / "b", note=refuse)
    for other in ([tmp_path / "b"], [tmp_path / "c", tmp_path / "b"]):
        with pytest.raises(ValueError, match=f"another run is writing to {re.escape(str(tmp_path / 'b'))} ") as error:
            files.lock_folders(*other, note=refuse)
        assert f"(process {os.getpid()} on " in one_line(error) and "SLURM job 4711)" in one_line(error)
    del held, error
    assert not list(tmp_path.glob("*/.holder.lock"))
    files.lock_folders(tmp_path / "b", tmp_path / "c", note=refuse)


def test_one_folder_under_two_names_is_locked_once(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a").mkdir()
    assert len(files.lock_folders(tmp_path / "a", tmp_path / "link", tmp_path / "a" / ".." / "a", note=refuse)) == 1


def test_the_lock_ends_with_a_process_that_is_killed(tmp_path):
    child = os.fork()
    if child == 0:
        held = files.lock_folders(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL if held else signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert json.loads((tmp_path / ".holder.lock").read_text())["pid"] == child
    files.lock_folders(tmp_path, note=refuse)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, recwarn, code):
    def flock(_descriptor, _operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    notes = []
    for _ in range(2):  # the second run finds what the first left there
        held = files.lock_folders(tmp_path, note=notes.append)
    line = f"the file system of {tmp_path} has no locks: see to it that no second run writes there"
    assert held and notes == [line, line]
    assert not recwarn.list


def test_an_older_filelock_says_in_another_way_that_there_are_no_locks(tmp_path, monkeypatch):
    def acquire(*_args, **_options):
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr(files.filelock.FileLock, "acquire", acquire)
    notes = []
    files.lock_folders(tmp_path, note=notes.append)
    assert len(notes) == 1 and "has no locks" in notes[0]


def test_an_error_that_is_no_lack_of_locks_is_one(tmp_path, monkeypatch):
    def flock(_descriptor, _operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=f"cannot write to {re.escape(str(tmp_path))}: Input/output error; choose"):
        files.lock_folders(tmp_path, note=refuse)


@pytest.mark.parametrize("holder, me, free", [
    ({"pid": "gone"}, {}, True),
    ({"pid": os.getppid()}, {}, False),
    ({"pid": "gone", "host": "elsewhere"}, {}, False),
    ({"pid": 2**62}, {}, False),
    ({"pid": "7"}, {}, False),
    ({"host": "elsewhere", "job": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
    ({"host": "elsewhere", "job": "7", "restarts": 1}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
    ({"host": "elsewhere", "job": "7"}, {"SLURM_JOB_ID": "7"}, False),
    ({"host": "elsewhere", "job": "8"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
    ({"host": "elsewhere"}, {"SLURM_RESTART_COUNT": "1"}, False),
], ids=str)
def test_a_lock_left_behind_does_not_block_for_good(tmp_path, monkeypatch, holder, me, free):
    """The lock stays in force, as on a file server that does not know yet that its client is gone."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    held = files.lock_folders(tmp_path, note=refuse)
    edit_holder(tmp_path, **{**holder, **({"pid": gone()} if holder.get("pid") == "gone" else {})})
    for name, value in me.items():
        monkeypatch.setenv(name, value)
    notes = []
    if free:
        kept = files.lock_folders(tmp_path, note=notes.append)
        assert len(notes) == 1 and "is still locked by a run that is gone (process" in notes[0]
        with pytest.raises(ValueError, match=f"another run is writing .*process {os.getpid()} "):
            files.lock_folders(tmp_path, note=refuse)
        del kept
    else:
        with pytest.raises(ValueError, match="another run is writing to") as error:
            files.lock_folders(tmp_path, note=refuse)
        one_line(error)
    del held


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"pid": 1}', "\x00"])
def test_a_lock_without_a_readable_holder_is_respected(tmp_path, content):
    held = files.lock_folders(tmp_path, note=refuse)
    path = tmp_path / ".holder.lock"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=f"another run is writing to {re.escape(str(tmp_path))}: wait for it"):
        files.lock_folders(tmp_path, note=refuse)
    del held


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    stale = [".checkpoint_epoch_0000001_step_000000005.pt.part", ".rolling.pt.part", ".training_history.json.part",
             ".training_history.png.part"]
    others = [".mine.part", "rolling.pt.part", "rolling.pt"]
    for name in [*stale, *others]:
        (tmp_path / name).touch()
    held = files.lock_folders(tmp_path, note=refuse)
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".lock", ".holder.lock"}
    del held


@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path), lambda path: path.write_text("")],
                         ids=["a link to itself", "a file"])
def test_a_folder_that_cannot_be_one(tmp_path, make):
    make(tmp_path / "logs")
    with pytest.raises(OSError, match=f"^cannot write to {re.escape(str(tmp_path / 'logs'))}: ") as error:
        files.lock_folders(tmp_path / "logs", note=refuse)
    one_line(error)


def test_a_full_disk_at_the_start_is_told_as_such(tmp_path, monkeypatch):
    def mkdir(path, *_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(OSError, match="No space left on device: ") as error:
        files.lock_folders(tmp_path / "logs", note=refuse)
    assert error.value.errno == errno.ENOSPC and str(tmp_path / "logs") in one_line(error)


# ---- an earlier run -------------------------------------------------------------------------------------------------

def test_an_earlier_run_is_moved_aside_whole_and_nothing_else(tmp_path):
    path = run_on_disk(tmp_path)
    checkpoints.save_rolling(path.parent, make_state(7))
    (path.parent / "mine.pt").touch()
    (tmp_path / "logs" / "training_history.png").touch()
    history = (tmp_path / "logs" / files.HISTORY_NAME).read_bytes()
    aside, its_logs = files.move_aside(tmp_path / "logs", tmp_path / "checkpoints")
    assert {entry.name for entry in aside.iterdir()} == {path.name, files.ROLLING_NAME}
    assert {entry.name for entry in its_logs.iterdir()} == {files.HISTORY_NAME, "training_history.png"}
    assert (its_logs / files.HISTORY_NAME).read_bytes() == history
    assert {entry.name for entry in path.parent.iterdir()} == {"mine.pt", aside.name}
    assert files.move_aside(tmp_path / "logs", tmp_path / "checkpoints") == []


def test_runs_moved_aside_in_the_same_second_get_folders_of_their_own(tmp_path):
    folders = set()
    for _ in range(3):
        checkpoints.save_checkpoint(tmp_path, make_state(1))
        write_history(tmp_path / files.HISTORY_NAME, make_history(0))
        folders.update(files.move_aside(tmp_path, tmp_path))
    assert len(folders) == 6 and all(len(list(folder.iterdir())) == 1 for folder in folders)
