"""Files that are whole at any moment, and the folders of a run: locks, moving an earlier run aside."""

import contextlib
import datetime
import errno
import json
import os
import socket
import tempfile
import warnings
import weakref
from pathlib import Path

import filelock

SECONDS_TO_SAY_WHO = 1  # after which a run that has just locked a folder has written its name there
# How a file system says that it has no locks, or does not sync folders.
NOT_THERE = {errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}
HISTORY_NAME = "training_history.json"
HISTORY_PATTERN = "training_history.*"  # the history and its figures
CHECKPOINT_PATTERN = "checkpoint_epoch_*.pt"
ROLLING_NAME = "rolling.pt"


def write_atomically(path, content):
    """Write bytes to path: beside it, fsync, rename. OSError (no room, no permission) leaves what was there."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise naming(path, error) from None
        raise
    sync_folder(path.parent)


def sync_folder(folder):
    """Let a rename in folder reach the disk, where the system can: Windows does not open folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some network file systems do not sync folders
            if error.errno not in NOT_THERE:
                raise naming(folder, error) from None
        finally:
            os.close(descriptor)


def naming(path, error):
    """Return the OSError with path in its message: that of a full disk names no file."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def check_room(folder, size):
    """Raise OSError if folder cannot take `size` more bytes: to be called before an earlier run's files are moved."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise naming(folder, error) from None


def lock_folders(*folders, note=print):
    """Make the folders and lock them against a second run; returns what must be kept while the run lasts.

    The lock is the kernel's: it ends with the process, however that ends. Where the file system has no locks, or one
    was left behind by a process that is gone, note is called with one line. Raises OSError if a folder cannot be
    written, ValueError if another run holds it.
    """
    held = []
    for folder in sorted({Path(os.path.realpath(folder)) for folder in folders}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.append(lock(folder, note))
            for pattern in (CHECKPOINT_PATTERN, ROLLING_NAME, HISTORY_PATTERN):
                for part in folder.glob(f".{pattern}.part"):  # a killed run was writing it
                    part.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise naming(folder, error) from None
            raise OSError(f"cannot write to {folder}: {error.strerror or error}; choose another --log_dir or "
                          "--save_dir") from None
    return held


def lock(folder, note):
    """Lock one folder and leave a note of who holds it; return what must be kept."""
    held, holder_path = filelock.FileLock(folder / ".lock"), folder / ".holder.lock"
    try:
        with warnings.catch_warnings():
            # Without locks filelock falls back on files, which a killed run would leave behind for good.
            warnings.simplefilter("error", UserWarning)
            held.acquire(timeout=SECONDS_TO_SAY_WHO)
    except filelock.Timeout:
        holder = read_holder(holder_path)
        if not is_gone(holder):
            raise ValueError(f"another run is writing to {folder}{in_words(holder)}: wait for it, or give this one its "
                             "own --log_dir and --save_dir") from None
        note(f"{folder} is still locked by a run that is gone{in_words(holder)}; going on")
    except (NotImplementedError, UserWarning, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NOT_THERE:
            raise
        note(f"the file system of {folder} has no locks: see to it that no second run writes there")
    with contextlib.suppress(OSError):  # the lock holds without it
        holder_path.write_text(json.dumps(this_process()))
    weakref.finalize(held, remove, holder_path)
    return held


def remove(path):
    with contextlib.suppress(OSError):
        os.remove(path)


def this_process():
    """Return what tells this process from others, on this machine and in this job."""
    job = os.environ.get("SLURM_JOB_ID", "")
    # Containers on one host may number their processes each by itself.
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return {"host": f"{socket.gethostname()} {namespace}".strip(), "pid": os.getpid(), "job": job,
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0)}


def read_holder(path):
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    shape = {"host": str, "pid": int, "job": str, "restarts": int}
    fits = isinstance(holder, dict) and all(type(holder.get(name)) is kind for name, kind in shape.items())
    return holder if fits else None


def is_gone(holder):
    """Whether a lock's holder has certainly ended: it was this job before a requeue, or its process is no more."""
    if holder is None:
        return False
    me = this_process()
    if me["job"] and holder["job"] == me["job"] and holder["restarts"] < me["restarts"]:
        return True
    if holder["host"] != me["host"] or os.name != "posix":  # on Windows os.kill would do more than look
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it belongs to another user
        return False
    return False


def in_words(holder):
    if holder is None:
        return ""
    job = f", SLURM job {holder['job']}" if holder["job"] else ""
    return f" (process {holder['pid']} on {holder['host'].split()[0]}{job})"


def move_aside(log_dir, save_dir):
    """Move an earlier run's files into folders earlier-TIME beside them; returns the folders made."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    made = []
    # The history goes last: without its checkpoints it is no run to resume, while they without it could not be used.
    for folder, patterns in ((save_dir, [CHECKPOINT_PATTERN, ROLLING_NAME]), (log_dir, [HISTORY_PATTERN])):
        files = [path for pattern in patterns for path in sorted(Path(folder).glob(pattern))]
        if not files:
            continue
        aside, again = Path(folder) / f"earlier-{stamp}", 1
        while aside in made or aside.exists():
            again += 1
            aside = Path(folder) / f"earlier-{stamp}-{again}"
        aside.mkdir()
        for path in files:
            path.rename(aside / path.name)
        made.append(aside)
    return made
