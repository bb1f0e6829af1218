"""What can be tested of captured steps without a GPU: a step reads nothing back, and each step is made once."""

import contextlib
import dataclasses
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import flags
import train
from compute import cuda_graph


class Waits(TorchDispatchMode):
    """Collects the operations in its block for which the host needs a tensor's values: they cannot be captured."""

    def __enter__(self):
        self.seen, self.n = [], 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        # Whole numbers as an index give a shape that is known before.
        known = func is torch.ops.aten.index.Tensor and all(i is None or i.dtype == torch.int64 for i in args[1])
        if tags and not known:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_test_knows_what_waits():
    with Waits() as waits:
        values = torch.ones(3)
        values.sum().item()
        values[values > 0]
        values[torch.tensor([2, 0])]
    assert len(waits.seen) == 2


@pytest.mark.parametrize("words", [
    ["--model=mlp", "--batch_norm", "--optimizer=adam", "--loss=mse", "--dtype=float64"],
    ["--model=resnet18", "--width=4", "--batch_norm", "--loss=exact_ce", "--label_noise=0.5"],
    ["--model=cnn", "--width=4", "--optimizer=sgd", "--loss=stablemax", "--orthogonal_gradient"],
    ["--lr_schedule=cosine", "--warmup_steps=2", "--label_smoothing=0.1"]],
    ids=lambda words: words[0])
def test_a_training_step_reads_nothing_back(words):
    args = flags.parse_args(["--dataset=digits", "--batch_size=20", "--n_steps=4", "--width=8", *words])
    dataset = data.load_dataset(args.dataset, args.data_dir, args.train_size, args.seed, None, args.label_noise)
    # --augment refuses digits, whose images are small.
    config = dataclasses.replace(train.complete(args, dataset, torch.device("cpu")), augment=args.warmup_steps > 0)
    trainer = train.Trainer(train.build_model(config, dataset), config, dataset)
    for group in trainer.optimizer.param_groups:
        group["capturable"] = "capturable" in group  # as on a GPU
    trainer.advance(0, 3)
    with Waits() as waits:
        trainer.advance(3, 1)
    assert waits.n > 20 and waits.seen == []


@pytest.fixture
def fake_cuda(monkeypatch):
    """Replace CUDA's streams and graphs by some that record a capture and play it back."""
    class Stream:
        def wait_stream(self, other):
            pass

    capturing = []

    @contextlib.contextmanager
    def graph(target, stream):
        capturing.append(target)
        yield
        capturing.pop()

    class Graph:
        def __init__(self):
            self.steps = 0

        def replay(self):
            made.extend(["replayed"] * self.steps)

    made = []

    def step():
        if capturing:
            capturing[-1].steps += 1
        else:
            made.append("eager")

    for name, value in {"Stream": Stream, "current_stream": Stream, "stream": lambda stream: contextlib.nullcontext(),
                        "CUDAGraph": Graph, "graph": graph, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return step, made


@pytest.mark.parametrize("calls", [[1] * 30, [2, 2, 2], [100], [3, 10, 1, 19, 67], [1, 65, 5]])
def test_every_step_is_made_once_and_a_capture_makes_none(fake_cuda, calls):
    step, made = fake_cuda
    repeat = cuda_graph.repeater(step, report=pytest.fail)
    for n in calls:
        repeat(n)
    assert made == ["eager"] * 3 + ["replayed"] * (sum(calls) - 3)


def test_what_cannot_be_captured_is_reported_once_and_runs_eagerly(fake_cuda, monkeypatch):
    step, made = fake_cuda

    @contextlib.contextmanager
    def refuse(target, stream):
        try:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        finally:  # like the end of a capture that has been broken
            raise RuntimeError("operation failed due to a previous error during capture")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    reports, current = [], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the one before")
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(cuda_graph, "run_on_side_stream", lambda step, n: [step() for _ in range(n)])
    repeat = cuda_graph.repeater(step, reports.append)
    for n in (5, 20, 1):
        repeat(n)
    assert made == ["eager"] * 26 and current == ["the one before"]
    assert len(reports) == 1 and reports[0].endswith("the steps run eagerly: operation not permitted")


def test_the_host_waits_for_the_steps_before_the_last_ones(monkeypatch):
    events = [Mock(), Mock(), Mock()]
    monkeypatch.setattr(torch.cuda, "Event", Mock(side_effect=events))
    waiting = SimpleNamespace(last_enqueued=None)
    for k, event in enumerate(events):
        train.Trainer.stay_close(waiting)
        assert event.record.called and [other.synchronize.called for other in events] == [i < k for i in range(3)]
