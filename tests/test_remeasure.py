"""remeasure.py: a run's checkpoints, and any network, measured again."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, SMALL, columns, history_of, run_here
from torch import nn

import attacks
import data
import models
import plot
import remeasure
from records.history import read_history, write_history

OWN = ["--threads=1", "--device=cpu"]
NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

def pair():
    network = build()
    network.forward = lambda x: (nn.Sequential.forward(network, x), 1)
    return network

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def larger():
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 32), nn.ReLU(), nn.Linear(32, 10))

def more():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1000))

def softmax():
    return nn.Sequential(build(), nn.Softmax(1))

def fewer():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_here(folder, *SMALL, "--n_steps=300")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run, in the current folder's place."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def measured(folder, *flags, status=0):
    """Run remeasure.py in this process; return its history."""
    made = folder.parent / "remeasured"
    assert remeasure.main([str(folder), f"--log_dir={made}", *OWN, *flags]) == status
    return read_history(made / "training_history.json")


@pytest.mark.parametrize("history_at_hand", [True, False])
def test_own_flags_give_the_runs_own_columns(run, trained, history_at_hand):
    if not history_at_hand:
        shutil.rmtree(run / "logs")
    measured(run)
    (run.parent / "remeasured").rename(run.parent / "logs")
    assert columns(run.parent) == columns(trained)


def last_checkpoint(run):
    (path,) = (run / "checkpoints").glob("*_step_000000300.pt")
    return path


def test_other_flags_are_measured_on_the_checkpoints_networks(run):
    again = measured(run, "--epsilons", "0.05", "0.2", "--adv_size=all", "--lc_radius", "0.01", "--pgd_steps=3")
    dataset = data.load_dataset("digits")
    x, y = data.pixels(dataset.x_test, torch.float32), dataset.y_test
    network = models.load_network(torch.load(last_checkpoint(run), weights_only=True)).eval()
    expected = attacks.robust_accuracy(network, x, y, [0.05, 0.2], steps=3, budget="low")
    assert [again["robust_acc"][key][-1] for key in ("0.05", "0.2")] == expected
    assert again["test_acc"][-1] == (network(x).argmax(1) == y).double().mean().item()
    assert list(again["local_complexity"]["train"]) == ["0.01"] and again["config"]["adv_size"] == len(y)
    assert {"epsilons", "adv_size", "lc_radius"} <= set(again["asked"])
    assert again["seconds"] == history_of(run)["seconds"]


def test_what_the_checkpoint_knows_is_not_measured_again(run):
    path = last_checkpoint(run)
    torch.save({**torch.load(path, weights_only=True), "train_loss": 0.125, "test_acc": 0.25}, path)
    again = measured(run, "--steps=300", "--pgd_steps=1")
    assert (again["train_loss"], again["test_acc"]) == ([0.125], [0.25])
    assert again["outcomes"]["test"] == history_of(run)["outcomes"]["test"][-1:]


@pytest.mark.parametrize("flags, positions", [(["--every=2"], [1, 3, 5]), (["--steps=300,0,1", "--every=2"], [0, 5])])
def test_chosen_checkpoints(run, flags, positions):
    steps = history_of(run)["step"]
    assert measured(run, *flags, "--lc_samples=0")["step"] == [steps[k] for k in positions]


def test_renamed_checkpoints_say_themselves_what_they_are(run):
    picked = run.parent / "picked"
    picked.mkdir()
    for k, path in enumerate(sorted((run / "checkpoints").glob("*.pt"))[:3]):
        shutil.copy(path, picked / f"{9 - k}.pt")
    made = measured(picked)
    assert made["step"] == history_of(run)["step"][:3] and made["test_acc"] == history_of(run)["test_acc"][:3]


def test_interpolation_is_the_runs_own(run):
    path = run / "logs" / "training_history.json"
    own = {**history_of(run), "train_acc": [0.1, 0.5, 0.98, 0.99, 1, 1]}
    write_history(path, own)
    assert measured(run, "--steps=0,300")["interpolation"] == own["step"][3]
    write_history(path, {**own, "train_acc": [0.1] * 6})
    assert measured(run, "--steps=300")["interpolation"] is None


def test_continued_and_moved_aside(run, capsys):
    measured(run, "--steps=0,300")
    capsys.readouterr()
    every = measured(run)
    assert "6 checkpoints, 2 of them measured already" in capsys.readouterr().out
    assert every["step"] == history_of(run)["step"]
    other = measured(run, "--steps=300", "--epsilons=0.3")
    assert list(other["adv_acc"]) == ["0.3"] and "are now in" in capsys.readouterr().out
    (aside,) = (run.parent / "remeasured").glob("earlier-*")
    assert read_history(aside / "training_history.json") == every


def test_measurements_by_another_attack_are_not_continued(run, capsys, monkeypatch):
    measured(run, "--steps=0")
    monkeypatch.setattr(attacks, "ROBUST_VERSION", attacks.ROBUST_VERSION + 1)
    assert measured(run, "--steps=300")["step"] == [300]
    assert "with other flags or by an earlier version are now in" in capsys.readouterr().out


def test_log_steps_that_are_not_finite(tmp_path):
    run_here(tmp_path / "run", *SMALL, "--n_steps=20", "--lr=1e30", "--optimizer=sgd", "--on_nan=continue")
    first = measured(tmp_path / "run")
    assert first["train_loss"][-1] is None
    assert measured(tmp_path / "run") == first  # the table is printed from what was taken over


def test_the_same_flags_of_another_run_are_not_continued_and_checkpoints_beside_them_stay(run, capsys):
    path, names = last_checkpoint(run), sorted((run / "checkpoints").glob("*.pt"))
    for seconds in (5.0, 1e6):
        torch.save({**torch.load(path, weights_only=True), "seconds": seconds}, path)
        assert remeasure.main([str(run), f"--log_dir={path.parent}", "--steps=300", *OWN]) == 0
        assert read_history(path.parent / "training_history.json")["seconds"] == [seconds]
    assert "measurements of another run, with other flags or by an earlier version" in capsys.readouterr().out
    assert sorted((run / "checkpoints").glob("*.pt")) == names


def test_other_log_steps_of_another_run_are_not_added(run, tmp_path, capsys):
    run_here(tmp_path / "other", *SMALL, "--n_steps=200")
    measured(run, "--steps=0")
    assert measured(tmp_path / "other", "--steps=200")["step"] == [200]
    assert "measurements of another run" in capsys.readouterr().out


def test_without_its_history_interpolation_is_known_only_from_all_checkpoints(tmp_path):
    run_here(tmp_path / "run", *SMALL, "--n_steps=20")
    shutil.rmtree(tmp_path / "run" / "logs")
    assert measured(tmp_path / "run", "--steps=0,20")["interpolation"] is None
    assert "interpolation" not in measured(tmp_path / "run")  # found in the rows


def test_ctrl_c_keeps_what_is_done(run, monkeypatch, capsys):
    lengths = []

    def write_and_interrupt(path, made):
        write_history(path, made)
        lengths.append(len(made["step"]))
        if len(lengths) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(remeasure.history, "write_history", write_and_interrupt)
    assert len(measured(run, status=130)["step"]) == 2
    assert "stopped by SIGINT; continue with the same command" in capsys.readouterr().out
    assert measured(run)["step"] == history_of(run)["step"] and "2 of them measured already" in capsys.readouterr().out


def test_damaged_and_foreign_checkpoints_are_named(run, tmp_path, capsys):
    run_here(tmp_path / "other", *SMALL, "--n_steps=3", "--seed=5")
    (foreign,) = (tmp_path / "other" / "checkpoints").glob("*_step_000000002.pt")
    (run / "checkpoints" / "checkpoint_epoch_0000000_step_000000000.pt").write_bytes(b"")
    shutil.copy(foreign, run / "checkpoints")
    made = measured(run, status=1)
    printed = capsys.readouterr().out
    assert made["step"] == history_of(run)["step"][1:]
    assert "step_000000000.pt is damaged or not a checkpoint of this program; passed over" in printed
    assert "step_000000002.pt is of another run: --seed was 5, is 42; passed over" in printed


@pytest.mark.parametrize("words, message", [
    ([], "name checkpoints or their folder, or one --network"),
    (["nowhere"], "nowhere is neither a checkpoint nor a folder with checkpoints in it"),
    (["empty"], "empty is neither a checkpoint nor a folder with checkpoints in it"),
    (["run", "--dataset=digits"], "--dataset is for --network"),
    (["run", "--weights=w.pt"], "--weights is for --network"),
    (["run", "--epsilon=0.1"], "did you mean --epsilons?"),
    (["run", "--steps=5"], "--steps: there is no checkpoint of step 5"),
    (["run", "--log_dir=run/logs"], "--log_dir=run/logs holds the run's own history"),
    (["run", "run/copy.pt"], "are of the same step: give the checkpoints of one run"),
    (["run/damaged.pt"], "run/damaged.pt is damaged or not a checkpoint"),
    (["run/other.pt"], "the images or labels in data are not those that the run was trained on"),
])
def test_wrong_input_gets_one_line(run, words, message, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    (run.parent / "empty").mkdir()
    last = last_checkpoint(run)
    state = torch.load(last, weights_only=True)
    torch.save({**state, "seconds": 1e6}, "run/copy.pt")
    (run / "damaged.pt").write_bytes(last.read_bytes()[:1000])
    torch.save({**state, "derived": {**state["derived"], "data": "0" * 16}}, "run/other.pt")
    assert exit_status(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("remeasure.py: error: ")
    assert not (run.parent / "remeasured").exists()


def exit_status(words):
    try:
        return remeasure.main([*words])
    except SystemExit as end:
        return end.code


# ---- networks of others ---------------------------------------------------------------------------------------------

@pytest.fixture
def network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    torch.manual_seed(1)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    torch.save({"state_dict": other.state_dict()}, "net.pt")
    torch.save({"model": other.state_dict(), "args": argparse.Namespace(lr=1)}, "args.pt")
    torch.save({0: torch.ones(1)}, "integers.pt")
    torch.save({**other.state_dict(), "1.weight": torch.ones(16, 64)}, "narrow.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    return other


FLAGS = ["--network=net.py:build", "--dataset=digits", "--adv_size=60", "--lc_samples=16", "--epsilons", "0.05", "0.1",
         "--threads=1", "--device=cpu"]


def test_a_network_of_others_is_measured(network, capsys):
    assert remeasure.main([*FLAGS, "--weights=net.pt"]) == 0
    printed = capsys.readouterr().out
    dataset = data.load_dataset("digits")
    x, y = data.pixels(dataset.x_test, torch.float32), dataset.y_test
    accuracy = (network(x).argmax(1) == y).double().mean().item()
    assert re.search(rf"step +loss +train +test +0\.05 +0\.1 .*\n +0 +\S+ +\S+ +{100 * accuracy:.1f} ", printed)
    assert re.search(r"^2 +\d+\.\d\d +\d+\.\d\d +\d+\.\d\d +of 32 units$", printed, re.M)


@pytest.mark.parametrize("words, message", [
    (["--network=net.py:pair"], "the model must return logits, one tensor (N, 2 or more classes), not tuple"),
    (["--network=net.py:fewer"], "labels must lie between 0 and 2, the model's last class"),
    (["--network=net.py:larger"], "cannot be measured on images of shape (3, 1, 8, 8): mat1 and mat2 shapes"),
    (["--network=net.py:more"], "the network has 1000 classes, the data set 10"),
    (["--network=net.py:softmax"], "the model returns probabilities"),
    (["--network=net.py:nothing"], "AttributeError: module 'net' has no attribute 'nothing'"),
    (["--network=net.py"], "--network=net.py: give FILE.py:FUNCTION"),
    (["--every=2"], "--every is for checkpoints of train.py, not for --network"),
    (["--certify=5"], "--certify is for checkpoints"),
    (["--weights=args.pt"], "args.pt is not a state dict, or holds objects other than tensors"),
    (["--weights=missing.pt"], "No such file or directory: 'missing.pt'"),
    (["--weights=integers.pt"], "Missing key(s) in state_dict: \"1.weight\", \"1.bias\""),
    (["--weights=narrow.pt"], "size mismatch for 1.weight"),
    (["--weights=damaged.safetensors"], "damaged.safetensors is damaged or not a state dict"),
])
def test_a_network_that_does_not_fit_gets_one_line(network, words, message, capsys):
    assert exit_status([*FLAGS, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("saved", [
    None, lambda state: {"epoch": 3, "net": state},
    lambda state: {f"module._orig_mod.{key}": state[key] for key in state},
    lambda state: {"state_dict": {f"model.{key}": state[key] for key in state}},
    lambda state: {"args": {"lr": 1}, "model": state, "model_ema": {**state, "n_averaged": torch.tensor(3)}}])
def test_weights_as_they_are_saved(network, saved, capsys):
    if saved is None:
        pytest.importorskip("safetensors.torch").save_file(network.state_dict(), "saved.safetensors")
    else:
        torch.save(saved(network.state_dict()), "saved.pt")
    (file,) = Path().glob("saved.*")
    for weights in ("net.pt", file):
        assert remeasure.main([*FLAGS, f"--weights={weights}"]) == 0
    printed = capsys.readouterr().out
    assert printed[:len(printed) // 2] == printed[len(printed) // 2:]


OTHERS = """
import argparse, sys
from models.blocks import Net  # the names of this program's modules and folders
from data import SIZE
from analysis.kinds import LSTM, Reentrant, torch, nn

assert argparse.ArgumentParser().parse_args() and len(sys.argv) == 1
network = Net(SIZE)
lazy = lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(10))
scripted = lambda: torch.jit.script(Net(SIZE))
"""
BLOCKS = """
from torch import nn
from .size import SIZE

def Net(n=SIZE):
    return nn.Sequential(nn.Flatten(), nn.Linear(n, 16), nn.ReLU(), nn.Linear(16, 10))
"""
KINDS = """
import torch
import torch.utils.checkpoint
from torch import nn

class Reentrant(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=True)

class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.lstm(x[:, 0])[0][:, -1])
"""


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of torch.jit and of checkpointing
@pytest.mark.parametrize("name", ["network", "Net", "lazy", "scripted", "LSTM", "Reentrant"])
def test_networks_as_researchers_have_them(tmp_path, monkeypatch, name, capsys):
    theirs = tmp_path / "theirs"
    for file, text in {"main.py": OTHERS, "analysis/kinds.py": KINDS, "data.py": "SIZE = 8 * 8",
                       "models/__init__.py": "", "models/size.py": "SIZE = 64", "models/blocks.py": BLOCKS}.items():
        (theirs / file).parent.mkdir(parents=True, exist_ok=True)
        (theirs / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    flags = [f"--network=theirs/{'models/blocks' if name == 'Net' else 'main'}.py:{name}", *FLAGS[1:], "--log_dir=made"]
    assert remeasure.main(flags) == 0 and remeasure.main(flags) == 0
    printed, seen = capsys.readouterr().out, name in ("network", "Net", "lazy", "Reentrant")
    assert ("local complexity, r" in printed) == seen
    assert ("note: local complexity is not measured" in printed) != seen
    assert sys.modules["models"] is models and sys.modules["data"] is data
    assert "an earlier measurement is now in" in printed
    assert plot.main(["--table", "made/training_history.json"]) == 0
    accuracy = f"{100 * read_history('made/training_history.json')['test_acc'][0]:.1f}%"
    assert accuracy in capsys.readouterr().out


def test_a_pickle_is_never_run(network, capsys):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, ("was_run",)

    torch.save({"1.weight": Harmful()}, "harmful.pt")
    assert exit_status([*FLAGS, "--weights=harmful.pt"]) == 2
    assert not os.path.exists("was_run")


def test_the_example_of_the_library_runs_beside_other_modules_of_the_same_names(tmp_path):
    text = (ROOT / "docs" / "remeasuring.md").read_text()
    (example,) = re.findall(r"## As a library\n.*?```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "data.py").write_text("import models")
    (tmp_path / "models.py").write_text("own = 5")
    (tmp_path / "script.py").write_text(example.replace("/path/to/this/repository", str(ROOT)) + """
assert models.own == data.models.own == 5
assert adversarial.shape == x.shape and (adversarial - x).abs().max() <= 8 / 255 + 1e-6
assert len(robust) == 2 and counts.dtype == torch.int64 and len(counts) == 8 and len(proved) == 2
""")
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, check=True)
