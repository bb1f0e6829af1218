"""What only a GPU can show: captured steps give the curves of eager ones, and a resumed run those of a whole one."""

import dataclasses

import pytest
import torch
from conftest import SMALL, by_interval, columns, history_of, run_here

import data
import flags
import train
from compute import device as devices

pytestmark = pytest.mark.cuda
CUDA = [flag for flag in SMALL if not flag.startswith("--device")] + ["--device=cuda", "--deterministic"]
VARIANTS = [["--optimizer=adamw"], ["--optimizer=adam"], ["--optimizer=sgd", "--lr=0.1"], ["--loss=mse"],
            ["--loss=exact_ce"], ["--loss=stablemax"], ["--orthogonal_gradient"],
            ["--batch_norm"], ["--dtype=float64"], ["--model=cnn", "--width=4"],
            ["--lr_schedule=cosine", "--warmup_steps=5"], ["--lr_schedule=cosine", "--dtype=float64"],
            ["--lr_schedule=triangle", "--optimizer=sgd"], ["--label_smoothing=0.1"],
            ["--loss=exact_ce", "--label_smoothing=0.1"],
            ["--model=resnet18", "--width=4", "--batch_norm"]]


@pytest.fixture(autouse=True)
def as_before():
    """What a run sets for its whole process is as it was when the test has ended."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("words", VARIANTS, ids=" ".join)
def test_captured_steps_equal_eager_ones(tmp_path, words, capsys):
    run_here(tmp_path / "graph", *CUDA, *words, "--n_steps=60")
    assert "capture failed" not in capsys.readouterr().out
    run_here(tmp_path / "eager", *CUDA, *words, "--n_steps=60", "--no_cuda_graph")
    assert columns(tmp_path / "graph") == columns(tmp_path / "eager")


def test_the_last_of_several_gpus_trains_as_the_first(tmp_path):
    last = f"--device=cuda:{torch.cuda.device_count() - 1}"
    run_here(tmp_path / "last", *CUDA, last, "--n_steps=60")
    assert torch.cuda.current_device() == torch.cuda.device_count() - 1
    run_here(tmp_path / "first", *CUDA, "--device=cuda:0", "--n_steps=60")
    assert columns(tmp_path / "last") == columns(tmp_path / "first")


def test_a_resumed_run_equals_a_whole_one(tmp_path):
    run_here(tmp_path / "whole", *by_interval(CUDA), "--n_steps=60", "--log_interval=4")
    run_here(tmp_path / "parts", *by_interval(CUDA), "--n_steps=40", "--log_interval=4")
    run_here(tmp_path / "parts", *by_interval(CUDA), "--n_steps=60", "--log_interval=4", "--resume")
    assert columns(tmp_path / "whole") == columns(tmp_path / "parts")


def test_a_checkpoint_moves_between_cpu_and_gpu(tmp_path):
    run_here(tmp_path, *by_interval(SMALL), "--n_steps=40", "--log_interval=4")
    run_here(tmp_path, *by_interval(CUDA), "--n_steps=60", "--log_interval=4", "--resume")
    run_here(tmp_path, *by_interval(SMALL), "--n_steps=80", "--log_interval=4", "--resume")
    history = history_of(tmp_path)
    assert history["step"] == list(range(0, 81, 20)) and history["train_loss"][-1] < history["train_loss"][0]


def test_no_step_waits_for_the_device():
    args, device = flags.parse_args([*CUDA, "--n_steps=100", "--lr_schedule=cosine"]), torch.device("cuda")
    dataset = data.load_dataset(args.dataset)
    config = dataclasses.replace(train.complete(args, dataset, device), augment=True)  # refused for images this small
    dataset = train.resident(dataset, device)
    trainer = train.Trainer(train.build_model(config, dataset), config, dataset, pytest.fail)
    trainer.advance(0, 30)  # warm-up and capture may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.advance(30, 1000)  # several blocks of permutations
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.finite_steps.item() == 1030


def test_a_gpu_that_works_is_chosen_and_described():
    device = devices.choose_device("auto")
    assert device.type == "cuda" and devices.problem_with(device) == ""
    assert devices.describe(device)["device"] == torch.cuda.get_device_name()
    with pytest.raises(ValueError, match="--device=cuda:99: .*invalid device ordinal"):
        devices.choose_device("cuda:99")
