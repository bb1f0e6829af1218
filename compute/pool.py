"""Run many commands, as many at a time as there are devices."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from compute import signals

PARENT = "STOP_WITH_PARENT"  # environment variable with the pool's process id, for distributed.orphaned()
SECONDS_BETWEEN_LOOKS = 0.1
BAR = "{percentage:3.0f}%|{bar}| {n:.1f} of {total} done [{elapsed}<{remaining}]"


@dataclasses.dataclass
class Job:
    """A command; the pool adds --device=DEVICE. What it prints is appended to output; share() is how much is done."""

    name: str
    command: list[str]
    output: Path
    share: Callable[[], float]  # 0 to 1
    device: str = ""
    begin: int = 0  # size of the output file before the command
    process: subprocess.Popen = dataclasses.field(init=False)


def places(device: str, threads: int | None = None) -> list[str]:
    """Return the devices of the commands to run at once: each GPU, or "cpu" for every `threads` (1) cores. A GPU takes
    one command, because the memory of a second is not known. device: as --device names it."""
    import torch

    from compute.device import cpu_count

    if device in ("auto", "cuda") and torch.cuda.device_count():
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu"] * max(1, cpu_count() // (threads or 1)) if device in ("auto", "cpu") else [device]


def start(job: Job, threads: int) -> None:
    """Start a job's process. OSError if it cannot be started or its output cannot be written."""
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with open(job.output, "ab") as output:
        job.begin = output.tell()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}
        # In its own session: otherwise Ctrl-C in a terminal reaches it twice, and the second ends it unsaved.
        job.process = subprocess.Popen([*job.command, f"--device={job.device}"], stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=output, start_new_session=True, env=environment)


def outcome(job: Job, status: int) -> str:
    """Return "complete", or why a job failed: the signal that ended it or the last line it printed."""
    if status < 0:
        return f"failed: ended by {signal.Signals(-status).name}"
    printed = job.output.read_bytes()[job.begin:].decode(errors="replace").splitlines() or ["it printed nothing"]
    return f"failed: {printed[-1]}" if status else "complete"


def run_jobs(jobs: list[Job], devices: list[str], threads: int = 1, complete: int = 0) -> tuple[list[str], int]:
    """Run the jobs, one on each device at a time; return those that failed, and the signal that stopped them or 0. The
    signal is handed on to the running jobs. threads: OMP_NUM_THREADS. complete: jobs that the bar counts as done."""
    waiting, free, failed = list(jobs), list(devices), []
    running: list[Job] = []
    received: list[int] = []
    shares, looked_at, handed_on = {job.name: job.share() for job in jobs}, time.monotonic(), 0

    def end(job: Job, status: int, text: str) -> None:
        free.append(job.device)
        stopped = any(status in (128 + number, -number) for number in received)
        if status and not stopped:
            failed.append(job.name)
        shares[job.name] = job.share() if status else 1.0
        tqdm.write(f"{job.name}: {'stopped' if stopped else text}", sys.stdout)
        sys.stdout.flush()

    with (signals.handled_by(lambda number, _frame: received.append(number)),
          tqdm(total=complete + len(jobs), disable=None, dynamic_ncols=True, bar_format=BAR) as bar):
        while running or (waiting and not received):
            while waiting and free and not received:
                job = waiting.pop(0)
                job.device = free.pop(0)
                try:
                    start(job, threads)
                    running.append(job)
                except OSError as error:
                    end(job, 1, f"failed: {error}")
            for number in received[handed_on:]:
                handed_on += 1
                for job in running if os.name == "posix" else []:  # on Windows Ctrl-C reaches the whole console
                    job.process.send_signal(number)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                end(job, job.process.returncode, outcome(job, job.process.returncode))
            if time.monotonic() - looked_at > 2:
                looked_at = time.monotonic()
                shares |= {job.name: job.share() for job in running}
            bar.update(complete + sum(shares.values()) - bar.n)
    return failed, received[0] if received else 0
