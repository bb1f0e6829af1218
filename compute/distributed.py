"""Data-parallel training under torchrun or srun: one process for each GPU, or several gloo processes on CPUs.

In a run of one process every function does nothing, or the obvious, so that train.py reads the same for both.
"""

import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from compute import device as devices

TIME_TO_MEET = timedelta(minutes=10)  # a job's nodes may start minutes apart
LONGEST_WAIT = timedelta(hours=1)  # in an exchange: the first process may be downloading the data
T = TypeVar("T")


def start(device: torch.device) -> torch.device:
    """Join the process group that the environment describes as torchrun or srun set it. Return the device of this
    process: the GPU numbered LOCAL_RANK if device is "cuda". Raises ValueError if the variables do not fit, the
    processes cannot meet, or this one has no working GPU."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ["STOP_WITH_PARENT"] = str(os.getppid())
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        describe_srun_step()
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return device
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        socket.getaddrinfo(address, port)  # PyTorch would try an unknown name until its time is up
        store, me, _ = next(rendezvous("env://", timeout=TIME_TO_MEET))
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            problem = devices.problem_with(device)
            if problem:
                raise ValueError(f"process {me} cannot use {device}: {problem}; start one process for each GPU")
            torch.cuda.set_device(device)
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=me, world_size=processes, timeout=LONGEST_WAIT,
                                device_id=gpu)
        all_reduce_sum(torch.zeros(1, device=device))
    except (RuntimeError, OSError) as error:  # dist.DistError is narrower, but PyTorch 2.6 raises others, too
        reason = str(error).split("\n")[0]
        raise ValueError(f"the {processes} processes cannot meet at {address}:{port} ({reason}): start them with "
                         "torchrun or srun, or set MASTER_ADDR to the first one's machine, MASTER_PORT to a free port "
                         "and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to a network interface") from None
    return device


def describe_srun_step() -> None:
    """Set the variables that torchrun would set, from those that srun gives to each task."""
    slurm = os.environ
    # SLURM may show each task one GPU only.
    local_rank = int(slurm["SLURM_LOCALID"]) % max(1, torch.cuda.device_count())
    slurm.update(RANK=slurm["SLURM_PROCID"], WORLD_SIZE=slurm["SLURM_STEP_NUM_TASKS"], LOCAL_RANK=str(local_rank))
    # The first node, as in "node[03-05,9],login".
    slurm.setdefault("MASTER_ADDR", re.sub(r"\[([0-9]+)[^]]*\]", r"\1", slurm["SLURM_STEP_NODELIST"]).split(",")[0])
    # Below the ports that systems hand out: 100 for each job, so that the steps of neighbouring jobs do not meet.
    job, step = int(slurm["SLURM_JOB_ID"]), int(slurm["SLURM_STEP_ID"])
    slurm.setdefault("MASTER_PORT", str(15_000 + job % 150 * 100 + step % 100))
    if "OMP_NUM_THREADS" not in slurm:
        torch.set_num_threads(1)  # like torchrun: the processes of a node share its cores


def orphaned() -> int:
    """Return SIGHUP if torchrun or sweep.py started this process and has ended, so that nobody stops it any more."""
    parent = int(os.environ.get("STOP_WITH_PARENT", 0))
    return signal.SIGHUP if parent and os.name == "posix" and os.getppid() != parent else 0


def leave(status: int) -> NoReturn:
    """End this process with an exit status; at once if distributed: gloo's destructor may wait for a thread that waits
    for Python's lock."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the module to call in training; its backward pass averages the gradients over the processes. Batch norm
    then uses the statistics of the global batch; ValueError on CPUs."""
    if world_size() == 1:
        return model
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        if device.type != "cuda":
            raise ValueError("--batch_norm on several processes needs GPUs: PyTorch's SyncBatchNorm has no CPU version")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = DistributedDataParallel(model)
    network.broadcast_buffers = False  # they are the same already; the constructor's argument has changed its name
    return network


def shard(n: int) -> slice:
    """Return this process's slice of n items; the slices are contiguous and their lengths differ by at most one."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of tensor over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(numbers: list[int], device: torch.device) -> list[int]:
    """Return the largest of the processes' numbers, place by place; of bools, whether any is True."""
    if world_size() == 1:
        return numbers
    box = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return box.tolist()


def gather_shards(part: torch.Tensor, n: int) -> torch.Tensor:
    """Return, on every process, the tensor of n numbers or rows of which each process holds part, its shard(n)."""
    whole = part.new_zeros(n, *part.shape[1:])
    whole[shard(n)] = part
    return all_reduce_sum(whole)


def run_on_rank0(function: Callable[[], T]) -> T:
    """Call function() on the first process only; return its value (any picklable object) on every process. Its
    ValueError or OSError is raised on every process, so that none waits for one that has given up."""
    box = [run_where(rank() == 0, function)]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def rank0_first(function: Callable[[], T]) -> T:
    """Return each process's function(); the first process finishes before the others begin, as with a download. A
    ValueError or OSError of any process is raised on every process."""
    first, other = run_where(rank() == 0, function), run_where(rank() > 0, function)
    return first if rank() == 0 else other


def run_where(here: bool, function: Callable[[], Any]) -> Any:
    """Return function() where `here` is true, otherwise None. The first ValueError or OSError is raised everywhere."""
    value, problem = None, None
    try:
        value = function() if here else None
    except (ValueError, OSError) as error:
        problem = error
    problems = [problem] * world_size()
    if world_size() > 1:
        dist.all_gather_object(problems, problem)
    for found in filter(None, problems):
        raise found
    return value


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def lost_another(error: BaseException) -> bool:
    """Return whether error, raised by an exchange between processes (gloo's has no type of its own), means that another
    process has ended."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
