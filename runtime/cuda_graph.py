"""Training steps replayed as CUDA graphs, so that a step costs its arithmetic and not its kernel launches.

The log step is not captured. There are sixty of them to 100,000 steps, and their matrix products are large where those
of a training step are small. The attack behind robust_acc drops an image as soon as it is decided: on the MNIST MLP it
makes 37 passes an image in 160 iterations; at the fixed shape that a graph needs it would make 160.
"""

import warnings

import torch

WARM_UP_STEPS = 3
STEPS_IN_LONG_GRAPH = 10


def repeater(step, report):
    """Return repeat(n), which makes n training steps by replaying CUDA graphs of step().

    step() must read and write tensors that stay where they are, choose its batch by tensors on the device, and never
    wait for the device. The first calls run eagerly, as PyTorch asks before a capture; they are real steps of the run.
    Then two graphs are captured, of one step and of ten. If the capture fails, report() is called with the reason and
    the steps run eagerly from there on.
    """
    graphs = {}
    eager_left = WARM_UP_STEPS

    def repeat(n):
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


def run_on_side_stream(step, n):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        # The optimizer does not know that its next steps will be captured.
        warnings.filterwarnings("ignore", message=".*constructed with capturable=True")
        for _ in range(n):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def capture(step, report):
    """Return {number of steps: function that makes them}, longest first; capturing runs nothing."""
    graphs, stream = {}, torch.cuda.Stream()
    try:
        for length in (STEPS_IN_LONG_GRAPH, 1):
            graph = torch.cuda.CUDAGraph()
            # PyTorch's own stream for captures stays on the device of the process's first capture.
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(length):
                    step()
            graphs[length] = graph.replay
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = error.__context__ or error  # ending a broken capture raises once more
        report(f"CUDA graph capture failed, the steps run eagerly: {str(reason).splitlines()[0]}")
        return {1: step}
    return graphs
