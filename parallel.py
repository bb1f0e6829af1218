"""All that is distributed: data-parallel training under torchrun or srun, one process a GPU (or a gloo process a CPU).

Every function does nothing, or the obvious, in a run of one process, so that train.py reads the same for both.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def start(device):
    """Join the process group that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK: torchrun sets them).

    Returns the device of this process: the GPU numbered LOCAL_RANK if device is "cuda". Without WORLD_SIZE > 1 there
    is no group and the device is returned as it is.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def end():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


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
    return DistributedDataParallel(model)


def share(n):
    """Return this process's slice of n items; the slices are contiguous and differ by at most one in length."""
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def total(tensor):
    """Return the sum of tensor over the processes."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first(value):
    """Return the first process's value (any picklable object) on every process."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def largest(number, device):
    """Return the largest of the processes' numbers."""
    if size() == 1:
        return number
    box = torch.tensor(number, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return box.item()


def wait():
    """Wait until every process is here."""
    if size() > 1:
        dist.barrier()
