"""Checkpoints: what is kept, what is refused, what a resumed run continues from and what it loads."""

import copy
import dataclasses
import math
import os

import pytest
import torch

import models
from flags import Config
from records import checkpoints
from records.history import HISTORY_NAME, append, write_history

SIZES = {"train": 60, "test": 797, "attacked": 797, "num_classes": 10, "in_shape": [1, 8, 8]}


def config_of(folder, **flags):
    return dataclasses.replace(Config(), **{
        "n_steps": 100, "lr": 0.1, "width": 2, "depth": 1, "log_dir": str(folder / "logs"),
        "save_dir": str(folder / "checkpoints"), **flags})


def row(step):
    return {"epoch": step / 2, "step": step, "train_loss": 0.5, "train_acc": 0.25, "test_loss": 0.5, "test_acc": 0.25,
            "adv_acc": {"0.1": 0.5}, "robust_acc": {"0.1": 0.5}, "local_complexity": {}, "weight_norm": 3.0,
            "seconds": 1.0 + step}


def make_state(step, logged=0, weight=1.0, config=None, **more):
    return {"epoch": step / 2, "step": step, "seconds": 1.0 + step, "logged": logged, "config": config or {},
            "sizes": dict(SIZES), "derived": {"data": "0123", "threads": 1},
            "model_state_dict": {"weight": torch.full((2, 2), weight)}, "optimizer_state_dict": {"state": {}}, **more}


def save_rolling(folder, state):
    return checkpoints.save_state(folder / checkpoints.ROLLING_NAME, state)


def refuse(line):
    pytest.fail(f"unexpected note: {line}")


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text


# ---- the files ------------------------------------------------------------------------------------------------------

def test_what_is_not_a_checkpoint_is_refused_in_one_line_and_passed_over(tmp_path):
    path = checkpoints.save_checkpoint(tmp_path, make_state(5))
    for content in ({"epoch": 5, "model_state_dict": {}}, make_state(5, config={"step": os.path.join})):
        torch.save(content, path)
        notes = []
        assert checkpoints.newest_checkpoint(tmp_path, notes.append) == (None, None)
        assert notes == [f"{path} is damaged or not a checkpoint of this program; passed over"]
    for name, said in (("none", "No such file"), (".", "Is a directory")):
        with pytest.raises(ValueError, match=f"cannot be read: .*{said}") as error:
            checkpoints.load_checkpoint(tmp_path / name)
        one_line(error)


@pytest.mark.parametrize("rolling", [False, True])
def test_weights_that_are_not_finite_are_passed_over_unless_asked_for(tmp_path, rolling):
    good = checkpoints.save_checkpoint(tmp_path, make_state(5))
    state = make_state(9)
    state["model_state_dict"] |= {"counts": torch.tensor(3), "last": torch.tensor([1.0, -math.inf])}
    newest = save_rolling(tmp_path, state) if rolling else checkpoints.save_checkpoint(tmp_path, state)
    notes = []
    found, path = checkpoints.newest_checkpoint(tmp_path, notes.append)
    assert (found["step"], path) == (5, good) and notes == [f"{newest}: its weights are not finite; passed over"]
    found, path = checkpoints.newest_checkpoint(tmp_path, refuse, finite=False)
    assert (found["step"], path) == (9, newest)


def test_the_newest_checkpoint_before_a_step(tmp_path):
    for step in (0, 5, 9):
        checkpoints.save_checkpoint(tmp_path, make_state(step))
    save_rolling(tmp_path, make_state(12))
    expected = {0: None, 1: 0, 9: 5, 10: 9, 12: 9, 13: 12}
    for before, step in expected.items():
        state, _ = checkpoints.newest_checkpoint(tmp_path, refuse, before=before)
        assert (state and state["step"]) == step


# ---- continuing -----------------------------------------------------------------------------------------------------

def run_on_disk(folder, step=5, logged=3, steps=(0, 1, 5), rolling=False, weight=1.0, **flags):
    """Write a run's history and its newest checkpoint, with these flags in both."""
    for name in ("logs", "checkpoints"):
        (folder / name).mkdir(exist_ok=True)
    config = dataclasses.asdict(config_of(folder, **flags))
    history = {"version": 1, "step": [], "config": config, "sizes": dict(SIZES), "derived": {"data": "0123"},
               "environment": {}, "warnings": []}
    for log_step in steps:
        append(history, row(log_step))
    write_history(folder / "logs" / HISTORY_NAME, history)
    if rolling:
        return save_rolling(folder / "checkpoints", make_state(step, logged, weight, config))
    state = {**make_state(step, logged, weight, config), **row(step)}
    return checkpoints.save_checkpoint(folder / "checkpoints", state)


def continued(folder, note=lambda line: None, data="0123", **flags):
    return checkpoints.continue_from(config_of(folder, **flags), data, note)


def refused(folder, said, **options):
    with pytest.raises(ValueError, match=said) as error:
        continued(folder, **options)
    return one_line(error)


def edit_history(folder, **edits):
    path = folder / "logs" / HISTORY_NAME
    history = checkpoints.read_history(path)
    for name, value in edits.items():
        history[name] = value if not isinstance(value, dict) else {**history[name], **value}
    write_history(path, history)


def test_with_nothing_to_resume_a_run_starts(tmp_path):
    notes = []
    assert continued(tmp_path, notes.append) is None
    assert notes == [f"nothing to resume in {tmp_path / 'checkpoints'}: starting"]


@pytest.mark.parametrize("rolling", [False, True])
def test_a_run_continues_from_its_newest_checkpoint_with_the_history_cut(tmp_path, rolling):
    notes = []
    path = run_on_disk(tmp_path, step=3 if rolling else 1, logged=2, rolling=rolling)
    found = continued(tmp_path, notes.append)
    assert found["path"] == path and found["step"] in (1, 3) and found["history"]["step"] == [0, 1]
    assert notes == [f"continuing from {path} at step {found['step']}"]


def test_checkpoints_of_which_none_can_be_read_are_not_passed_over_in_silence(tmp_path):
    paths = [run_on_disk(tmp_path, step=step) for step in (1, 2, 3, 4)]
    for path in paths:
        path.write_bytes(b"damaged")
    refused(tmp_path, "none of the checkpoints in .* can be used")
    assert all(path.exists() for path in paths)
    sound = run_on_disk(tmp_path, step=1, logged=2)
    assert continued(tmp_path)["path"] == sound  # one sound checkpoint will do


@pytest.mark.parametrize("edits, said", [
    ({"config": {"lr": 0.3}}, "--lr was 0.3, is 0.1"), ({"derived": {"data": "4567"}}, "fingerprint 4567, now 0123")])
def test_the_history_is_compared_with_the_flags_and_the_data_too(tmp_path, edits, said):
    run_on_disk(tmp_path)
    edit_history(tmp_path, **edits)
    assert HISTORY_NAME in refused(tmp_path, said)


def test_where_and_how_a_run_is_computed_may_change_and_a_flag_that_is_missing_had_its_default(tmp_path):
    path = run_on_disk(tmp_path, data_dir="elsewhere", checkpoint_minutes=1.0)
    state = torch.load(path)
    for name in ("momentum", "pgd_start", "log_from", "compile"):
        del state["config"][name]
    checkpoints.save_state(path, state)
    changed = {"quiet": True, "plot": False, "keep_checkpoints": "last", "threads": 2, "compile": "on", "n_steps": 200}
    assert continued(tmp_path, **changed)["step"] == 5
    refused(tmp_path, "--pgd_start was random, is image", pgd_start="image")


@pytest.mark.parametrize("steps, logged, said", [
    ((0, 1), 3, "is older than .*: its log points are missing"), ((0, 1, 6), 3, "are not of one run"),
    ((0, 1, 4), 3, "are not of one run")])
def test_a_history_and_a_checkpoint_that_do_not_go_together_are_refused(tmp_path, steps, logged, said):
    path = run_on_disk(tmp_path, steps=steps, logged=logged)
    assert str(path) in refused(tmp_path, said)


def test_a_history_with_other_values_or_none_is_refused(tmp_path):
    run_on_disk(tmp_path)
    edit_history(tmp_path, seconds=[1.0, 2.0, 6.5])
    refused(tmp_path, "are not of one run: .* after 6.5 s")
    (tmp_path / "logs" / HISTORY_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="no history at"):
        continued(tmp_path)


# ---- loading the state ----------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2, bias=False), torch.nn.BatchNorm2d(3), torch.nn.Flatten(),
                               torch.nn.Linear(27, 4)).to(dtype)


def train(model, optimizer, steps):
    for step in steps:
        images = torch.rand(5, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images.to(next(model.parameters()))).square().mean().backward()
        optimizer.step()


def trained(kind, steps=2, dtype=torch.float32, memory_format=torch.contiguous_format):
    model = network(dtype).to(memory_format=memory_format)
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, range(steps))
    return model, optimizer


def checkpoint_of(model, optimizer, step=2):
    return {"step": step, "model_state_dict": copy.deepcopy(model.state_dict()),
            "optimizer_state_dict": copy.deepcopy(optimizer.state_dict())}


def load(model, optimizer, checkpoint):
    models.load_weights(model, checkpoint, "5.pt")
    assert checkpoints.load_optimizer_state(optimizer, checkpoint)


def assert_same(model, other):
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_state_goes_on_as_if_it_had_not_been_saved(kind, dtype):
    model, optimizer = trained(kind, dtype=dtype)
    checkpoint = checkpoint_of(model, optimizer)
    train(model, optimizer, range(2, 5))
    again, its_optimizer = trained(kind, 0, dtype)
    load(again, its_optimizer, checkpoint)
    train(again, its_optimizer, range(2, 5))
    assert_same(again, model)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
@pytest.mark.parametrize("formats", [(torch.contiguous_format, torch.channels_last),
                                     (torch.channels_last, torch.contiguous_format)])
def test_the_moments_take_on_the_memory_layout_of_this_runs_weights(kind, formats):
    """Fused optimizers read weights and moments as if they had the same layout."""
    model, optimizer = trained(kind, memory_format=formats[0])
    again, its_optimizer = trained(kind, 0, memory_format=formats[1])
    load(again, its_optimizer, checkpoint_of(model, optimizer))
    for parameter, state in its_optimizer.state.items():
        assert all(value.stride() == parameter.stride() for value in state.values() if value.ndim)
    train(model, optimizer, [2])
    train(again, its_optimizer, [2])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value)


def test_the_settings_of_the_parameter_groups_stay_this_runs():
    again = network()
    its_optimizer = torch.optim.Adam(again.parameters(), lr=0.5, weight_decay=0.25)
    load(again, its_optimizer, checkpoint_of(*trained("adam")))
    (group,) = its_optimizer.param_groups
    assert group["lr"] == 0.5 and group["weight_decay"] == 0.25 and not group["fused"]


@pytest.mark.parametrize("before, now", [("adam", "sgd"), ("momentum", "adam"), ("sgd", "adam"), ("adam", "momentum")])
def test_the_state_of_another_optimizer_or_precision_is_not_loaded(before, now):
    for kind, dtype in ((now, torch.float32), (before, torch.float64)):
        optimizer = trained(kind, 0, dtype)[1]
        if (before, dtype) != ("sgd", torch.float64):  # which has no state
            assert not checkpoints.load_optimizer_state(optimizer, checkpoint_of(*trained(before)))
        assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_before_the_first_step_there_is_no_state_yet(kind):
    model, optimizer = trained(kind, 0)
    again = trained(kind, 1)
    load(*again, checkpoint_of(model, optimizer, step=0))
    assert_same(again[0], model)
    assert not again[1].state_dict()["state"]


@pytest.mark.parametrize("edit", [
    lambda weights: weights.pop("3.bias"), lambda weights: weights.update(extra=torch.ones(2)),
    lambda weights: weights.update({"3.weight": weights["3.weight"].T}),
    lambda weights: weights.update({"3.weight": 5})])
def test_weights_that_do_not_fit_are_refused(edit):
    checkpoint = checkpoint_of(*trained("adam"))
    edit(checkpoint["model_state_dict"])
    with pytest.raises(ValueError, match="^5.pt: its weights do not fit the network") as error:
        models.load_weights(network(), checkpoint, "5.pt")
    one_line(error)
