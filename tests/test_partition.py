"""The picture of the partition of a plane, and its film."""

import os
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
from runtime import checkpoints

# ---- the plane ------------------------------------------------------------------------------------------------------

def brute_force(model, centre, axes, reach, raster):
    """boundaries() by one forward pass a point, in plain loops."""
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
    if name == "foreign":  # it has no encode and decode
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))
    return models.build_model(name, (1, 8, 8), 5, width=6 if name == "mlp" else 2)


@pytest.mark.parametrize("name, tile_numbers", [("mlp", None), ("mlp", 64 * 20), ("cnn", 400 * 12), ("resnet18", None),
                                                ("foreign", 64 * 20)])
def test_boundaries_equal_a_brute_force_search(name, tile_numbers, monkeypatch):
    if tile_numbers:
        monkeypatch.setattr(partition, "BATCH_NUMBERS", tile_numbers)
    torch.manual_seed(0)
    model = network(name).double().eval()
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    centre, axes, _ = partition.plane_through(images)
    layers, decision = partition.boundaries(model, centre, axes, 40.0, raster=11)
    expected_layers, expected_decision = brute_force(model, centre, axes, 40.0, 11)
    assert expected_layers.any(axis=(1, 2)).sum() >= 2 and not expected_layers.all()
    np.testing.assert_array_equal(layers, expected_layers)
    np.testing.assert_array_equal(decision, expected_decision)


def test_plane_passes_through_the_three_images():
    images = torch.rand(3, 3, 5, 4, dtype=torch.float64)
    centre, axes, places = partition.plane_through(images)
    torch.testing.assert_close(centre + torch.tensordot(places, axes, 1), images)
    torch.testing.assert_close(axes.flatten(1) @ axes.flatten(1).T, torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="line"):
        partition.plane_through(torch.stack([images[0], images[1], (images[0] + images[1]) / 2]))


def test_three_images_are_of_three_classes_and_always_the_same():
    x, y = partition.three_images(data.load_dataset("digits", seed=1))
    again, _ = partition.three_images(data.load_dataset("digits", seed=2))
    assert len(set(y.tolist())) == 3 and x.shape == (3, 1, 8, 8) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(x, again)


# ---- pictures -------------------------------------------------------------------------------------------------------

def save_checkpoint(path, step=0, in_shape=(1, 8, 8), sizes=None, metrics=None, **changes):
    config = {"model": "mlp", "dataset": "digits", "data_dir": "data", "train_size": 50, "image_size": None, "seed": 1,
              "label_noise": 0.0, "depth": 3, "width": 8, "activation": "relu", "batch_norm": True, "init_scale": 1.0,
              "dtype": "float32", **changes}
    torch.manual_seed(step)
    model = models.build_model("mlp", in_shape, 10, depth=config["depth"], width=8, batch_norm=True)
    sizes = {"train": 50, "in_shape": list(in_shape), "num_classes": 10} if sizes is None else sizes
    checkpoints.save_state(path, {"epoch": 0.0, "step": step, "seconds": 0.0, "logged": 1, "config": config, "sizes": sizes,
                             "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, **(metrics or {})})
    return str(path)


def test_command_draws_beside_the_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(partition, "RASTER", 60)
    assert plot.main(["--partition", save_checkpoint(tmp_path / "0.pt")]) == 0
    assert_written([tmp_path / "partition.png", tmp_path / "partition.svg"])
    assert str(tmp_path / "partition.png") in capsys.readouterr().out


def test_two_checkpoints_stand_side_by_side(tmp_path):
    fig = partition.figure([save_checkpoint(tmp_path / f"{step}.pt", step) for step in (0, 7)])
    assert_readable(fig)
    shown = [ax for ax in fig.axes if ax.get_title().startswith("step")]
    assert [ax.get_title() for ax in shown] == ["step 0", "step 7"]
    for ax in shown:  # a pixel of the raster is a pixel of the file
        pixels = ax.get_position().bounds * np.tile(fig.get_size_inches(), 2) * panels.DPI
        np.testing.assert_allclose(pixels[2:], ax.images[0].get_array().shape[:2])
        np.testing.assert_allclose(pixels, pixels.round(), atol=1e-6)
        assert min(ax.images[0].get_array().shape[:2]) >= 512


@pytest.mark.parametrize("depth", [2, 4, 5, 7])
def test_the_legend_lies_below_the_panels(tmp_path, monkeypatch, depth):
    monkeypatch.setattr(partition, "RASTER", 60)
    fig = partition.figure([save_checkpoint(tmp_path / "0.pt", depth=depth)])
    fig.canvas.draw()
    legend = fig.legends[0].get_window_extent()
    assert legend.y1 <= min(ax.get_window_extent().y0 for ax in fig.axes if ax.get_title().startswith("step"))
    assert legend.y0 >= 0


# ---- films ----------------------------------------------------------------------------------------------------------

def a_run(folder, steps):
    """Checkpoints of log steps of one run, the last of them first, and one between log steps."""
    def metrics(step):
        return {"train_acc": min(1.0, step / 100), "test_acc": step / 1000, "adv_acc": {"0.1": step / 2000},
                "robust_acc": {"0.1": step / 4000}}
    paths = [save_checkpoint(folder / f"{step}.pt", step, metrics=metrics(step), n_steps=900) for step in steps[::-1]]
    return [*paths, save_checkpoint(folder / "rolling.pt", 30, n_steps=900)]


STEPS = [0, 10, 100, 900]


def test_film_has_one_frame_a_checkpoint_in_the_order_of_the_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(partition, "FILM_RASTER", 60)
    shown = []
    film_figure = partition.film_figure

    def watched(*arguments):
        fig, show = film_figure(*arguments)
        return fig, lambda picture, step: (shown.append((step, picture)), show(picture, step))[1]

    monkeypatch.setattr(partition, "film_figure", watched)
    paths = a_run(tmp_path, STEPS)
    out = tmp_path / "film.gif"
    assert plot.main(["--partition", *paths, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert [step for step, _ in shown] == [0, 10, 30, 100, 900]
    with Image.open(out) as film:
        assert film.n_frames == len(paths) and film.info["loop"] == 0
        for k, (_, picture) in enumerate(shown):
            film.seek(k)
            frame = np.array(film.convert("RGB"))
            for colour in (partition.DECISION, *partition.layer_colours(2)):  # in the legend, and in the picture
                count = np.all(np.abs(frame - 255 * np.array(colour)) < 2, axis=2).sum()
                assert count > 0.7 * np.all(picture == colour, axis=2).sum()
            assert tuple(frame[2, 2]) == (255, 255, 255)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".pt") == ["film.gif"]


def test_film_shows_the_accuracies_of_the_checkpoints_and_where_it_is(tmp_path):
    checkpoints, dataset = partition.load_all(sorted(a_run(tmp_path, STEPS), key=lambda path: os.path.getsize(path)))
    checkpoints.sort(key=lambda checkpoint: checkpoint["step"])
    fig, show = partition.film_figure(checkpoints, partition.plane_of(dataset), 100, 2)
    frames = [show(np.ones((100, 100, 3)), step) for step in (0, 100, 900)]
    assert_readable(fig)
    plane, accuracy = fig.axes[:2]
    drawn = [[None if np.isnan(y) else y for y in line.get_ydata()] for line in curves_of(accuracy)]
    for name in ("train_acc", "test_acc"):
        assert [0, *[checkpoint.get(name) for checkpoint in checkpoints[1:]]] in drawn
    for name in ("adv_acc", "robust_acc"):
        assert [checkpoint.get(name, {"0.1": None})["0.1"] for checkpoint in checkpoints] in drawn
    assert plane.get_title() == "step 900" and [900, 900] in [list(line.get_xdata()) for line in accuracy.lines]
    box = accuracy.get_window_extent()
    top, bottom = frames[0].shape[0] - int(box.y1), frames[0].shape[0] - int(box.y0)
    for frame, place in zip(frames[:2], (0, 100), strict=True):  # a black line from top to bottom where the mark is
        x = round(accuracy.transData.transform((place, 0))[0])
        assert (frame[top + 5:bottom - 5, x - 1:x + 1].min(axis=(1, 2)) < 60).all()
    assert frames[0].shape[0] % 2 == frames[0].shape[1] % 2 == 0
    assert "train 99% at step 100" in [text.get_text() for text in accuracy.texts]
    late, _ = partition.film_figure(checkpoints[-1:], partition.plane_of(dataset), 100, 2)  # fitted, nobody knows when
    assert not any("99%" in text.get_text() for text in late.axes[1].texts)


def test_sixty_frames_full_of_lines_stay_under_three_megabytes(tmp_path, monkeypatch):
    random = np.random.default_rng(0)

    def noise(model, centre, axes, reach, raster):
        likely = np.array([1 / 2, 1 / 3, 1 / 4])[:, None, None]  # each colour is then seen as often as the others
        return random.uniform(size=(3, raster, raster)) < likely, random.uniform(size=(raster, raster)) < 0.003

    monkeypatch.setattr(partition, "boundaries", noise)
    out = partition.film([save_checkpoint(tmp_path / "0.pt")] * 60, tmp_path / "film.gif")
    assert 2e6 < out.stat().st_size < 3e6
    with Image.open(out) as film:
        assert film.n_frames == 60


def test_mp4_needs_ffmpeg(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert plot.main(["--partition", save_checkpoint(tmp_path / "0.pt"), "--out", str(tmp_path / "film.mp4")]) == 2
    assert "ffmpeg" in assert_one_line(capsys)
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\necho no such codec >&2\nexit 1\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setattr(partition, "FILM_RASTER", 60)
    assert plot.main(["--partition", str(tmp_path / "0.pt"), "--out", str(tmp_path / "film.mp4")]) == 2
    assert "no such codec" in assert_one_line(capsys)
    assert not (tmp_path / "film.mp4").exists()


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
def test_mp4(tmp_path, monkeypatch):
    monkeypatch.setattr(partition, "FILM_RASTER", 60)
    out = tmp_path / "film.mp4"
    assert plot.main(["--partition", *a_run(tmp_path, STEPS), "--out", str(out)]) == 0
    done = subprocess.run(["ffmpeg", "-i", out, "-f", "null", "-"], capture_output=True, text=True)
    assert done.returncode == 0 and "frame=    5" in done.stderr


# ---- what does not go -----------------------------------------------------------------------------------------------

def test_bad_checkpoint_gives_one_line(tmp_path, capsys):
    good = save_checkpoint(tmp_path / "good.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").touch()
    torch.save([1, 2], tmp_path / "list.pt")
    save_checkpoint(tmp_path / "unknown.pt", model="transformer")
    save_checkpoint(tmp_path / "misfit.pt", width=9)
    save_checkpoint(tmp_path / "other.pt", dataset="mnist")
    save_checkpoint(tmp_path / "bare.pt", sizes={})
    save_checkpoint(tmp_path / "shape.pt", sizes={"in_shape": [1, 4, 16], "num_classes": 10})
    bad = {"text.pt": "checkpoint", "empty.pt": "checkpoint", "list.pt": "checkpoint", "unknown.pt": "transformer",
           "misfit.pt": "do not fit", "other.pt": "other images", "bare.pt": "in_shape", "shape.pt": "another shape",
           "missing.pt": ""}
    for out in ("x.png", "x.gif"):
        for name, reason in bad.items():
            assert plot.main(["--partition", good, str(tmp_path / name), "--out", str(tmp_path / out)]) == 2
            error = assert_one_line(capsys)
            assert name in error and reason in error


def test_film_of_two_runs_is_refused(tmp_path, capsys):
    paths = [save_checkpoint(tmp_path / f"{decay}.pt", weight_decay=decay) for decay in (0.0, 0.1)]
    assert plot.main(["--partition", *paths, "--out", str(tmp_path / "film.gif")]) == 2
    assert "--weight_decay" in assert_one_line(capsys)


def test_metrics_of_a_wrong_type_are_not_known():
    wrong = {"step": 1, "train_acc": "all", "test_acc": None, "adv_acc": [0.1], "robust_acc": {"0.1": {}}}
    assert partition.history_of([wrong]) == {"step": [1], "adv_acc": {}, "robust_acc": {"0.1": [None]},
                                             "train_acc": [None], "test_acc": [None], "train_saturated": [None]}


def test_fewer_than_three_test_images_give_one_line(tmp_path, capsys):
    for split, count in (("train", 3), ("test", 1)):
        for label in ("a", "b"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("L", (8, 8), 10 * k).save(folder / f"{k}.png")
    path = save_checkpoint(tmp_path / "0.pt", in_shape=(3, 8, 8), dataset="imagefolder", train_size=6,
                           data_dir=str(tmp_path / "images"))
    assert plot.main(["--partition", path]) == 2
    assert "holds 2" in assert_one_line(capsys)
