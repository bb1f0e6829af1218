"""Files are whole at any moment, nothing is written through a link, and a folder belongs to one run at a time."""

import contextlib
import errno
import fcntl
import os
import re

import pytest

from records import files


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_content_is_synced_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    calls = []

    def fsync(descriptor):
        calls.append((os.path.dirname(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor).st_size))

    def replace(source, target, replace=os.replace):
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    files.write_atomically(tmp_path / "file", b"12345")
    assert calls[:2] == [(str(tmp_path), 5), "replace"] and calls[2][0] == str(tmp_path.parent)
    assert (tmp_path / "file").read_bytes() == b"12345" and names_in(tmp_path) == {"file"}


@pytest.mark.parametrize("fault", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_earlier_file_and_no_part(tmp_path, monkeypatch, fault, error):
    def fail(*_args):
        raise error

    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(os, fault, fail)
    with pytest.raises(type(error)) as raised:
        files.write_atomically(path, b"new")
    assert isinstance(error, KeyboardInterrupt) or str(path) in one_line(raised) and "No space left" in one_line(raised)
    assert path.read_bytes() == b"earlier" and names_in(tmp_path) == {"file"}


@pytest.mark.parametrize("code, raised", [(errno.EINVAL, False), (errno.ENOSYS, False), (errno.EIO, True)])
def test_a_file_system_that_does_not_sync(tmp_path, monkeypatch, code, raised):
    def fsync(_descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=re.escape(str(tmp_path))) if raised else contextlib.nullcontext():
        files.write_atomically(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"new"


def test_no_file_is_written_through_a_link(tmp_path, monkeypatch):
    victim, folder = tmp_path / "victim", tmp_path / "logs"
    victim.write_bytes(b"precious")
    folder.mkdir()
    monkeypatch.setattr(files.secrets, "token_hex", lambda _n: "0")
    for name in ("file", ".lock", ".part.0.part"):
        (folder / name).symlink_to(victim)
    files.write_atomically(folder / "file", b"new")
    assert (folder / "file").read_bytes() == b"new" and not (folder / "file").is_symlink()
    with pytest.raises(OSError, match="part"):
        files.write_atomically(folder / "part", b"new")
    files.FolderLocks(folder, folder)
    assert victim.read_bytes() == b"precious"


# ---- locks ----------------------------------------------------------------------------------------------------------

def test_a_locked_folder_is_refused_until_it_is_released(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    locks = files.FolderLocks(a, b)
    for other in ((b, b), (c, b)):
        with pytest.raises(ValueError, match=f"^another run is writing to {re.escape(str(b))}: ") as error:
            files.FolderLocks(*other)
        one_line(error)
        del error  # its traceback holds the lock on c
    locks.check()
    locks.release()
    files.FolderLocks(b, c).release()


def test_one_folder_under_two_names_is_locked_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    locks = files.FolderLocks(tmp_path / "a", tmp_path / "link")
    assert len(locks.files) == 1
    locks.check()
    (tmp_path / "link").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")  # and what is written there would go astray
    with pytest.raises(OSError, match="link was removed or replaced"):
        locks.check()


def failing_flock(monkeypatch, code):
    def flock(_descriptor, _operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_one_note(tmp_path, monkeypatch, recwarn, code):
    failing_flock(monkeypatch, code)
    notes = []
    locks = files.FolderLocks(tmp_path / "a", tmp_path / "b", note=notes.append)
    locks.check()
    assert notes == [f"the file system of {folder} has no locks: make sure that no second run writes there"
                     for folder in (tmp_path / "a", tmp_path / "b")]
    assert not recwarn.list


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_lock_that_fails_is_not_taken_for_another_run(tmp_path, monkeypatch, code):
    failing_flock(monkeypatch, code)
    with pytest.raises(OSError, match=f"^cannot write to {re.escape(str(tmp_path))}: {os.strerror(code)}; choose"):
        files.FolderLocks(tmp_path)


def test_a_requeued_job_waits_for_the_lock_of_its_dead_node(tmp_path, monkeypatch):
    now, failed = [0.0], []
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(files.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    failing_flock(monkeypatch, errno.EAGAIN)
    for count in (None, "0", "1"):
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        if count:
            monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        began = now[0]
        with pytest.raises(ValueError, match="another run is writing"):
            files.FolderLocks(tmp_path)
        failed.append(now[0] - began)
    assert max(failed[:2]) < 10 and failed[2] > 90  # an NFS server's lease lasts 90 seconds


def test_a_run_whose_folder_vanished_or_was_replaced_notices_it(tmp_path):
    logs, saves = tmp_path / "logs", tmp_path / "checkpoints"
    locks = files.FolderLocks(logs, saves)
    logs.rename(tmp_path / "moved")
    with pytest.raises(OSError, match=f"^{re.escape(str(logs))} was removed or replaced") as error:
        locks.check()
    one_line(error)
    other = files.FolderLocks(logs, tmp_path / "c")
    with pytest.raises(OSError, match="was removed or replaced"):
        locks.check()
    other.check()
    (logs / ".lock").unlink()
    logs.rmdir()
    logs.symlink_to(tmp_path / "moved")  # the lock that is held, again
    locks.check()


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    stale = [".checkpoint_epoch_0000001_step_000000005.pt.0123456789abcdef.part", ".rolling.pt.0123456789abcdef.part"]
    others = [".mine.part", "rolling.pt"]
    for name in [*stale, *others]:
        (tmp_path / name).touch()
    files.FolderLocks(tmp_path, tmp_path)
    assert names_in(tmp_path) == {*others, ".lock"}


@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path), lambda path: path.write_text("")],
                         ids=["a link to itself", "a file"])
def test_a_folder_that_cannot_be_made(tmp_path, make):
    make(tmp_path / "logs")
    with pytest.raises(OSError, match=f"^cannot write to {re.escape(str(tmp_path / 'logs'))}: ") as error:
        files.FolderLocks(tmp_path / "logs", tmp_path)
    one_line(error)
    with pytest.raises(OSError, match="^cannot write to /proc: "):
        files.FolderLocks("/proc", tmp_path)


# ---- an earlier run -------------------------------------------------------------------------------------------------

CHECKPOINTS = ("checkpoint_epoch_0000001_step_000000005.pt", "rolling.pt")
LOGS = ("training_history.json", "training_history.png", "training_history.rows.jsonl")


def earlier_run(tmp_path):
    for name in ("logs", "checkpoints"):
        (tmp_path / name).mkdir(exist_ok=True)
    for folder, names in (("checkpoints", CHECKPOINTS), ("logs", LOGS)):
        for name in names:
            (tmp_path / folder / name).write_text(name)
    return tmp_path / "logs", tmp_path / "checkpoints"


def test_an_earlier_run_is_moved_aside_whole_and_nothing_else(tmp_path):
    folders = earlier_run(tmp_path)
    (tmp_path / "checkpoints" / "mine.pt").touch()
    aside, its_logs = files.move_aside(*folders)
    assert names_in(aside) == {*CHECKPOINTS} and names_in(its_logs) == {*LOGS}
    assert names_in(tmp_path / "checkpoints") == {"mine.pt", aside.name}
    assert files.move_aside(*folders) == []
    earlier_run(tmp_path)
    assert {*files.move_aside(*folders)}.isdisjoint({aside, its_logs})  # in the same second


def test_a_run_in_one_folder_is_moved_into_one_folder(tmp_path):
    logs, _ = earlier_run(tmp_path)
    for name in CHECKPOINTS:
        (logs / name).touch()
    (aside,) = files.move_aside(logs, logs)
    assert names_in(aside) == {*CHECKPOINTS, *LOGS} and names_in(logs) == {aside.name}


def test_checkpoints_in_the_folder_of_a_tracker_are_not_moved_with_its_files(tmp_path):
    logs, _ = earlier_run(tmp_path)
    saves = logs / "tensorboard"
    saves.mkdir()
    for name in (*CHECKPOINTS, "events.out.tfevents.1"):
        (saves / name).touch()
    aside, its_logs = files.move_aside(logs, saves)
    assert names_in(aside) == {*CHECKPOINTS} and aside.parent == saves
    assert names_in(its_logs) == {*LOGS, "tensorboard"} and names_in(its_logs / "tensorboard") == {
        "events.out.tfevents.1"}
