"""The picture of the partition of a plane, and its GIF."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_plot import assert_one_line, assert_readable, assert_written, curves_of
from torch import nn

import data
import models
import plot
from analysis import panels, partition
from records import checkpoints
from records.history import HISTORY_NAME, write_history

SIZES = {"train": 50, "test": 797, "attacked": 20, "in_shape": [1, 8, 8], "num_classes": 10}


def brute_force(model, plane, raster):
    """boundaries() by one forward pass for each point, in plain loops."""
    centre, axes, reach = plane.centre, plane.axes, plane.reach
    found = []
    handles = [module.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten() > 0))
               for module in model.modules() if isinstance(module, nn.ReLU)]
    ticks = torch.linspace(-reach, reach, raster + 1, dtype=torch.float64)
    signs = {}
    for i, v in enumerate(ticks):
        for j, u in enumerate(ticks):
            found.clear()
            with torch.no_grad():
                label = model((centre + u * axes[0] + v * axes[1])[None]).argmax(1)
            signs[i, j] = [*found, label]
    for handle in handles:
        handle.remove()
    masks = np.zeros((len(handles) + 1, raster, raster), dtype=bool)
    for layer, i, j in np.ndindex(masks.shape):
        here, up, right = (signs[place][layer] for place in ((i, j), (i + 1, j), (i, j + 1)))
        masks[layer, i, j] = not (torch.equal(here, up) and torch.equal(here, right))
    return masks[:-1], masks[-1]


def network(name):
    if name == "foreign":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))
    return models.build_model(name, (1, 8, 8), 5, width=6 if name == "mlp" else 2)


@pytest.mark.parametrize("name, tile_numbers", [("mlp", None), ("cnn", 400 * 12), ("foreign", 64 * 20)])
def test_boundaries_equal_a_brute_force_search(name, tile_numbers, monkeypatch):
    if tile_numbers:
        monkeypatch.setattr(partition, "BATCH_NUMBERS", tile_numbers)
    torch.manual_seed(0)
    model = network(name).double().eval()
    plane = partition.plane_through(torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.arange(3))._replace(reach=40.0)
    layers, decision = partition.boundaries(model, plane, raster=11)
    expected_layers, expected_decision = brute_force(model, plane, 11)
    assert expected_layers.any(axis=(1, 2)).sum() >= 2 and not expected_layers.all()
    np.testing.assert_array_equal(layers, expected_layers)
    np.testing.assert_array_equal(decision, expected_decision)


def test_plane_passes_through_the_three_images():
    images = torch.rand(3, 3, 5, 4, dtype=torch.float64)
    plane = partition.plane_through(images, torch.arange(3))
    torch.testing.assert_close(plane.centre + torch.tensordot(plane.places, plane.axes, 1), images)
    torch.testing.assert_close(plane.axes.flatten(1) @ plane.axes.flatten(1).T, torch.eye(2, dtype=torch.float64))


def test_three_images_are_of_three_classes_and_always_the_same():
    dataset = data.load_dataset("digits", seed=1)
    x, y = partition.three_images(dataset)
    assert len(set(y.tolist())) == 3 and x.shape == (3, 1, 8, 8) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(x, partition.three_images(data.load_dataset("digits", seed=2))[0])


def save_checkpoint(path, step=0, metrics=None, **changes):
    config = {"model": "mlp", "dataset": "digits", "data_dir": "data", "train_size": 50, "image_size": None, "seed": 1,
              "label_noise": 0.0, "depth": 3, "width": 8, "activation": "relu", "batch_norm": True, "init_scale": 1.0,
              "dtype": "float32", "n_steps": 900, "log_dir": str(path.parent), **changes}
    torch.manual_seed(step)
    model = models.build_model("mlp", (1, 8, 8), 10, depth=3, width=8, batch_norm=True)
    checkpoints.save_state(path, {"epoch": 0.0, "step": step, "seconds": 0.0, "logged": 1, "config": config,
                                  "sizes": SIZES, "model_state_dict": model.state_dict(),
                                  "optimizer_state_dict": {"state": {}, "param_groups": []}, **(metrics or {})})
    return str(path)


@pytest.fixture
def laid_out(monkeypatch):
    """The figures that are made, at a small size."""
    figures = []
    lay_out = partition.panels.lay_out
    monkeypatch.setattr(partition.panels, "lay_out", lambda fig: figures.append(fig) or lay_out(fig))
    monkeypatch.setattr(partition, "RASTER", 300)
    monkeypatch.setattr(partition, "GIF_RASTER", 300)
    return figures


def test_checkpoints_stand_side_by_side(tmp_path, capsys, laid_out):
    paths = [save_checkpoint(tmp_path / f"{k}.pt", k, n_steps=10 + k, log_points=k) for k in (7, 0, 8, 9)]  # resumed
    assert plot.main(["--partition", *paths]) == 0
    assert_written([tmp_path / "partition.png", tmp_path / "partition.svg"])
    assert str(tmp_path / "partition.png") in capsys.readouterr().out
    (fig,) = laid_out
    assert_readable(fig)
    shown = [ax for ax in fig.axes if ax.get_title().startswith("step")]
    assert [ax.get_title() for ax in shown] == ["step 0", "step 7", "step 8", "step 9"]
    for ax in shown:  # a pixel of the raster is a pixel of the file
        pixels = ax.get_position().bounds * np.tile(fig.bbox.size, 2)
        np.testing.assert_allclose(pixels[2:], ax.images[0].get_array().shape[:2])
        np.testing.assert_allclose(pixels, pixels.round(), atol=1e-6)


def test_gif_has_one_frame_for_each_checkpoint_beside_the_accuracies(tmp_path, laid_out, capsys):
    accuracies = {step: {"train_acc": min(1.0, step / 100), "test_acc": step / 1000, "adv_acc": {"0.1": step / 2000},
                         "robust_acc": {"0.1": step / 4000}} for step in (900, 100, 10, 0)}
    paths = [save_checkpoint(tmp_path / f"{step}.pt", step, metrics) for step, metrics in accuracies.items()]
    paths.append(save_checkpoint(tmp_path / "rolling.pt", 30))  # between log steps
    write_history(tmp_path / HISTORY_NAME, {"version": 1, "step": [0, 10, 20], "seconds": [0.0, 1.0, 2.0], "config": {},
                                            "train_acc": [0.1, 0.99, 1.0], "warnings": [], "sizes": {}})
    out = tmp_path / "partition.gif"
    assert plot.main(["--partition", *paths, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    plane = partition.load_all(paths)[1]
    with Image.open(out) as gif:
        assert gif.n_frames == 5 and gif.info["loop"] == 0
        seen = 0
        for k, step in enumerate((0, 10, 30, 100, 900)):
            gif.seek(k)
            frame = np.array(gif.convert("RGB"))
            path = tmp_path / ("rolling.pt" if step == 30 else f"{step}.pt")
            picture = partition.paint(*partition.boundaries(partition.network_in(path), plane, 300))
            drawn, wanted = (np.abs(image - 255 * np.array(partition.DECISION)).max(axis=2) < 6
                             for image in (frame, 255 * picture))
            assert drawn.sum() >= 0.7 * wanted.sum()
            seen += wanted.sum()
        assert seen > 1000 and gif.info["duration"] == 1000  # the last frame is held
    (fig,) = laid_out
    assert_readable(fig)
    shown, accuracy = fig.axes[:2]
    assert shown.get_title() == "step 900" and [900, 900] in [list(line.get_xdata()) for line in accuracy.lines]
    assert "train 99% at step 10" in [text.get_text() for text in accuracy.texts]
    curves = [[None if np.isnan(y) else y for y in line.get_ydata()] for line in curves_of(accuracy)]
    for name in ("train_acc", "test_acc", "adv_acc", "robust_acc"):
        values = [accuracies[step][name] for step in (0, 10, 100, 900)]
        values = [value["0.1"] if isinstance(value, dict) else value for value in values]
        assert [*values[:2], None, *values[2:]] in curves


def test_bad_checkpoint_gives_one_line(tmp_path, capsys):
    save_checkpoint(tmp_path / "good.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    save_checkpoint(tmp_path / "misfit.pt", depth=4)
    save_checkpoint(tmp_path / "decay.pt", weight_decay=0.5)
    save_checkpoint(tmp_path / "changed.pt", metrics={"derived": {"data": "0" * 16}})
    for names, reason in {"good text": "text.pt", "good missing": "missing.pt", "misfit": "misfit.pt: its weights",
                          "good decay": "--weight_decay", "changed": "--data_dir"}.items():
        for suffix in ("png", "gif"):
            paths = [str(tmp_path / f"{name}.pt") for name in names.split()]
            assert plot.main(["--partition", *paths, "--out", str(tmp_path / f"x.{suffix}")]) == 2
            assert reason in assert_one_line(capsys)
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_shown_in_their_colours(channels):
    x = torch.rand(3, channels, 8, 8, dtype=torch.float64)
    axes = panels.new_figure(3, 1, "").subplots(1, 3)
    partition.draw_images(axes, partition.plane_through(x, torch.arange(3)))
    for ax, image in zip(axes, x, strict=True):
        assert np.array_equal(ax.images[0].get_array().squeeze(), image.permute(1, 2, 0).squeeze())


def test_data_in_another_folder_are_asked_for(tmp_path, capsys, monkeypatch, laid_out):
    random = np.random.default_rng(0)
    arrays = {f"x_{split}": random.integers(256, size=(60, 8, 8), dtype=np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "images.npz", **arrays, y_train=np.arange(60) % 10, y_test=np.arange(60) % 10)
    path = save_checkpoint(tmp_path / "0.pt", dataset="npz", data_dir="images.npz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert plot.main(["--partition", path]) == 2
    assert "--data_dir" in assert_one_line(capsys)
    assert plot.main(["--partition", path, "--data_dir", "../images.npz"]) == 0
