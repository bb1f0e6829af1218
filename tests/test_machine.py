"""What a run finds out about its machine before it begins, and what it does without a terminal."""

import subprocess

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, SMALL, command, history_of

from runtime import device as devices

TOO_OLD = ("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
           "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx")


def fails_with(monkeypatch, message):
    def init():
        raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_whose_driver_is_too_old_is_not_passed_over_in_silence(monkeypatch, name):
    fails_with(monkeypatch, TOO_OLD)
    with pytest.raises(ValueError, match=r"too old \(found version 11040\); install a PyTorch for this driver.*=cpu"):
        devices.choose_device(name)
    assert devices.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("message", ["Found no NVIDIA driver on your system. Please check that you have one",
                                     "No CUDA GPUs are available", "Torch not compiled with CUDA enabled"])
def test_without_a_gpu_auto_is_the_cpu(monkeypatch, message):
    fails_with(monkeypatch, message)
    assert devices.choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=message.split(".")[0]):
        devices.choose_device("cuda")


def test_with_a_gpu_auto_is_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert devices.choose_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("name", ["foo", "", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "auto:0"])
def test_an_unknown_device_is_named(name):
    with pytest.raises(ValueError, match="choose auto, cpu, cuda or cuda:N"):
        devices.choose_device(name)


@pytest.mark.parametrize("allocate", [
    lambda: torch.empty(10**13), lambda: torch.empty(10**10, 10**10), lambda: np.empty(10**13),
    lambda: np.random.default_rng(0).random((10**9, 10**9, 10**3)), lambda: np.empty(10**20)])
def test_too_much_memory_is_recognised_whoever_says_so(allocate):
    with pytest.raises(Exception) as caught:
        allocate()
    assert devices.out_of_memory(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    assert not devices.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_run_needs_no_open_streams(tmp_path, redirection):
    line = subprocess.list2cmdline(command(*SMALL, "--n_steps=2"))
    done = subprocess.run(f"{line} {redirection}", shell=True, cwd=tmp_path, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0
    assert history_of(tmp_path)["step"] == [0, 1, 2]


def test_a_run_prints_to_a_terminal_that_knows_ascii_only(tmp_path):
    done = subprocess.run(command(*SMALL, "--n_steps=2"), cwd=tmp_path, capture_output=True, timeout=120,
                          env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr.decode()
    assert b"Error" not in done.stderr
    assert done.stdout.isascii()
