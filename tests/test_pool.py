"""compute/pool.py: several commands at a time, each on its device; signals are handed on. No command here uses
PyTorch."""

import functools
import os
import signal
import sys
import threading

import pytest
from conftest import wait_for

from compute import pool

# What a command does that is told to wait: it says so, and ends when it is told to.
WAITS = ("import pathlib, signal, sys, time; "
         "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); pathlib.Path({mark!r}).touch(); time.sleep(60)")


def job(folder, name, program):
    return pool.Job(name, [sys.executable, "-S", "-c", program], folder / f"{name}.txt")


def test_each_device_has_one_job_at_a_time_and_failures_are_named(tmp_path, capsys):
    say = f"""import os, sys
knows_its_pool, has_its_session = os.environ['{pool.PARENT}'] == str(os.getppid()), os.getsid(0) == os.getpid()
print(sys.argv[1], os.environ['OMP_NUM_THREADS'], knows_its_pool and has_its_session)
sys.exit({{}})"""
    jobs = [job(tmp_path, f"job{i}", say.format(3 if i == 2 else 0)) for i in range(4)]
    jobs.append(job(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"))
    jobs.append(job(tmp_path, "silent", "import sys; sys.exit(1)"))
    jobs.append(job(tmp_path, "unwritten", "print('mine')"))
    (tmp_path / "job2.txt").write_text("of an earlier start\n")
    (tmp_path / "unwritten.txt").mkdir()
    assert pool.run_jobs(jobs, ["here", "there"], threads=3) == (["job2", "killed", "silent", "unwritten"], 0)
    said = capsys.readouterr().out.splitlines()
    printed = {path.stem: path.read_text().splitlines()[-1] for path in tmp_path.glob("job*.txt")}
    assert printed.keys() == {"job0", "job1", "job2", "job3"}
    assert {*printed.values()} == {"--device=here 3 True", "--device=there 3 True"}
    assert f"job2: failed: {printed['job2']}" in said and "job0: complete" in said
    assert "killed: failed: ended by SIGKILL" in said and "silent: failed: it printed nothing" in said
    assert any(line.startswith("unwritten: failed: ") and "unwritten.txt" in line for line in said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_handed_on_and_no_other_job_starts(tmp_path, capsys, number, request):
    # Under nohup SIGHUP is ignored, and stays so.
    request.addfinalizer(functools.partial(signal.signal, number, signal.signal(number, signal.SIG_DFL)))
    marks = [tmp_path / f"started{i}" for i in range(3)]
    jobs = [job(tmp_path, mark.name, WAITS.format(mark=str(mark))) for mark in marks]
    before = signal.getsignal(number)

    def stop():
        wait_for(lambda: marks[0].exists() and marks[1].exists())
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    assert pool.run_jobs(jobs, ["a", "b"]) == ([], number)
    thread.join()
    assert sorted(capsys.readouterr().out.splitlines()) == ["started0: stopped", "started1: stopped"]
    assert not marks[2].exists() and signal.getsignal(number) == before


@pytest.mark.parametrize("device, threads, gpus, devices", [
    ("auto", None, 0, ["cpu"] * 6), ("auto", 2, 0, ["cpu"] * 3), ("cpu", 99, 2, ["cpu"]),
    ("auto", None, 2, ["cuda:0", "cuda:1"]), ("cuda:1", None, 2, ["cuda:1"]), ("cuda", None, 0, ["cuda"])])
def test_a_job_has_a_core_or_a_gpu_of_its_own(monkeypatch, device, threads, gpus, devices):
    import torch

    from compute import device as machine

    monkeypatch.setattr(machine, "cpu_count", lambda: 6, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert pool.places(device, threads) == devices
