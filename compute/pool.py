"""Run many commands, as many at a time as there are devices."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from compute import signals

PARENT = "STOP_WITH_PARENT"  # environment variable with the pool's process id, for distributed.orphaned()
SECONDS_BETWEEN_LOOKS = 0.1


@dataclasses.dataclass
class Job:
    """A command; the pool adds --device=DEVICE. What it prints is appended to output."""

    name: str
    command: list[str]
    output: Path
    device: str = ""
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
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}
        # In its own session: otherwise Ctrl-C in a terminal reaches it twice, and the second ends it unsaved.
        job.process = subprocess.Popen([*job.command, f"--device={job.device}"], stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=output, start_new_session=True, env=environment)


def run_jobs(jobs: list[Job], devices: list[str], threads: int = 1, complete: int = 0) -> tuple[list[str], int]:
    """Run the jobs, one on each device at a time; return those that failed, and the signal that stopped them or 0. The
    signal is handed on to the running jobs. threads: OMP_NUM_THREADS. complete: jobs that the bar counts as done."""
    waiting, free, failed, handed_on = [*jobs], [*devices], [], 0
    running: list[Job] = []
    received: list[int] = []

    def end(job: Job, status: int, text: str) -> None:
        free.append(job.device)
        if any(status in (128 + number, -number) for number in received):
            text = "stopped"
        elif status:
            failed.append(job.name)
        bar.update(status == 0)
        tqdm.write(f"{job.name}: {text}", sys.stdout)
        sys.stdout.flush()

    with (signals.handled_by(lambda number, _frame: received.append(number)),
          tqdm(total=complete + len(jobs), initial=complete, disable=None, dynamic_ncols=True, unit="run") as bar):
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
                status = job.process.returncode
                printed = job.output.read_text(errors="replace").splitlines() or ["it printed nothing"]
                reason = f"ended by {signal.Signals(-status).name}" if status < 0 else printed[-1]
                end(job, status, f"failed: {reason}" if status else "complete")
    return failed, received[0] if received else 0
