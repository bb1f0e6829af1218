"""Signals that ask a run to stop, and standard streams that know ASCII only."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

# Clusters send SIGUSR1, SIGUSR2 or SIGXCPU before a job's time is up. Windows has the first two only.
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
            if hasattr(signal, name)]


def replace_unencodable() -> None:
    """Let the program print to streams that cannot encode "ε"."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call handler(number, frame) for the signals that ask to stop; restore the former handlers at the end. SIGHUP
    stays ignored under nohup; SIGINT, which a script's shell ignores in what it starts with &, does not."""
    former = {number: signal.signal(number, handler) for number in STOPPING
              if signal.Signals(number).name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before or signal.SIG_DFL)


class Interrupted(BaseException):
    """Raised in a measurement by a signal. A measurement changes nothing, so it can be dropped and repeated. A
    BaseException, so that library code's `except Exception` cannot swallow it."""


class Stop(contextlib.ExitStack):
    """Remembers, within its block, the signal that asks the run to stop: .signal is its number, or 0. A second Ctrl-C
    ends the process at once. can_interrupt: whether a signal raises Interrupted in the block of while_measuring();
    otherwise the measurement is finished first."""

    def __init__(self, can_interrupt: bool) -> None:
        super().__init__()
        self.signal, self.measuring, self.can_interrupt = 0, False, can_interrupt

    def __enter__(self) -> "Stop":
        self.enter_context(handled_by(self.handle))
        return self

    def handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal:
            os._exit(128 + number)
        self.signal = number
        self.interrupt()

    def interrupt(self) -> None:
        if self.signal and self.measuring and self.can_interrupt:
            raise Interrupted

    @contextlib.contextmanager
    def while_measuring(self) -> Iterator[None]:
        self.measuring = True
        try:
            self.interrupt()
            yield
        finally:
            self.measuring = False
