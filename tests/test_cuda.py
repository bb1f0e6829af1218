"""What only a GPU can show: captured steps give the curves of eager ones, and a resumed run those of a whole one."""

import pytest
import torch
from conftest import SMALL, columns, handlers_kept, history_of, run_here

import run
import train
import training

pytestmark = pytest.mark.cuda
CUDA = [flag for flag in SMALL if not flag.startswith("--device")] + ["--device=cuda", "--deterministic"]
VARIANTS = [["--optimizer=adamw"], ["--optimizer=adam"], ["--optimizer=sgd", "--lr=0.1"], ["--loss=mse"],
            ["--loss=exact_ce"], ["--loss=stablemax"], ["--orthogonal_gradient"],
            ["--batch_norm"], ["--dtype=float64"], ["--model=cnn", "--width=4"],
            ["--model=resnet18", "--width=4", "--batch_norm"]]


@pytest.fixture(autouse=True)
def as_before():
    """What a run sets for its whole process is as it was when the test has ended."""
    with handlers_kept():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: flags[0])
def test_captured_steps_equal_eager_ones(tmp_path, flags, capsys):
    run_here(tmp_path / "graph", *CUDA, *flags, "--n_steps=60")
    assert "capture failed" not in capsys.readouterr().out
    run_here(tmp_path / "eager", *CUDA, *flags, "--n_steps=60", "--no_cuda_graph")
    assert columns(tmp_path / "graph") == columns(tmp_path / "eager")


def test_the_last_of_several_gpus_trains_as_the_first(tmp_path):
    last = f"--device=cuda:{torch.cuda.device_count() - 1}"
    run_here(tmp_path / "last", *CUDA, last, "--n_steps=60")
    assert torch.cuda.current_device() == torch.cuda.device_count() - 1
    run_here(tmp_path / "first", *CUDA, "--device=cuda:0", "--n_steps=60")
    assert columns(tmp_path / "last") == columns(tmp_path / "first")


def test_a_resumed_run_equals_a_whole_one(tmp_path):
    run_here(tmp_path / "whole", *CUDA, "--n_steps=60", "--log_interval=4")
    run_here(tmp_path / "parts", *CUDA, "--n_steps=40", "--log_interval=4")
    run_here(tmp_path / "parts", *CUDA, "--n_steps=60", "--log_interval=4", "--resume")
    assert columns(tmp_path / "whole") == columns(tmp_path / "parts")


def test_a_checkpoint_moves_between_cpu_and_gpu(tmp_path):
    run_here(tmp_path, *SMALL, "--n_steps=40", "--log_interval=4")
    run_here(tmp_path, *CUDA, "--n_steps=60", "--log_interval=4", "--resume")
    run_here(tmp_path, *SMALL, "--n_steps=80", "--log_interval=4", "--resume")
    history = history_of(tmp_path)
    assert history["step"] == list(range(0, 81, 20)) and history["train_loss"][-1] < history["train_loss"][0]


def test_no_step_waits_for_the_device():
    args = train.parse_args([*CUDA, "--n_steps=100"])
    dataset, device = train.load_data(args), torch.device("cuda")
    config = train.complete(args, dataset, device)
    dataset = run.resident(dataset, device)
    trainer = training.Trainer(run.build_model(config, dataset), config, dataset)
    trainer.advance(0, 30)  # warm-up and capture may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.advance(30, 1000)  # several blocks of permutations
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.finite_steps.item() == 1030
