"""The device a run computes on: its choice, precision, memory and threads."""

import contextlib
import os
import platform
import re
import subprocess
import time
import timeit
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT, CPU_INFO = Path(__file__).parents[1], Path("/proc/cpuinfo")
OWN_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def choose_device(name: str, dtype: str = "float32") -> torch.device:
    """Return the torch.device that --device names, made the current one; ValueError if it cannot compute in --dtype.
    "auto" is a CUDA GPU if there is one, otherwise the CPU. A GPU that cannot be used is an error with "auto", too: on
    the CPU the run could take a hundred times as long."""
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?|mps|xpu", name):
        raise ValueError(f"--device={name}: choose auto, cpu, cuda, cuda:N, mps or xpu")
    if dtype == "float64" and name in ("mps", "xpu"):
        raise ValueError(f"--dtype=float64: --device={name} computes in float32 only; use --device=cpu")
    kind, _, index = name.partition(":")
    problem = failure(torch.cuda.init) if kind in ("auto", "cuda") else ""
    if kind == "cpu" or (problem and kind == "auto" and "driver on your system is too old" not in problem):
        return torch.device("cpu")
    device = torch.device("cuda" if name == "auto" else name)
    # One of several processes tries the GPU that it is given, in distributed.start().
    if not problem and os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == "1":
        problem = problem_with(device)
    if problem:
        raise ValueError(f"--device={name}: PyTorch {torch.__version__} cannot use this device: {problem}; free it, "
                         "install a PyTorch made for it and its driver (see README), or use --device=cpu")
    if index:
        torch.cuda.set_device(device)  # streams, events and graphs belong to the current device
    return device


def problem_with(device: torch.device) -> str:
    """Return why PyTorch cannot compute on the device (no kernels for it, busy, full), or "" if it can."""
    return failure(lambda: torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device)).sum().item())


def failure(function: Callable[[], Any]) -> str:
    """Return the first sentence of the error that function() raises, or "" if it raises none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say at length what the error says
            function()
    except (RuntimeError, AssertionError) as error:
        return str(error).split("\n")[0].split(". ")[0].strip()
    return ""


def set_precision(deterministic: bool = False) -> None:
    """Let float32 mean float32 on GPUs, too, and count subnormal numbers, which slow a CPU tenfold, as zero. To be
    called before anything is computed."""
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)  # cached: older versions of NumPy warn if they compute it while subnormals count as zero
    torch.set_flush_denormal(True)
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    else:  # before PyTorch 2.9
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first matrix product
        torch.use_deterministic_algorithms(True)


def describe(device: torch.device) -> dict[str, str | None]:
    """Return what the history records about the machine, the libraries and this program."""
    named = device.type in ("cuda", "xpu")
    model = re.search(r"model name\s*: (.*)", CPU_INFO.read_text()) if CPU_INFO.exists() else None
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "device": torch.get_device_module(device).get_device_name(device) if named else device.type,
            "machine": platform.machine(), "processor": model[1] if model else platform.processor(),
            "system": platform.system(), "commit": commit()}


def commit() -> str | None:
    """Return the commit of this program, with "-dirty" if files were changed; None if git does not know."""
    command = ["git", f"--git-dir={ROOT}/.git", f"--work-tree={ROOT}", "describe", "--always", "--abbrev=40", "--dirty",
               "--exclude=*"]  # of tags: the commit itself
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that the memory of the GPU or the CPU is too small."""
    # PyTorch has no exception of its own for the CPU and for CUDA's libraries.
    said = "out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory|Storage size calculation overflowed"
    return isinstance(error, MemoryError) or bool(isinstance(error, RuntimeError) and re.search(said, str(error)))


def cpu_count() -> int:
    """Return how many cores this process may keep busy: those of its affinity, or fewer under a cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    group = Path()
    with contextlib.suppress(OSError):  # a line such as "0::/job/task"
        group = Path(OWN_CGROUP.read_text().strip().rpartition("::/")[2])
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max", which is no quota
            quota, period = map(int, (CGROUPS / folder / "cpu.max").read_text().split())
            cores = min(cores, max(1, quota // period))
    return cores


def fastest_thread_count(work: Callable[[], Any]) -> int:
    """Return the number of threads, among 1, 2, 4, … and cpu_count() or OMP_NUM_THREADS, with which work() runs fastest
    now. Next to a busy neighbour two can be sixty times slower than one."""
    times: dict[int, float] = {}
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = min(cpu_count(), int(asked)) if asked.isdigit() else cpu_count()
    for count in sorted({cores, *(2**i for i in range(cores.bit_length()))}):
        torch.set_num_threads(count)
        work()
        calls, took = timeit.Timer(work, timer=time.perf_counter).autorange()
        times[count] = took / calls
    # A few percent are not worth a second core.
    return next(count for count in times if times[count] < 1.05 * min(times.values()))
