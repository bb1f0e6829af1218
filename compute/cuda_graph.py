"""Training steps replayed as CUDA graphs, so that a step costs its arithmetic and not its kernel launches.

The log step is not captured: its attacks drop images once they are decided, which a graph of fixed shape cannot do.
"""

import gc
import warnings
from collections.abc import Callable

import torch

WARM_UP_STEPS = 3
STEPS_IN_LONG_GRAPH = 10


def repeater(step: Callable[[], None], report: Callable[[str], None]) -> Callable[[int], None]:
    """Return repeat(n), which makes n training steps by replaying CUDA graphs of step().

    step() must read and write tensors that stay where they are, choose its batch by tensors on the device, and never
    wait for the device. The first steps run eagerly, as PyTorch requires before a capture. Then a graph of one step and
    one of ten are captured. If that fails, report() gets the reason, and all steps run eagerly.
    """
    graphs: dict[int, Callable[[], None]] = {}
    eager_left = WARM_UP_STEPS

    def repeat(n: int) -> None:
        nonlocal eager_left
        if eager_left > 0:
            eager = min(n, eager_left)
            run_on_side_stream(step, eager)
            n, eager_left = n - eager, eager_left - eager
        if n > 0 and not graphs:
            graphs.update(capture(step, report))
        for length, replay in graphs.items():
            for _ in range(n // length):
                replay()
            n %= length

    return repeat


def run_on_side_stream(step: Callable[[], None], n: int) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        # The optimizer does not know that its next steps will be captured.
        warnings.filterwarnings("ignore", message=".*constructed with capturable=True")
        for _ in range(n):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def capture(step: Callable[[], None], report: Callable[[str], None]) -> dict[int, Callable[[], None]]:
    """Return {number of steps: function that makes them}, longest first; capturing itself makes none."""
    gc.collect()  # a former run's graphs, whose memory is only freed with them
    graphs = {STEPS_IN_LONG_GRAPH: torch.cuda.CUDAGraph(), 1: torch.cuda.CUDAGraph()}
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()  # PyTorch's own for captures stays on the device of the process's first capture
    try:
        for length, graph in graphs.items():
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(length):
                    step()
    except RuntimeError as error:
        torch.cuda.set_stream(current)  # a capture that breaks leaves its own as the current one
        torch.cuda.synchronize()
        reason = error.__context__ or error  # ending a broken capture raises an error of its own
        report(f"CUDA graph capture failed, the steps run eagerly: {str(reason).splitlines()[0]}")
        return {1: step}
    return {length: graph.replay for length, graph in graphs.items()}
