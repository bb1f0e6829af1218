"""Files that are whole at any moment, and the folders of a run: locks, and moving an earlier run's files aside."""

import contextlib
import datetime
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, which then counts as a file system without locks
    fcntl = None  # type: ignore[assignment]

HISTORY_PATTERN = "training_history.*"  # the history, its rows and its figures
TRACKED = ("tensorboard/events.out.*", "wandb_id")  # what trackers keep in the folder of the history
CHECKPOINT_PATTERN = "checkpoint_epoch_*.pt"
ROLLING_NAME = "rolling.pt"
LOCK_NAME = ".lock"
# How a file system says that it has no locks or does not sync files or folders.
NOT_SUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


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
    if hasattr(os, "O_DIRECTORY"):  # Windows does not open folders
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            supported(os.fsync, folder)
        finally:
            os.close(folder)


def append_line(path: Path, line: bytes) -> None:
    """Append line and a newline to a file, and fsync. OSError names the path."""
    with naming(path), open(path, "ab") as file:
        write_through(file, line + b"\n")


def write_through(file: IO[bytes], content: bytes | memoryview) -> None:
    file.write(content)
    file.flush()
    supported(os.fsync, file.fileno())


def supported(system_call: Callable, *arguments: int) -> bool:
    """Make a system call on an open file or folder; return False if its file system does not have it."""
    try:
        system_call(*arguments)
        return True
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        return False


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name path in the OSErrors of the block; the error of a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


class FolderLocks:
    """The locks that a run holds on its folders, which it makes; without folders, none. The kernel releases them when
    the process ends. note: called with one line for a folder whose file system has no locks. Raises OSError if a folder
    cannot be written, ValueError if another run holds it."""

    def __init__(self, *folders: str | Path, note: Callable[[str], None] = print):
        self.files: list[IO[bytes]] = []
        for folder in sorted({Path(os.path.realpath(folder)) for folder in folders}):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.files.append(open(folder / LOCK_NAME, "ab"))
                locked = lock(self.files[-1].fileno(), folder)
            except OSError as error:
                raise OSError(f"cannot write to {folder}: {error.strerror or error}; choose another --log_dir or "
                              "--save_dir") from None
            for part in folder.glob(f".*.{'?' * 16}.part"):  # a killed run was writing it
                part.unlink(missing_ok=True)
            if not locked:
                note(f"the file system of {folder} has no locks: make sure that no second run writes there")
        paths = [Path(folder) / LOCK_NAME for folder in folders]
        self.held = {path: os.lstat(path) for path in paths}  # under the names that the user gave

    def check(self) -> None:
        """Raise OSError if a lock is no longer the one in its folder; call it before each write."""
        for path, status in self.held.items():
            if not path.exists() or not os.path.samestat(os.lstat(path), status):
                raise OSError(f"{path.parent} was removed or replaced while the run was writing to it: the run ends "
                              "and leaves the folder to whoever uses it now")

    def release(self) -> None:
        """Release the locks, so that another run may use the folders."""
        for file in self.files:
            file.close()


def lock(descriptor: int, folder: Path) -> bool:
    """Lock an open file of the folder; return False if its file system has no locks. ValueError if another run holds
    the lock."""
    # A file server may hold the lock of a dead node for a minute or two after SLURM has requeued its job.
    deadline = time.monotonic() + (1 if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" else 150)
    while True:
        try:
            return fcntl is not None and supported(fcntl.flock, descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ValueError(f"another run is writing to {folder}: wait for it, or give this one its own "
                                 "--log_dir and --save_dir") from None
        time.sleep(0.1)


def move_aside(log_dir: str | Path, save_dir: str | Path | None = None) -> list[Path]:
    """Move an earlier run's history in log_dir, and its checkpoints in save_dir if that is given, into new folders
    earlier-TIME there; return these folders."""
    # The history goes last: without checkpoints there is nothing to resume, but checkpoints need their history.
    patterns = [*((save_dir, name) for name in (CHECKPOINT_PATTERN, ROLLING_NAME) if save_dir),
                *((log_dir, name) for name in (*TRACKED, HISTORY_PATTERN))]
    found = [(Path(folder), path) for folder, name in patterns for path in sorted(Path(folder).glob(name))]
    name = f"earlier-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    while any((folder / name).exists() for folder, _ in found):  # of the same second
        name += "-2"
    for folder, path in found:
        aside = folder / name / path.relative_to(folder)
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside)
    return [*dict.fromkeys(folder / name for folder, _ in found)]
