"""Files that are whole at any moment, and the folders of a run: locks, and moving an earlier run's files aside."""

import contextlib
import datetime
import errno
import os
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import filelock

HISTORY_PATTERN = "training_history.*"  # the history, its rows and its figures
TRACKED = ("tensorboard", "wandb_id")  # what trackers keep in the folder of the history
CHECKPOINT_PATTERN = "checkpoint_epoch_*.pt"
ROLLING_NAME = "rolling.pt"
LOCK_NAME = ".lock"
# How a file system says that it has no locks or does not sync folders.
NOT_SUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


def write_atomically(path: str | Path, content: bytes | memoryview) -> None:
    """Write content to path: into a new file next to it, fsync, rename. A link at path is replaced, not followed.
    OSError (no room, no permission) names the path and leaves what was there."""
    path = Path(path)
    part = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.part")
    try:
        with naming(path):
            with open(part, "xb") as file:
                write_through(file, content)
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_line(path: Path, line: bytes) -> None:
    """Append line and a newline to an existing file, and fsync. OSError names the path."""
    with naming(path), open(os.open(path, os.O_WRONLY | os.O_APPEND), "ab") as file:
        write_through(file, line + b"\n")


def write_through(file: IO[bytes], content: bytes | memoryview) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename in folder durable where the system can; Windows does not open folders."""
    if hasattr(os, "O_DIRECTORY"):
        with naming(folder):
            descriptor = os.open(folder, os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            except OSError as error:  # some network file systems do not sync folders
                if error.errno not in NOT_SUPPORTED:
                    raise
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name path in the OSErrors of the block; the error of a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


class FolderLocks:
    """The locks that a run holds on its folders. The kernel releases them when the process ends, however it ends.

    Making them makes the folders. Raises OSError if one cannot be written, ValueError if another run holds it or its
    file system has no locks.
    """

    def __init__(self, log_dir: str | Path, save_dir: str | Path):
        self.locks = []
        for folder in sorted({Path(os.path.realpath(folder)) for folder in (log_dir, save_dir)}):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.locks.append(lock(folder / LOCK_NAME))
            except OSError as error:
                reason = f"cannot write to {folder}: {error.strerror or error}; choose another --log_dir or --save_dir"
                raise OSError(error.errno, reason) if error.errno in FULL_DISK else OSError(reason) from None
            for part in folder.glob(f".*.{'?' * 16}.part"):  # a killed run was writing it
                part.unlink(missing_ok=True)
        paths = [Path(folder) / LOCK_NAME for folder in (log_dir, save_dir)]
        self.held = {path: os.lstat(path) for path in paths}  # under the names that the user gave

    def check(self) -> None:
        """Raise OSError if a lock is no longer the one in its folder; call it before each write."""
        for path, status in self.held.items():
            if not path.exists() or not os.path.samestat(os.lstat(path), status):
                raise OSError(f"{path.parent} was removed or replaced while the run was writing to it: the run ends "
                              "and leaves the folder to whoever uses it now")

    def release(self) -> None:
        """Release the locks, so that another run may use the folders."""
        for lock in self.locks:
            lock.release()


def lock(path: Path) -> filelock.BaseFileLock:
    """Return the lock on a file, acquired."""
    path.touch()  # filelock would wait where a file cannot be made
    acquired = filelock.FileLock(path)
    # A file server may hold the lock of a dead node for a minute or two after SLURM has requeued its job.
    timeout = 1 if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" else 150
    try:
        with warnings.catch_warnings():
            # Without kernel locks filelock warns and uses marker files, which a killed run would leave behind.
            warnings.simplefilter("error", UserWarning)
            acquired.acquire(timeout=timeout)
    except filelock.Timeout:
        raise ValueError(f"another run is writing to {path.parent}: wait for it, or give this one its own --log_dir "
                         "and --save_dir") from None
    except (NotImplementedError, UserWarning, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NOT_SUPPORTED:
            raise
        raise ValueError(f"the file system of {path.parent} has no locks, so a second run could write there unnoticed: "
                         "choose a --log_dir and --save_dir on another file system") from None
    return acquired


def move_aside(log_dir: str | Path, save_dir: str | Path | None = None) -> list[Path]:
    """Move an earlier run's history in log_dir, and its checkpoints in save_dir if that is given, into new folders
    earlier-TIME there; return these folders."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    made: list[Path] = []
    # The history goes last: without checkpoints there is nothing to resume, but checkpoints need their history.
    for folder, patterns in ((save_dir, [CHECKPOINT_PATTERN, ROLLING_NAME]), (log_dir, [*TRACKED, HISTORY_PATTERN])):
        if folder is None:
            continue
        files = [path for pattern in patterns for path in sorted(Path(folder).glob(pattern))]
        if not files:
            continue
        aside, again = Path(folder) / f"earlier-{stamp}", 1
        while aside.exists():
            again += 1
            aside = Path(folder) / f"earlier-{stamp}-{again}"
        aside.mkdir()
        for path in files:
            path.rename(aside / path.name)
        made.append(aside)
    return made
