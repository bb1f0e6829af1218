"""All that is distributed: data-parallel training under torchrun or srun, one process a GPU (or a gloo process a CPU).

Every function does nothing, or the obvious, in a run of one process, so that train.py reads the same for both.
"""

import os
import signal
import subprocess
import sys

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

torchrun = None  # its process id, where it started this process


def start(device):
    """Join the process group that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK: torchrun sets them).

    Returns the device of this process: the GPU numbered LOCAL_RANK if device is "cuda". Without WORLD_SIZE > 1 there
    is no group and the device is returned as it is. Raises ValueError, on every process, if not each has a GPU of its
    own, and if they cannot meet.
    """
    global torchrun
    if "TORCHELASTIC_RUN_ID" in os.environ:
        torchrun = os.getppid()
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        describe_srun_step()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    try:
        store, rank, size = next(rendezvous("env://"))
    except RuntimeError as error:  # PyTorch has a narrower one, dist.DistError, but up to 2.6 not for a taken port
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(f"the processes cannot meet at {where} ({error}): set MASTER_PORT to a free port") from None
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        has_gpu = device.index < torch.cuda.device_count()
        refuse_shared_gpus(store, rank, size, torch.cuda.get_device_properties(device).uuid if has_gpu else "none")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    return device


def refuse_shared_gpus(store, rank, size, gpu):
    """Raise ValueError, on every process, unless each says another gpu than all others and none says "none".

    NCCL would end in an error that does not say so, or not end.
    """
    store.set(f"gpu of {rank}", str(gpu))
    gpus = {store.get(f"gpu of {one}") for one in range(size)} - {b"none"}
    if len(gpus) < size:
        raise ValueError(f"{size} processes see {len(gpus)} GPUs: start one process a GPU")


def describe_srun_step():
    """Set the variables that torchrun would set, from those that srun gives to each task."""
    slurm = os.environ
    nodes = subprocess.run(["scontrol", "show", "hostnames", slurm["SLURM_STEP_NODELIST"]], check=True,
                           capture_output=True, text=True).stdout.split()
    # SLURM may show each task one GPU only; two tasks that this sends to the same are refused by refuse_shared_gpus().
    local_rank = int(slurm["SLURM_LOCALID"]) % max(1, torch.cuda.device_count())
    os.environ.update(RANK=slurm["SLURM_PROCID"], WORLD_SIZE=slurm["SLURM_STEP_NUM_TASKS"], LOCAL_RANK=str(local_rank))
    # Below the ports that systems hand out: 100 for each job, so that the steps of neighbouring jobs do not meet.
    port = 15_000 + int(slurm["SLURM_JOB_ID"]) % 150 * 100 + int(slurm["SLURM_STEP_ID"]) % 100
    os.environ.setdefault("MASTER_ADDR", nodes[0])
    os.environ.setdefault("MASTER_PORT", str(port))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # like torchrun: the processes of a node share its cores


def orphaned():
    """Return SIGHUP if torchrun started this process and is gone, so that nobody stops it any more; else 0."""
    return signal.SIGHUP if torchrun is not None and os.getppid() != torchrun else 0


def leave(status):
    """End this process with an exit status.

    In a distributed run it ends at once, without taking apart what is left: the destructor of gloo's process group
    waits, holding Python's lock, for a thread that may itself be waiting for that lock, and then neither ends.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


# ---- training and measuring -----------------------------------------------------------------------------------------

def wrap(model, device):
    """Return the module to call in training: its backward pass averages the gradients over the processes.

    Batch norm then uses the statistics of the global batch. Raises ValueError for batch norm on CPUs, for which PyTorch
    has no such layer.
    """
    if size() == 1:
        return model
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        if device.type != "cuda":
            raise ValueError("--batch_norm on several processes needs GPUs: PyTorch's SyncBatchNorm has no CPU version")
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = DistributedDataParallel(model)
    # They are constants, or batch norm's statistics, which are the same everywhere already.
    network.broadcast_buffers = False
    return network


def shard(n):
    """Return this process's slice of n items; the slices are contiguous and differ by at most one in length."""
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def all_reduce_sum(tensor):
    """Return the sum of tensor over the processes."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_shards(part, n):
    """Return the tensor of n entries, on every process, of which each process has part, its shard(n)."""
    if size() == 1:
        return part
    whole = part.new_zeros(n, *part.shape[1:], dtype=torch.uint8 if part.dtype == torch.bool else part.dtype)
    whole[shard(n)] = part  # gloo adds up no bools
    return all_reduce_sum(whole).to(part.dtype)


def all_reduce_max(number, device):
    """Return the largest of the processes' numbers (or whether any is True)."""
    if size() == 1:
        return number
    box = torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else torch.int64, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return box.item()


# ---- files: what one process does or sees and the others have to know -----------------------------------------------

def run_on_rank0(function):
    """Let the first process alone call function(); return its value (any picklable object) on every process.

    Its ValueError or OSError is raised on every process, so that none waits for one that has given up.
    """
    if size() == 1:
        return function()
    box, error = [None], None
    if rank() == 0:
        box[0], error = attempt(function)
    raise_everywhere(error)
    dist.broadcast_object_list(box)
    return box[0]


def rank0_first(function):
    """Return function() of each process; the first has done before the others begin, as with a download.

    A ValueError or OSError of any process is raised on every process.
    """
    if size() == 1:
        return function()
    value, error = attempt(function) if rank() == 0 else (None, None)
    raise_everywhere(error)
    if rank() > 0:
        value, error = attempt(function)
    raise_everywhere(error)
    return value


def attempt(function):
    """Return function() and None, or None and its ValueError or OSError."""
    try:
        return function(), None
    except (ValueError, OSError) as error:
        return None, error


def raise_everywhere(error):
    """Raise, on every process, the error that the first of them has that has one."""
    errors = [None] * size()
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise error


def barrier():
    """Wait until every process is here."""
    if size() > 1:
        dist.barrier()


def lost_another(error):
    """Return whether error, met while working together, means that another process has ended."""
    # gloo's errors have no type of their own
    return size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
