"""Figures, the delay in numbers, the sweep table and the picture of the partition."""

import json
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import run_command
from torch import nn

import flags
import models
import partition
import plot
import runlog

EPSILONS = ("0.03", "0.1", "0.0313725")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def make_history(steps, train, test, robust=None, adv=None, complexity=None, radii=("0.05",), images=1000, **config):
    """A history with these curves; robust and adv: {key: curve}, complexity: sum over layers, split over two layers."""
    def layers(scale):
        return [[None, None] if c is None else [0.75 * scale * c, 0.25 * scale * c] for c in complexity]

    points = {"train": 1.0, "test": 1.1, "random": 2.0} if complexity is not None else {}
    n = len(steps)
    return {
        "version": runlog.HISTORY_VERSION, "step": list(map(int, steps)), "epoch": [0.0] * n, "train_loss": [0.0] * n,
        "test_loss": [None] * n, "train_acc": list(train), "test_acc": list(test), "weight_norm": [1.0] * n,
        "seconds": [1.0] * n, "robust_acc": {key: list(values) for key, values in (robust or {}).items()},
        "adv_acc": {key: list(values) for key, values in (adv or robust or {}).items()},
        "local_complexity": {name: {radius: layers(scale) for radius in radii} for name, scale in points.items()},
        "config": {"model": "mlp", "dataset": "digits", "depth": 3, "width": 8, "seed": 1, "log_dir": "logs", **config},
        "sizes": {"train": 1000, "test": images, "attacked": images}, "environment": {}, "warnings": []}


def grokking(seed=1, cut=None, radii=("0.05",), **config):
    """Shaped like a run on MNIST: fitted at step 100, robust accuracy and local complexity move from step 10,000 on."""
    steps = np.unique([0, *np.logspace(0, 5, 41).round()])[:cut]
    x, noise = np.log10(np.maximum(steps, 0.5)), np.random.default_rng(seed)
    fit = sigmoid(4 * (x - 1))
    robust = {key: (0.6 * np.exp(-8 * float(key)) + 0.3 * sigmoid(6 * (x - 4))) * fit for key in EPSILONS}
    adv = {key: values + 0.1 * sigmoid(6 * (x - 4)) for key, values in robust.items()}
    complexity = (0.9 + 4.3 * sigmoid(5 * (0.9 - x)) + 0.9 * sigmoid(3 * (x - 2.7)) - 1.2 * sigmoid(5 * (x - 4.1)))
    complexity = (1 + 0.01 * noise.normal(size=len(x))) * complexity
    train = np.where(steps >= 100, 1.0, 0.98 * fit)
    return make_history(steps, train, 0.9 * fit, robust, adv, complexity, radii, seed=seed, **config)


def curve(text, label):
    """The line of a summary's table about one curve, split into words."""
    (line,) = [line for line in text.split("\n\n")[1].splitlines() if line.startswith(label + " ")]
    return line[len(label):].split()


# ---- the delay in numbers ----

def test_summary_states_the_known_numbers_of_a_synthetic_run():
    steps = [0, 10, 100, 1000, 10_000, 20_000, 40_000, 80_000]
    train = [0.1, 0.6, 0.995, 1, 1, 1, 1, 1]
    test = [0.1, 0.88, 0.90, 0.90, 0.90, 0.91, 0.91, 0.90]
    robust = {"0.1": [0, 0.1, 0.10, 0.10, 0.20, 0.30, 0.50, 0.46], "0.0313725": [0, 0.5, 0.6, 0.6, 0.6, 0.61, 0.6, 0.6]}
    adv = {"0.1": [0, 0.1, 0.10, 0.12, 0.60, 0.80, 0.90, 0.86], "0.0313725": robust["0.0313725"]}
    text = plot.summary(make_history(steps, train, test, robust, adv))
    assert "train accuracy reaches 99% at step 100 " in text
    assert "test accuracy reaches 95% of its final value (90.0%) at step 10\n" in text
    # Half of the rise from 10% to 50% is 30%, reached at step 20,000, which is 200 times step 100.
    assert curve(text, "robust ε 0.1") == ["10.0%", "50.0%", "46.0%", "step", "20,000", "200.0x"]
    assert curve(text, "adv ε 0.1") == ["10.0%", "90.0%", "86.0%", "step", "10,000", "100.0x"]
    for label in ("test", "robust ε 8/255", "adv ε 8/255"):
        assert curve(text, label)[-3:] == ["no", "delayed", "rise"]
    assert max(map(len, text.splitlines())) <= 100


def test_summary_reads_at_100_columns_with_large_numbers():
    history = grokking()
    history["step"] = [step * 10_000 for step in history["step"]]
    history["sizes"] = {"train": 10**6, "test": 10**6, "attacked": 10**6}
    assert max(map(len, plot.summary(history).splitlines())) <= 100


def test_summary_of_a_run_that_never_fits_its_training_set():
    text = plot.summary(make_history([0, 10, 100], [0.1, 0.5, 0.7], [0.1, 0.4, 0.6], {"0.1": [0.0, 0.1, 0.25]}))
    assert "does not reach 99%" in text and "70.0%" in text
    assert curve(text, "robust ε 0.1") == ["25.0%"]
    assert "delayed rise" not in text


def test_summary_of_unfinished_and_incomplete_histories():
    assert "no log step" in plot.summary({"step": [], "config": {}, "sizes": {}})
    assert "10.0%" in plot.summary(make_history([0], [0.1], [0.1], {"0.1": [0.0]}))
    text = plot.summary(make_history([0, 10, 20, 30], [0.1, None, 1.0, 1.0], [0.1, None, 0.9, None],
                                     {"0.1": [0, 0, None, 0.3]}))
    assert "reaches 99% at step 20 " in text
    assert curve(text, "robust ε 0.1") == ["-", "-", "30.0%", "no", "delayed", "rise"]


@pytest.mark.parametrize("images", [100, 1000])
def test_noise_is_never_called_a_rise(images):
    random = np.random.default_rng(images)
    largest = []
    for _ in range(200):
        points = 60
        levels = random.uniform(0.02, 0.98, size=7)

        def measured(level, n=points):
            return random.binomial(images, level, size=n) / images

        history = make_history(range(points), [0.1] * 5 + [1.0] * 55, measured(levels[0]),
                               {str(k): measured(level) for k, level in enumerate(levels[1:])},
                               {str(k): measured(level) for k, level in enumerate(levels[1:])}, images=images)
        rises = plot.rises_of(history).values()
        assert [rise for rise in rises if rise.half is not None or rise.brief] == []
        largest += [rise.largest - rise.start for rise in rises]
    # The test can fail: taken by itself, the largest later value often lies outside the 95% interval of the first.
    assert np.mean(np.array(largest) > 1.96 * np.sqrt(0.25 / images)) > 0.3


def test_a_real_rise_of_thirteen_points_is_found_in_noise():
    random = np.random.default_rng(0)
    for _ in range(50):
        level = np.array([0.34] * 30 + [0.47] * 20)
        history = make_history(range(1, 51), [0.5] * 4 + [1.0] * 46, [0.9] * 50,
                               {"0.06": random.binomial(1000, level) / 1000})
        rise = plot.rises_of(history)["robust ε 0.06"]
        assert rise.half in (30, 31)


def test_a_spike_of_one_or_two_log_points_is_no_rise_and_not_its_half():
    flat = np.full(30, 0.2)
    spike = flat.copy()
    spike[10:12] = 0.9
    assert plot.delayed_rise(spike, 2, 1000).half is None and plot.delayed_rise(spike, 2, 1000).brief
    later_rise = flat.copy()
    later_rise[10], later_rise[20:] = 0.7, 0.8
    assert plot.delayed_rise(later_rise, 2, 1000).half == 20


def test_wilson_interval_agrees_with_published_values():
    # Newcombe 1998, Statistics in Medicine 17:857, Table I: 81/263 and 0/20, score method without correction.
    assert plot.wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert plot.wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@pytest.mark.parametrize("key, label", [("0.03", "0.03"), ("0.2", "0.2"), ("0.005", "0.005"), ("0.0313725", "8/255"),
                                        ("0.00392157", "1/255"), ("0.0123457", "0.0123457")])
def test_epsilons_are_written_as_a_reader_would(key, label):
    assert flags.epsilon_label(key) == label


# ---- the table of a sweep ----

def test_table_has_one_line_a_run_and_names_what_differs():
    histories = [grokking(seed=seed, weight_decay=decay) for decay in (0.0, 0.01) for seed in (1, 2)]
    histories.append({"step": [], "config": {**histories[0]["config"], "seed": 9}, "sizes": {}})
    names = [f"run{k}" for k in range(5)]
    head, *lines = plot.table(histories, names).splitlines()
    assert [line.split()[0] for line in lines] == names
    flags = head.split()[1:3]
    assert sorted(flags) == ["seed", "weight_decay"]
    row = dict(zip(flags, lines[2].split()[1:3], strict=True))
    assert row == {"seed": "1", "weight_decay": "0.01"}
    assert "width" not in head
    assert len({len(line) for line in [head, *lines]}) == 1
    total = np.sum(histories[2]["local_complexity"]["train"]["0.05"], axis=1)
    assert lines[2].split()[-2:] == [f"{total.min():.2f}", f"{total.max():.2f}"]
    assert lines[2].split()[3:7] == ["100,000", "100.0%", "90.0%", "100"]


def test_short_names_are_the_parts_that_differ():
    assert plot.short_names(["runs/a/logs/h.json", "runs/b/logs/h.json"]) == ["a", "b"]
    assert plot.short_names(["x/h.json"]) == ["x/h.json"]
    assert plot.short_names(["h.json", "runs/h.json"]) == [".", "runs"]


# ---- phases ----

def test_the_three_phases_are_found_where_they_are():
    history = grokking()
    total = np.sum(history["local_complexity"]["train"]["0.05"], axis=1)
    found = {name: (history["step"][first], history["step"][last]) for name, first, last in plot.phases(total)}
    assert list(found) == ["first descent", "ascent", "second descent"]
    # The curve's own turning points are at steps 70 and 2,900.
    assert found["first descent"][0] <= 3 and 20 <= found["first descent"][1] <= 150
    assert 20 <= found["ascent"][0] <= 300 and 500 <= found["ascent"][1] <= 5000
    assert 1000 <= found["second descent"][0] <= 8000 and 30_000 <= found["second descent"][1]


def test_a_plateau_belongs_to_no_phase():
    level = np.concatenate([np.full(5, 5.0), np.linspace(5, 1, 6), np.full(9, 1.0), np.linspace(1, 2, 6),
                            np.full(9, 2.0), np.linspace(2, 0.5, 6)])
    found = {name: (first, last) for name, first, last in plot.phases(level)}
    assert found["first descent"] == (5, 10) and found["ascent"] == (20, 25) and found["second descent"] == (35, 40)


def test_phases_that_are_not_there_are_not_named():
    x = np.linspace(0, 1, 50)
    assert plot.phases(np.full(50, 3.0)) == [] and plot.phases(np.zeros(50)) == [] and plot.phases(x[:3]) == []
    assert plot.phases(1 + x) == []
    assert [name for name, *_ in plot.phases(3 - 2 * x)] == ["first descent"]
    assert [name for name, *_ in plot.phases(1 + abs(x - 0.5))] == ["first descent", "ascent"]
    random = np.random.default_rng(0)
    noisy = [plot.phases(3 * (1 + scale * random.normal(size=50))) for scale in (0.01, 0.05, 0.2) for _ in range(50)]
    assert sum(map(bool, noisy)) <= 3


# ---- figures ----

def assert_written(paths):
    png, svg = paths
    assert png.suffix == ".png" and svg.suffix == ".svg"
    assert matplotlib.image.imread(png).std() > 0.01  # there is something to see
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert [path.name for path in png.parent.iterdir() if path.name.startswith(".")] == []


def assert_nothing_clipped(fig):
    """All text lies in the figure, and no two end labels of a panel lie on one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Annotation, Text

    renderer = FigureCanvasAgg(fig).get_renderer()
    fig.draw(renderer)
    for text in fig.findobj(Text):
        if text.get_text() and text.get_visible():
            box = Text.get_window_extent(text, renderer)
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1, text.get_text()
    for ax in fig.axes:
        boxes = [Text.get_window_extent(label, renderer) for label in ax.findobj(Annotation)]
        middles = np.sort([(box.y0 + box.y1) / 2 for box in boxes])
        assert np.all(np.diff(middles) > plot.SMALL / 72 * fig.dpi)


def one_point():
    return make_history([0], [0.1], [0.1], {"0.1": [0.0]})


def nothing_known():
    none = [None] * 4
    return make_history([0, 1, 2, 4], none, none, {"0.1": none}, complexity=none)


CASES = {
    "one run": lambda: [grokking()],
    "one log point": lambda: [one_point()],
    "step 0 and 1": lambda: [grokking(cut=2)],
    "only nulls": lambda: [nothing_known()],
    "no attack, no complexity": lambda: [make_history([0, 5], [0.1, 0.2], [0.1, 0.2])],
    "two radii": lambda: [grokking(radii=("0.005", "0.05"))],
    "complexity of zero": lambda: [make_history([0, 5], [0.1, 0.2], [0.1, 0.2], complexity=[0.0, 0.0])],
    "log points far apart": lambda: [make_history([0, 50_000, 100_000], [0.1, 1, 1], [0.1, 0.9, 0.9])],
    "seeds": lambda: [grokking(seed=seed) for seed in range(3)],
    "seeds, one unfinished, one not begun": lambda: [grokking(seed=0), grokking(seed=1, cut=9),
                                                     {"step": [], "config": {}, "sizes": {}}],
    "configurations": lambda: [grokking(seed=seed, depth=depth) for depth in (2, 3, 4, 5) for seed in (0, 1)][:-1],
    "many flags differ": lambda: [grokking(depth=2, optimizer="adamw", weight_decay=0.01, label_noise=0.0, lr=0.001),
                                  grokking(depth=3, optimizer="adam", weight_decay=0.1, label_noise=0.5, lr=0.01)],
    "other epsilons, no complexity": lambda: [grokking(), make_history([0], [0.1], [0.1], {"0.2": [0.0]}, lr=1)],
}


@pytest.mark.parametrize("case", CASES)
def test_figures_are_written_and_nothing_is_clipped(case, tmp_path):
    fig = plot.figure(CASES[case]())
    assert_nothing_clipped(fig)
    panels = {"one run": 2, "no attack, no complexity": 1, "two radii": 3, "seeds": 2, "configurations": 8,
              "many flags differ": 4}
    assert len(fig.axes) == panels.get(case, len(fig.axes))
    if case in ("one run", "one log point"):
        assert_written(plot.save(fig, tmp_path / "a.figure"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.figure.png", "a.figure.svg"]


def test_the_same_history_gives_the_same_files(tmp_path):
    first, second = plot.draw([grokking(cut=5)], tmp_path / "a"), plot.draw([grokking(cut=5)], tmp_path / "b.png")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_mean_and_range_over_seeds_with_other_log_steps():
    def column(history):
        return plot.as_array(history["test_acc"])

    a = make_history([0, 1, 3], [0] * 3, [0.0, 0.2, 0.6])
    b = make_history([0, 3], [0] * 2, [0.2, 0.4])
    c = make_history([0], [0], [0.1])
    steps, mean, low, high = plot.together([a, b, c], column)
    assert steps.tolist() == [0, 1, 3]
    # At step 1, b is half-way between its points in log(1 + step).
    np.testing.assert_allclose(mean, [0.1, (0.2 + 0.3) / 2, 0.5])
    np.testing.assert_allclose(low, [0.0, 0.2, 0.4])
    np.testing.assert_allclose(high, [0.2, 0.3, 0.6])


def test_labels_are_spread_without_changing_their_order():
    random = np.random.default_rng(0)
    for count in (1, 2, 5, 9):
        for wanted in (random.uniform(size=count), np.full(count, 0.5), np.zeros(count)):
            places = plot.spread(wanted, 0.05, 0.0, 1.0)
            assert places.min() >= -1e-9 and places.max() <= 1 + 1e-9
            by_order = places[np.argsort(wanted, kind="stable")]
            assert np.all(np.diff(by_order) >= 0.05 - 1e-9)
    assert plot.spread([0.2, 0.8], 0.1, 0, 1).tolist() == [0.2, 0.8]
    assert np.all(np.diff(plot.spread(np.zeros(30), 0.1, 0, 1)) > 0)  # more labels than fit


# ---- the partition ----

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


@pytest.mark.parametrize("name, tile_numbers", [("mlp", None), ("mlp", 64 * 20), ("cnn", 400 * 12), ("resnet18", None)])
def test_boundaries_equal_a_brute_force_search(name, tile_numbers, monkeypatch):
    if tile_numbers:
        monkeypatch.setattr(partition, "BATCH_NUMBERS", tile_numbers)
    torch.manual_seed(0)
    model = models.build_model(name, (1, 8, 8), 5, width=6 if name == "mlp" else 2).double().eval()
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


def save_checkpoint(path, step=0, **changes):
    config = {"model": "mlp", "dataset": "digits", "data_dir": "data", "train_size": 50, "image_size": None, "seed": 1,
              "label_noise": 0.0, "depth": 3, "width": 8, "activation": "relu", "batch_norm": True, "init_scale": 1.0,
              "dtype": "float32", **changes}
    torch.manual_seed(step)
    model = models.build_model("mlp", (1, 8, 8), 10, depth=3, width=8, batch_norm=True)
    runlog.save_state(path, {"epoch": 0.0, "step": step, "seconds": 0.0, "logged": 1, "config": config,
                             "sizes": {"train": 50}, "model_state_dict": model.state_dict(),
                             "optimizer_state_dict": {}})
    return str(path)


def test_partition_command_draws_beside_the_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(partition, "RASTER", 60)
    assert plot.main(["--partition", save_checkpoint(tmp_path / "0.pt")]) == 0
    assert_written([tmp_path / "partition.png", tmp_path / "partition.svg"])
    assert str(tmp_path / "partition.png") in capsys.readouterr().out


def test_partition_of_two_checkpoints(tmp_path):
    paths = [save_checkpoint(tmp_path / f"{step}.pt", step) for step in (0, 7)]
    fig = partition.figure(paths)
    assert_nothing_clipped(fig)
    panels = [ax for ax in fig.axes if ax.get_title().startswith("step")]
    assert [ax.get_title() for ax in panels] == ["step 0", "step 7"]
    for ax in panels:  # a pixel of the raster is a pixel of the file
        pixels = ax.get_position().bounds * np.tile(fig.get_size_inches(), 2) * plot.DPI
        np.testing.assert_allclose(pixels[2:], ax.images[0].get_array().shape[:2])
        np.testing.assert_allclose(pixels, pixels.round(), atol=1e-6)
        assert min(ax.images[0].get_array().shape[:2]) >= 512


def test_three_images_are_of_three_classes_and_always_the_same():
    from data import load_dataset

    x, y = partition.three_images(load_dataset("digits", seed=1))
    again, _ = partition.three_images(load_dataset("digits", seed=2))
    assert len(set(y.tolist())) == 3 and x.shape == (3, 1, 8, 8) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(x, again)


# ---- the command ----

def test_command_draws_beside_the_history_and_prints(tmp_path, capsys):
    paths = [tmp_path / name / "logs" / "training_history.json" for name in ("a", "b")]
    for seed, path in enumerate(paths):
        path.parent.mkdir(parents=True)
        runlog.write_history(path, grokking(seed=seed, cut=25))
    assert plot.main([str(paths[0])]) == 0
    assert_written([path.with_suffix(suffix) for path, suffix in ((paths[0], ".png"), (paths[0], ".svg"))])
    assert plot.main([*map(str, paths)]) == 0
    assert_written([tmp_path / "sweep.png", tmp_path / "sweep.svg"])
    capsys.readouterr()

    before = sorted(tmp_path.rglob("*"))
    assert plot.main(["--summary", *map(str, paths)]) == 0
    text = capsys.readouterr().out
    assert text.count("train accuracy reaches 99%") == 2 and str(paths[1]) in text
    assert plot.main(["--table", *map(str, paths)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "a", "b"]
    assert sorted(tmp_path.rglob("*")) == before  # text only


def test_command_needs_no_display(tmp_path):
    (tmp_path / "logs").mkdir()
    runlog.write_history(tmp_path / "logs" / "training_history.json", one_point())
    run_command(tmp_path, script="plot.py")
    assert_written([tmp_path / "logs" / f"training_history{suffix}" for suffix in (".png", ".svg")])


BAD = {
    "missing": None, "empty": "", "no JSON": "step,loss", "another version": json.dumps({**one_point(), "version": 99}),
    "a list": "[1, 2]", "no history": '{"step": 3}',
    "lacks a column": json.dumps({key: value for key, value in one_point().items() if key != "robust_acc"}),
    "lacks sizes": json.dumps({**one_point(), "sizes": {}}),
    "no log step": json.dumps({key: value for key, value in {**one_point(), "step": []}.items()
                               if key in ("version", "step", "config", "sizes", "warnings")}),
}


def assert_one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("plot.py: ") and "Traceback" not in error
    return error


@pytest.mark.parametrize("bad", BAD)
def test_bad_history_gives_one_line(bad, tmp_path, capsys):
    path = tmp_path / "h.json"
    if BAD[bad] is not None:
        path.write_text(BAD[bad])
    assert plot.main([str(path)]) == 2
    error = assert_one_line(capsys)
    assert "h.json" in error or bad == "no log step"
    assert list(tmp_path.glob("*.png")) == []


def test_bad_checkpoint_gives_one_line(tmp_path, capsys):
    good = save_checkpoint(tmp_path / "good.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").touch()
    torch.save([1, 2], tmp_path / "list.pt")
    save_checkpoint(tmp_path / "unknown.pt", model="transformer")
    save_checkpoint(tmp_path / "misfit.pt", width=9)
    save_checkpoint(tmp_path / "other.pt", dataset="mnist")
    bad = {"text.pt": "checkpoint", "empty.pt": "checkpoint", "list.pt": "checkpoint", "unknown.pt": "transformer",
           "misfit.pt": "do not fit", "other.pt": "other images", "missing.pt": ""}
    for name, reason in bad.items():
        assert plot.main(["--partition", good, str(tmp_path / name)]) == 2
        error = assert_one_line(capsys)
        assert name in error and reason in error
