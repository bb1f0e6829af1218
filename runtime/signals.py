"""Signals that ask a run to stop, and standard streams that may be missing."""

import contextlib
import os
import signal
import sys


def open_streams():
    """Let a run go on to its end without a standard output or error (>&-), and with one that knows no "ε"."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


class Interrupted(Exception):
    """Raised in a measurement by a signal: a measurement changes nothing, so it can be dropped and made again."""


class Stop:
    """Remembers the signal that asks the run to stop: .signal is its number, 0 while there is none.

    A second Ctrl-C ends the process at once. can_interrupt: whether a signal may raise Interrupted in the block of
    while_measuring; without it the measurement is finished first.
    """

    def __init__(self, can_interrupt):
        self.signal, self.measuring, self.can_interrupt = 0, False, can_interrupt
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self)

    def __call__(self, number, _frame):
        if number == signal.SIGINT and self.signal:
            os._exit(128 + number)
        self.signal = number
        self.interrupt()

    def interrupt(self):
        if self.signal and self.measuring and self.can_interrupt:
            raise Interrupted

    @contextlib.contextmanager
    def while_measuring(self):
        self.measuring = True
        try:
            self.interrupt()
            yield
        finally:
            self.measuring = False
