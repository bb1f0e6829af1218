"""The picture of the partition of a plane, and its film."""

import shutil
import subprocess

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

# ---- the plane ------------------------------------------------------------------------------------------------------
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
    with pytest.raises(ValueError, match="line"):
        partition.plane_through(torch.stack([images[0], images[1], (images[0] + images[1]) / 2]), torch.arange(3))


def test_three_images_are_of_three_classes_and_always_the_same():
    dataset = data.load_dataset("digits", seed=1)
    x, y = partition.three_images(dataset)
    assert len(set(y.tolist())) == 3 and x.shape == (3, 1, 8, 8) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(x, partition.three_images(data.load_dataset("digits", seed=2))[0])
    dataset.x_test, dataset.y_test = dataset.x_test[:2], dataset.y_test[:2]
    with pytest.raises(ValueError, match="has 2"):
        partition.three_images(dataset)


def save_checkpoint(path, step=0, sizes=None, metrics=None, **changes):
    config = {"model": "mlp", "dataset": "digits", "data_dir": "data", "train_size": 50, "image_size": None, "seed": 1,
              "label_noise": 0.0, "depth": 3, "width": 8, "activation": "relu", "batch_norm": True, "init_scale": 1.0,
              "dtype": "float32", **changes}
    torch.manual_seed(step)
    model = models.build_model("mlp", (1, 8, 8), 10, depth=3, width=8, batch_norm=True)
    sizes = SIZES if sizes is None else sizes
    checkpoints.save_state(path, {"epoch": 0.0, "step": step, "seconds": 0.0, "logged": 1, "config": config,
                                  "sizes": sizes, "model_state_dict": model.state_dict(),
                                  "optimizer_state_dict": {"state": {}, "param_groups": []},
                                  **(metrics or {})})
    return str(path)


def test_checkpoints_stand_side_by_side(tmp_path, capsys, monkeypatch):
    drawn = []
    save = partition.panels.save
    monkeypatch.setattr(partition.panels, "save", lambda fig, path: drawn.append(fig) or save(fig, path))
    monkeypatch.setattr(partition, "RASTER", 300)
    paths = [save_checkpoint(tmp_path / f"{step}.pt", step) for step in (0, 7, 8, 9)]
    assert plot.main(["--partition", *paths]) == 0
    assert_written([tmp_path / "partition.png", tmp_path / "partition.svg"])
    assert str(tmp_path / "partition.png") in capsys.readouterr().out
    (fig,) = drawn
    assert_readable(fig)
    shown = [ax for ax in fig.axes if ax.get_title().startswith("step")]
    assert [ax.get_title() for ax in shown] == ["step 0", "step 7", "step 8", "step 9"]
    for ax in shown:  # a pixel of the raster is a pixel of the file
        pixels = ax.get_position().bounds * np.tile(fig.bbox.size, 2)
        np.testing.assert_allclose(pixels[2:], ax.images[0].get_array().shape[:2])
        np.testing.assert_allclose(pixels, pixels.round(), atol=1e-6)


STEPS = [0, 10, 100, 900]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """Checkpoints of log steps of one run, the last of them first, and one between log steps."""
    folder = tmp_path_factory.mktemp("run")

    def metrics(step):
        return {"train_acc": min(1.0, step / 100), "test_acc": step / 1000, "adv_acc": {"0.1": step / 2000},
                "robust_acc": {"0.1": step / 4000}}
    paths = [save_checkpoint(folder / f"{step}.pt", step, metrics=metrics(step), n_steps=900) for step in STEPS[::-1]]
    return [*paths, save_checkpoint(folder / "rolling.pt", 30, n_steps=900)]


def test_film_has_one_frame_for_each_checkpoint_in_the_order_of_the_steps(a_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(partition, "FILM_RASTER", 300)
    shown = []
    film_figure = partition.film_figure

    def watched(*arguments):
        fig, show = film_figure(*arguments)
        assert_readable(fig)
        plane, accuracy = fig.axes[:2]

        def shows(picture, step):
            show(picture, step)
            shown.append((step, picture))
            assert plane.get_title() == f"step {step:,}"
            assert [step, step] in [list(line.get_xdata()) for line in accuracy.lines]
        return fig, shows

    monkeypatch.setattr(partition, "film_figure", watched)
    out = tmp_path / "film.gif"
    assert plot.main(["--partition", *a_run, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert [step for step, _ in shown] == [0, 10, 30, 100, 900]
    with Image.open(out) as film:
        assert film.n_frames == len(a_run) and film.info["loop"] == 0
        for k, (_, picture) in enumerate(shown):
            film.seek(k)
            frame = np.array(film.convert("RGB"))
            count = np.all(np.abs(frame - 255 * np.array(partition.DECISION)) < 6, axis=2).sum()
            assert count > 0.7 * np.all(picture == partition.DECISION, axis=2).sum()
        assert film.info["duration"] > 800  # the last frame is held
    assert [path.name for path in tmp_path.iterdir()] == ["film.gif"]


def test_film_shows_the_accuracies_of_the_checkpoints(a_run):
    found, plane = partition.load_all(a_run)
    found.sort(key=lambda checkpoint: checkpoint["step"])
    accuracy = partition.film_figure(found, plane, 100, 2)[0].axes[1]
    drawn = [[None if np.isnan(y) else y for y in line.get_ydata()] for line in curves_of(accuracy)]
    for name in ("train_acc", "test_acc"):
        assert [checkpoint.get(name) for checkpoint in found] in drawn
    for name in ("adv_acc", "robust_acc"):
        assert [checkpoint.get(name, {"0.1": None})["0.1"] for checkpoint in found] in drawn
    assert "train 99% at step 100" in [text.get_text() for text in accuracy.texts]
    late, _ = partition.film_figure(found[-1:], plane, 100, 2)  # fitted, but nobody knows when
    assert not any("99%" in text.get_text() for text in late.axes[1].texts)


def test_mp4_needs_ffmpeg(a_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(partition, "FILM_RASTER", 60)
    arguments = ["--partition", *a_run, "--out", str(tmp_path / "film.mp4")]
    assert plot.main(arguments) == 2
    assert "ffmpeg" in assert_one_line(capsys)
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\necho no such codec >&2\nexit 1\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    assert plot.main(arguments) == 2
    assert "no such codec" in assert_one_line(capsys)
    assert not (tmp_path / "film.mp4").exists()


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
def test_mp4(a_run, tmp_path, monkeypatch):
    monkeypatch.setattr(partition, "FILM_RASTER", 60)
    out = tmp_path / "film.mp4"
    assert plot.main(["--partition", *a_run, "--out", str(out)]) == 0
    done = subprocess.run(["ffmpeg", "-i", out, "-f", "null", "-"], capture_output=True, text=True)
    assert done.returncode == 0 and f"frame={len(a_run) + partition.LAST_FRAMES:5}" in done.stderr


def test_bad_checkpoint_gives_one_line(tmp_path, capsys):
    good = save_checkpoint(tmp_path / "good.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name, changes in {"misfit": {"width": 9}, "other": {"dataset": "mnist"}, "bare": {"sizes": {}},
                          "decay": {"weight_decay": 0.5},
                          "shape": {"sizes": SIZES | {"in_shape": [1, 4, 16]}}}.items():
        save_checkpoint(tmp_path / f"{name}.pt", **changes)
    bad = {"text.pt": "checkpoint", "misfit.pt": "do not fit", "other.pt": "other images", "bare.pt": "in_shape",
           "shape.pt": "another shape", "missing.pt": ""}
    for name, reason in bad.items():
        assert plot.main(["--partition", good, str(tmp_path / name), "--out", str(tmp_path / "x.png")]) == 2
        error = assert_one_line(capsys)
        assert name in error and reason in error
    assert plot.main(["--partition", good, str(tmp_path / "decay.pt"), "--out", str(tmp_path / "film.gif")]) == 2
    assert "--weight_decay" in assert_one_line(capsys)
    changed = save_checkpoint(tmp_path / "changed.pt", metrics={"derived": {"data": "0" * 16}})
    assert plot.main(["--partition", changed]) == 2
    assert "are not those that" in assert_one_line(capsys)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_number_of_channels_are_shown(channels):
    x = torch.rand(3, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    axes = panels.new_figure(3, 1, "").subplots(1, 3)
    partition.draw_images(axes, partition.plane_through(x.double(), torch.arange(3)))
    for ax, image in zip(axes, x, strict=True):
        shown = ax.images[0].get_array()
        assert shown.shape == (8, 8, 3)
        np.testing.assert_allclose(shown.mean(), image[:3 if channels > 2 else channels].mean(), rtol=1e-5)


def test_data_in_another_folder_are_asked_for(tmp_path, capsys, monkeypatch):
    random = np.random.default_rng(0)
    arrays = {f"x_{split}": random.integers(256, size=(60, 8, 8), dtype=np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "images.npz", **arrays, y_train=np.arange(60) % 10, y_test=np.arange(60) % 10)
    path = save_checkpoint(tmp_path / "0.pt", dataset="npz", data_dir="images.npz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(partition, "RASTER", 20)
    assert plot.main(["--partition", path]) == 2
    assert "--data_dir" in assert_one_line(capsys)
    assert plot.main(["--partition", path, "--data_dir", "../images.npz"]) == 0
