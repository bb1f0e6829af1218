"""Files that are whole at any moment, and the folders of a run: locks, and moving an earlier run's files aside."""

import contextlib
import datetime
import errno
import os
import re
import secrets
import signal
import stat
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import filelock

HISTORY_PATTERN = "training_history.*"  # the history, its rows and its figures
CHECKPOINT_PATTERN = "checkpoint_epoch_*.pt"
ROLLING_NAME = "rolling.pt"
LOCK_NAME = ".lock"
# How a file system says that it has no locks or does not sync folders.
NOT_SUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # and do not wait for a FIFO's reader


def write_atomically(path: str | Path, content: bytes | memoryview) -> None:
    """Write content to path: into a new file next to it, fsync, rename. A link at path is replaced, not followed.

    OSError (no room, no permission) names the path and leaves what was there.
    """
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
    """Append line and a newline to an existing regular file, and fsync. OSError names the path."""
    with naming(path), os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | NO_LINKS), "ab") as file:
        check_regular(path, os.fstat(file.fileno()))
        write_through(file, line + b"\n")


def write_through(file: IO[bytes], content: bytes | memoryview) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def check_regular(path: str | Path, status: os.stat_result | None = None) -> None:
    """Raise OSError unless path is a regular file: reading a FIFO or a device may never end."""
    if not stat.S_ISREG((status or os.stat(path)).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


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


def check_room(folder: str | Path, size: int) -> None:
    """Raise OSError if folder cannot take `size` more bytes. Call it before an earlier run's files are moved."""
    with naming(folder), tempfile.TemporaryFile(dir=folder) as file:
        write_through(file, bytes(size))


class FolderLocks:
    """The locks that a run holds on its folders. The kernel releases them when the process ends, however it ends."""

    def __init__(self) -> None:
        self.locks: list[filelock.BaseFileLock] = []
        self.held: dict[Path, tuple[int, int]] = {}  # lock file: its device and inode

    def check(self) -> None:
        """Raise OSError if a lock is no longer the one in its folder; call it before each write.

        FileNotFoundError means that a folder was removed and no other run has taken its place.
        """
        missing = []
        for path, identity in self.held.items():
            try:
                replaced = identify(path) != identity
            except FileNotFoundError:
                replaced = path.parent.exists()
                missing.append(path.parent)
            if replaced:
                raise OSError(f"{path.parent} was removed or replaced while the run was writing to it: the run ends "
                              "and leaves the folder to whoever uses it now")
        if missing:
            raise FileNotFoundError(f"{missing[0]} was removed while the run was writing to it")

    def release(self) -> None:
        """Release the locks, so that another run may use the folders."""
        for lock in self.locks:
            lock.release()


def identify(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def lock_folders(log_dir: str | Path, save_dir: str | Path) -> FolderLocks:
    """Make the folders and lock them against a second run; the locks last as long as the returned object.

    Raises OSError if a folder cannot be written, ValueError if another run holds it or its file system has no locks.
    """
    locks = FolderLocks()
    folders = {os.path.realpath(folder): Path(folder) for folder in (log_dir, save_dir)}  # one folder is locked once
    for _, folder in sorted(folders.items()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locks.locks.append(lock(folder / LOCK_NAME))
            locks.held[folder / LOCK_NAME] = identify(folder / LOCK_NAME)
        except OSError as error:
            reason = f"cannot write to {folder}: {error.strerror or error}; choose another --log_dir or --save_dir"
            raise OSError(error.errno, reason) if error.errno in FULL_DISK else OSError(reason) from None
        for part in folder.glob(".*.part"):  # a killed run was writing it
            if re.match(r"\.(checkpoint_epoch|rolling\.pt|training_history\.(json|rows))", part.name):
                with contextlib.suppress(OSError):
                    part.unlink()
    return locks


def lock(path: Path) -> filelock.BaseFileLock:
    """Return the lock on a file, acquired."""
    # Opened here first, so that a link, a device or a missing permission is named as such.
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o644)) as file:
        check_regular(path, os.fstat(file.fileno()))
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


@contextlib.contextmanager
def signals_delayed() -> Iterator[None]:
    """Let SIGINT and SIGTERM arrive after the block, not in it."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda received_number, _frame: received.append(received_number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for received_number in received:
            signal.raise_signal(received_number)


def move_aside(log_dir: str | Path, save_dir: str | Path) -> list[Path]:
    """Move an earlier run's files into new folders earlier-TIME next to them; return these folders.

    Ctrl-C and SIGTERM wait until all files are moved, so that a run is never split over two folders.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    made: list[Path] = []
    # The history goes last: without checkpoints there is nothing to resume, but checkpoints need their history.
    parts = [(Path(save_dir), [CHECKPOINT_PATTERN, ROLLING_NAME]), (Path(log_dir), [HISTORY_PATTERN])]
    with signals_delayed():
        for folder, patterns in parts:
            files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
            if not files:
                continue
            aside, again = folder / f"earlier-{stamp}", 1
            while aside.exists():
                again += 1
                aside = folder / f"earlier-{stamp}-{again}"
            aside.mkdir()
            for path in files:
                path.rename(aside / path.name)
            made.append(aside)
    return made
