"""What a run finds out about its machine, what it does without a terminal, and how it is asked to stop."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, history_of, run_here

from compute import device as devices
from compute import signals
from records import files

TOO_OLD = ("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
           "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx")
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be\n\n"


# ---- the device -----------------------------------------------------------------------------------------------------

def raising(error):
    def raise_it(*_args, **_options):
        raise error
    return raise_it


@pytest.mark.parametrize("name", ["auto", "cuda:0"])
@pytest.mark.parametrize("function, error, reason", [
    ("cuda.init", RuntimeError(TOO_OLD), r"too old \(found version 11040\)"),
    ("ones", RuntimeError(NO_KERNEL), "no kernel image is available for execution on the device"),
    ("ones", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), "CUDA out of memory"),
], ids=["driver", "kernels", "full"])
def test_a_gpu_that_cannot_be_used_is_refused_in_one_line(monkeypatch, name, function, error, reason):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    module, _, attribute = function.rpartition(".")
    monkeypatch.setattr(torch.cuda if module else torch, attribute, raising(error))
    with pytest.raises(ValueError, match=f"--device={name}: .*{reason}; .*install .* or use --device=cpu") as caught:
        devices.choose_device(name)
    assert "\n" not in str(caught.value)
    assert devices.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("error", [
    RuntimeError("Found no NVIDIA driver on your system. Please check that you have one"),
    AssertionError("Torch not compiled with CUDA enabled")])
def test_without_a_gpu_auto_is_the_cpu(monkeypatch, error):
    monkeypatch.setattr(torch.cuda, "init", raising(error))
    assert devices.choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=str(error).split(".")[0]):
        devices.choose_device("cuda")


def test_a_device_that_works_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(devices, "problem_with", lambda device: "")
    for name, device in {"auto": "cuda", "cuda": "cuda", "mps": "mps", "xpu": "xpu", "cpu": "cpu"}.items():
        assert devices.choose_device(name) == torch.device(device)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_one_of_several_processes_does_not_try_the_first_gpu(monkeypatch, variable):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(devices, "problem_with", pytest.fail)
    monkeypatch.setenv(variable, "2")
    assert devices.choose_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("name", ["", "cpu:0", "cuda:x"])
def test_an_unknown_device_is_named(name):
    with pytest.raises(ValueError, match="choose auto, cpu, cuda, cuda:N, mps or xpu"):
        devices.choose_device(name)


def test_float64_is_refused_where_the_device_has_none():
    for name in ("mps", "xpu"):
        with pytest.raises(ValueError, match=f"--dtype=float64: --device={name} computes in float32 only"):
            devices.choose_device(name, "float64")


@pytest.mark.parametrize("allocate", [
    lambda: torch.empty(10**13), lambda: torch.empty(10**10, 10**10), lambda: np.empty(10**13),
    ])
def test_too_much_memory_is_recognised_whoever_says_so(allocate):
    with pytest.raises(Exception) as caught:
        allocate()
    assert devices.out_of_memory(caught.value)


def test_too_little_memory_of_a_gpu_is_recognised_and_nothing_else():
    for said in ("CUDA error: out of memory\nCUDA kernel errors might be", "MPS backend out of memory",
                 "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        assert devices.out_of_memory(RuntimeError(said))
    assert not devices.out_of_memory(ValueError("--device=auto: PyTorch cannot use this device: CUDA out of memory"))
    assert not devices.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_deterministic_run_prepares_before_it_computes(monkeypatch, tmp_path):
    found = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(devices, "problem_with", lambda _: found.append(os.environ["CUBLAS_WORKSPACE_CONFIG"]) or "no")
    try:
        run_here(tmp_path, "--dataset=digits", "--device=cuda", "--deterministic", status=2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == [":4096:8"]


def test_a_network_that_cannot_be_compiled_is_one_line(monkeypatch, tmp_path, capsys):
    kind = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    monkeypatch.setattr(torch, "compile", lambda model: raising(kind("no C compiler\n\nSet TORCH_LOGS for more")))
    run_here(tmp_path, *SMALL, "--n_steps=2", "--compile", status=1)
    assert capsys.readouterr().err == ("train.py: error: --compile: no C compiler; install what is missing, or go on "
                                       "with --resume --compile=off\n")


# ---- processors -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lines, files, cores", [
    ("0::/job/task\n", {"cpu.max": "max 100000\n"}, 6),
    ("0::/job/task\n", {"job/cpu.max": "200000 100000\n", "job/task/cpu.max": "max 100000\n"}, 2),
    ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    ("0::/\n", {"cpu.max": "99900000 100000\n"}, 6),
    (None, {}, 6)], ids=["none", "of a parent", "half", "large", "no groups"])
def test_the_cores_are_those_that_a_quota_leaves(tmp_path, monkeypatch, lines, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    monkeypatch.setattr(devices, "OWN_CGROUP", tmp_path / "own")
    for name, text in {**files, **({"own": lines} if lines else {})}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert devices.cpu_count() == cores


# ---- signals --------------------------------------------------------------------------------------------------------

NUMBERS = signals.STOPPING


@pytest.fixture
def former():
    """Install a handler for each signal that asks to stop; yields it."""
    def handler(number, frame):
        raise AssertionError(f"signal {number} was not caught")

    before = {number: signal.signal(number, handler) for number in NUMBERS}
    yield handler
    for number, handler_before in before.items():
        signal.signal(number, handler_before)


@pytest.mark.parametrize("number", NUMBERS)
def test_each_signal_stops_a_run_and_its_handler_is_restored(former, number):
    with signals.Stop(can_interrupt=False) as stop:
        assert stop.signal == 0
        signal.raise_signal(number)
        assert stop.signal == number
    assert {signal.getsignal(number) for number in NUMBERS} == {former}


def test_a_signal_interrupts_a_measurement_only_where_it_may(former):
    with signals.Stop(can_interrupt=True) as stop:
        with pytest.raises(signals.Interrupted), stop.while_measuring():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(signals.Interrupted), stop.while_measuring():
            pytest.fail("a stopped run began to measure")
        signal.raise_signal(signal.SIGTERM)
    with signals.Stop(can_interrupt=False) as stop, stop.while_measuring():
        signal.raise_signal(signal.SIGTERM)
    assert stop.signal == signal.SIGTERM


def test_a_second_ctrl_c_ends_at_once_but_only_in_the_run(former, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with signals.Stop(can_interrupt=False):
        signal.raise_signal(signal.SIGINT)
        assert ended == []
        signal.raise_signal(signal.SIGINT)
        assert ended == [130]
    with pytest.raises(AssertionError, match="was not caught"):
        signal.raise_signal(signal.SIGINT)


def test_under_nohup_a_hangup_stays_ignored(former):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.Stop(can_interrupt=False) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_in_a_scripts_background_an_interrupt_is_obeyed(former):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seen = []
    with signals.handled_by(lambda number, _: seen.append(number)):
        signal.raise_signal(signal.SIGINT)
    assert seen == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def small_run(folder):
    import train

    return train.main([*SMALL, "--n_steps=2", f"--log_dir={folder}/logs", f"--save_dir={folder}/checkpoints"])


def test_a_run_needs_nothing_that_windows_lacks_and_leaves_no_handlers(former, tmp_path, monkeypatch):
    with monkeypatch.context() as windows:
        for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
            windows.delattr(signal, name)
        windows.delattr(os, "sched_getaffinity")
        windows.setattr(files, "fcntl", None)
        assert small_run(tmp_path) == 0
    assert {signal.getsignal(number) for number in NUMBERS} == {former}
    assert history_of(tmp_path)["step"] == [0, 1, 2]


# ---- what the history says of it ------------------------------------------------------------------------------------

def test_a_history_names_the_processor_and_the_commit_and_marks_changed_files(tmp_path, monkeypatch):
    said = devices.describe(torch.device("cpu"))
    assert said["processor"] and said["processor"] in Path("/proc/cpuinfo").read_text()

    def git(*words):
        return subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a", *words], check=True,
                              capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").touch()
    git("add", "file")
    git("commit", "-m", "first")
    monkeypatch.setattr(devices, "ROOT", tmp_path)
    assert devices.commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("changed")
    assert devices.commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setattr(devices, "ROOT", tmp_path / "none")
    assert devices.commit() is None
    monkeypatch.setenv("PATH", "")
    assert devices.commit() is None


# ---- the streams ----------------------------------------------------------------------------------------------------

def test_a_run_prints_to_a_terminal_that_knows_ascii_only(tmp_path, monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    assert small_run(tmp_path) == 0
    sys.stdout.flush()
    assert b"training 2 steps" in output.getvalue() and output.getvalue().isascii()
