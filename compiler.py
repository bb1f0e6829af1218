"""The training step's network compiled by torch.compile, where that pays.

Only that network: a log step's passes come in many batch sizes, in eval mode and under hooks, and each of these would
be compiled anew.
"""

import copy
import logging
import os
import shutil
import statistics
import time
import warnings

import torch

WORTH_IT = 600  # seconds of training, below which compiling, which takes up to minutes, is not tried
MARGIN = 1.05  # a compiled network is taken where it is faster by this factor


def compiled(network, images, mode, seconds, report):
    """Return what makes network's passes over batches shaped like images: network itself, or its compiled form.

    mode: "off"; "on" compiles; "auto" compiles on a CPU that has a C++ compiler if the training that is left, `seconds`
    of it as it is, takes more than ten minutes, and takes the result if it is faster. report(line) is told how it
    went if it was tried. What is returned has network's own parameters and buffers; these and the random generators
    are left as they were. torch.compile keeps its code on the disk, makes the same code again where that is gone, and
    makes it for the present number of threads.
    """
    pays = images.device.type == "cpu" and seconds > WORTH_IT and cpp_compiler()
    if mode == "off" or (mode == "auto" and not pays):
        return network
    before, began = copy.deepcopy(network.state_dict()), time.perf_counter()
    try:
        # No mode="reduce-overhead": this program captures its CUDA graphs itself.
        fast = torch.compile(network, dynamic=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about options that are as they should be
            logging.disable(logging.WARNING)
            one_pass(fast, images)
        took = time.perf_counter() - began
        gain = statistics.median(one_pass(network, images) / one_pass(fast, images) for _ in range(9))
    except Exception as error:  # whatever the compiler's many tools raise
        report(f"torch.compile failed, the steps run without it: {reason(error)}")
        return network
    finally:
        logging.disable(logging.NOTSET)
        network.load_state_dict(before)
        network.zero_grad(set_to_none=True)
    taken = mode == "on" or gain > MARGIN
    report(f"torch.compile took {took:.0f} s; the network's passes are {gain:.2f} times as fast"
           + ("" if taken else ": not used"))
    return fast if taken else network


def cpp_compiler():
    """Return the path of the C++ compiler that torch.compile would take on a CPU, or None."""
    return next(filter(None, map(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "clang++"]))), None)


def one_pass(network, images):
    """Make a forward and a backward pass; return its seconds."""
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    began = time.perf_counter()
    network(images).sum().backward()
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - began


def reason(error):
    """Return the line of torch.compile's long message that names the failure."""
    return str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
