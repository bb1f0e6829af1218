"""The device a run computes on: its choice, precision, memory and threads."""

import math
import os
import platform
import time

import numpy as np
import torch


def choose_device(name):
    """Return the torch.device that --device means, made the current one; ValueError if this machine has none such.

    "auto" is a GPU if there is one. A GPU that PyTorch cannot use, because its driver is too old, is an error and not
    a run on the CPU that takes a hundred times as long.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (":" in name and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"--device={name}: choose auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    obstacle = why_no_cuda()
    if obstacle and "driver on your system is too old" in obstacle:
        raise ValueError(f"--device={name}: PyTorch {torch.__version__} cannot use the GPU: {obstacle}; install a "
                         "PyTorch for this driver, as README says, or run with --device=cpu")
    if obstacle and kind == "auto":
        return torch.device("cpu")
    if obstacle:
        raise ValueError(f"--device={name}: PyTorch sees no CUDA device here ({obstacle}); use --device=cpu or auto")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"--device={name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    if index:
        torch.cuda.set_device(int(index))  # streams, events and graphs are the current device's
    return torch.device(name if kind == "cuda" else "cuda")


def why_no_cuda():
    """Return in PyTorch's words why it cannot use a GPU, or None if it can."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split(". ")[0].strip()
    return None


def set_precision(deterministic=False):
    """float32 means float32, on GPUs as well; subnormal numbers, which slow a CPU tenfold, count as zero."""
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)  # NumPy keeps it; older versions warn when they look at it and subnormals are off
    torch.set_flush_denormal(True)
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    else:  # before PyTorch 2.9
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def total_memory():
    """Return the bytes of memory that this machine has; infinity where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def free_memory(device):
    """Return the bytes that are free on a CUDA device, those that PyTorch holds ready among them."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def out_of_memory(error):
    """Whether an exception says that memory, the GPU's or the CPU's, does not suffice."""
    # PyTorch has no class for the CPU's, NumPy none for what no address reaches.
    said = ("can't allocate memory", "Storage size calculation overflowed", "array is too big",
            "Maximum allowed dimension exceeded")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in said)


def fastest_thread_count(work, seconds=0.3):
    """Return the number of threads, among 1, 2, 4, … and all cores, with which work() runs fastest now.

    Threads wait for each other by spinning: beside a busy neighbour two can be sixty times slower than one, so this is
    measured and not assumed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts = sorted({cores, *(2**i for i in range(cores.bit_length()) if 2**i <= cores)})
    times = {}
    for count in counts:
        torch.set_num_threads(count)
        work()
        runs, start = [], time.perf_counter()
        while len(runs) < 3 or (time.perf_counter() - start < seconds and len(runs) < 100):
            before = time.perf_counter()
            work()
            runs.append(time.perf_counter() - before)
        times[count] = sum(runs) / len(runs)
    # A few percent are not worth a second core.
    return min(count for count in counts if times[count] < 1.05 * min(times.values()))


def describe(device):
    """Return what the history says of the machine and the libraries."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "machine": platform.machine(), "system": platform.system()}
