"""The figures of histories, and the command line of plot.py."""

import io
import json
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, command, run_command
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Annotation, Text

import flags
import plot
from analysis import panels, partition, phases
from runtime.history import HISTORY_VERSION, write_history

EPSILONS = ("0.03", "0.1", "0.0313725")
TWELVE, SIXTEEN = (tuple(f"{k / 255:.6g}" for k in range(1, last + 1)) for last in (12, 16))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def make_history(steps, train, test, robust=None, complexity=None, radii=("0.05",), asked=None, **config):
    """A history with these curves; robust: {key: curve}, complexity: the sum of its two layers."""
    def layers(scale):
        return [None if c is None else [0.75 * scale * c, 0.25 * scale * c] for c in complexity]

    points = {"train": 1.0, "test": 1.1, "random": 2.0} if complexity is not None else {}
    n = len(steps)
    robust = {key: list(values) for key, values in (robust or {}).items()}
    history = {
        "version": HISTORY_VERSION, "step": list(map(int, steps)), "epoch": [0.0] * n, "train_loss": [0.0] * n,
        "test_loss": [None] * n, "train_acc": list(train), "test_acc": list(test), "weight_norm": [1.0] * n,
        "seconds": [1.0] * n, "robust_acc": robust,
        "adv_acc": {key: [v and min(1.0, v + 0.1) for v in values] for key, values in robust.items()},
        "local_complexity": {name: {radius: layers(scale) for radius in radii} for name, scale in points.items()},
        "config": {"model": "mlp", "dataset": "digits", "depth": 3, "width": 8, "seed": 1, "log_dir": "logs", **config},
        "sizes": {"train": 1000, "test": 1000, "attacked": 1000}, "environment": {}, "warnings": []}
    return history if asked is None else {**history, "asked": asked}


def grokking(seed=1, cut=None, epsilons=EPSILONS, **options):
    """Shaped like a run on MNIST: fitted at step 100, robust accuracy and local complexity move from step 10,000 on."""
    steps = np.unique([0, *np.logspace(0, 5, 41).round()])[:cut]
    x, noise = np.log10(np.maximum(steps, 0.5)), np.random.default_rng(seed)
    fit = sigmoid(4 * (x - 1))
    robust = {key: (0.6 * np.exp(-8 * float(key)) + 0.3 * sigmoid(6 * (x - 4))) * fit for key in epsilons}
    complexity = (0.9 + 4.3 * sigmoid(5 * (0.9 - x)) + 0.9 * sigmoid(3 * (x - 2.7)) - 1.2 * sigmoid(5 * (x - 4.1)))
    complexity = (1 + 0.01 * noise.normal(size=len(x))) * complexity
    train = np.where(steps >= 100, 1.0, 0.98 * fit)
    return make_history(steps, train, 0.9 * fit, robust, complexity, seed=seed, **options)


def saturating(**options):
    """Training saturates slowly, then the loss breaks out at step 10,000 and 56,234."""
    history = grokking(**options)
    steps = np.array(history["step"])
    history["train_saturated"] = [None, *sigmoid(4 * (np.log10(steps[1:]) - 3)).tolist()]
    history["train_loss"] = np.where(np.isin(steps, (10_000, 56_234)), 1e-3, 1e-7).tolist()
    return history


def one_point():
    return make_history([0], [0.1], [0.1], {"0.1": [0.0]})


def nothing_known():
    none = [None] * 4
    return make_history([0, 1, 2, 4], none, none, {"0.1": none}, none)


# ---- what is drawn --------------------------------------------------------------------------------------------------

def curves_of(ax):
    return [line for line in ax.lines if len(line.get_xdata()) > 2 and line.get_linestyle() != "None"]


def lines(ax, colour):
    """[(steps, values)] of the curves that a panel shows in this colour, null as None."""
    found = [line for line in curves_of(ax) if to_hex(line.get_color()) == to_hex(colour)]
    return [(list(line.get_xdata()), [None if np.isnan(y) else float(y) for y in line.get_ydata()]) for line in found]


def marks(ax, colour):
    """The steps at which a panel has vertical lines of this colour."""
    return sorted(line.get_xdata()[0] for line in ax.lines
                  if to_hex(line.get_color()) == to_hex(colour) and len(set(line.get_xdata())) == 1)


def texts(fig):
    return [text.get_text() for text in fig.findobj(Text) if text.get_text()]


def test_the_curves_are_the_columns():
    history = saturating()
    accuracy, complexity = plot.figure([history]).axes
    shades = matplotlib.colormaps["viridis"](np.linspace(0.75, 0.0, 3))
    for key, shade in zip(EPSILONS, shades, strict=True):
        assert lines(accuracy, shade) == [(history["step"], history["adv_acc"][key]),
                                          (history["step"], history["robust_acc"][key])]
    for colour, name in ((panels.TRAIN, "train_acc"), (panels.TEST, "test_acc"), ("0.45", "train_saturated")):
        assert lines(accuracy, colour) == [(history["step"], history[name])]
    for colour, points in ((panels.TRAIN, "train"), (panels.TEST, "test"), (panels.RANDOM, "random")):
        ((steps, values),) = lines(complexity, colour)
        assert steps == history["step"]
        np.testing.assert_allclose(values, np.sum(history["local_complexity"][points]["0.05"], axis=1))


def test_the_layers_around_train_points_are_stacked():
    history = grokking()
    first, second = plot.figure([history]).axes[1].collections[:2]
    layers = np.array(history["local_complexity"]["train"]["0.05"])
    assert first.get_paths()[0].vertices[:, 1].max() == pytest.approx(layers[:, 0].max())
    assert second.get_paths()[0].vertices[:, 1].max() == pytest.approx(layers.sum(axis=1).max())


def test_null_is_a_gap_and_a_point_between_two_gaps_is_seen():
    steps, values = [0, 1, 2, 4, 8, 16], [0.1, 0.2, None, 0.4, None, 0.6]
    fig = plot.figure([make_history(steps, values, values, {"0.1": values}, values)])
    for ax in fig.axes:
        for found in curves_of(ax):
            assert np.isnan(found.get_ydata()).tolist() == [False, False, True, False, True, False]
            assert np.flatnonzero(found.get_markevery()).tolist() == [3, 5]


def test_seeds_are_mean_and_range():
    histories = [grokking(seed=seed) for seed in range(3)]
    for history, test in zip(histories, (0.2, 0.5, 0.8), strict=True):
        history["test_acc"] = [test] * len(history["step"])
    fig = plot.figure(histories)
    accuracy = fig.axes[0]
    np.testing.assert_allclose(lines(accuracy, panels.TEST)[0][1], 0.5)
    (band,) = [band for band in accuracy.collections if to_hex(band.get_facecolor()[0]) == to_hex(panels.TEST)]
    assert (band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()) == (0.2, 0.8)
    assert "mean and range of 3 runs" in texts(fig)


def test_interpolation_and_outbreaks_are_marked_in_every_panel():
    history = saturating()
    fig = plot.figure([history])
    broke_out = [history["step"][i] for i in phases.outbreaks(history)]
    assert broke_out == [10_000, 56_234]
    for ax in fig.axes:
        assert marks(ax, "0.35") == [100] and marks(ax, plot.OUTBREAK) == broke_out
    assert {"train 99% at step 100", "the training loss breaks out"} <= set(texts(fig))
    calm = plot.figure([grokking()])
    assert marks(calm.axes[0], plot.OUTBREAK) == [] and "the training loss breaks out" not in texts(calm)
    assert marks(plot.figure([grokking(cut=9)]).axes[0], "0.35") == []


def test_each_seed_of_a_group_marks_its_own_outbreaks():
    first, second = saturating(seed=1), saturating(seed=2)
    second["train_loss"] = [1e-3 if step == 31_623 else 1e-7 for step in second["step"]]
    assert marks(plot.figure([first, second]).axes[0], plot.OUTBREAK) == [10_000, 31_623, 56_234]


def test_the_phases_are_named_where_they_are():
    history = grokking()
    ax = plot.figure([history]).axes[1]
    total = np.sum(history["local_complexity"]["train"]["0.05"], axis=1)
    named = [text.get_text() for text in ax.texts if not isinstance(text, Annotation)]
    assert named == ["first descent ↘", "ascent ↗", "second descent ↘"]
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
    assert spans == [(history["step"][first], history["step"][last]) for _, first, last in phases.phases(total)]


def test_saturation_is_drawn_only_where_there_is_any():
    never = saturating()
    never["train_saturated"] = [0.0] * len(never["step"])
    unknown = saturating()
    unknown["train_saturated"] = [None] * len(unknown["step"])
    for history in (grokking(), never, unknown):
        assert "saturated" not in texts(plot.figure([history]))
    assert "saturated" in texts(plot.figure([saturating()]))


def test_titles_say_what_the_user_chose_and_nothing_else():
    def titles(*histories):
        return " ".join(texts(plot.figure(list(histories)))).replace("\N{NO-BREAK SPACE}", " ")

    alone = titles(grokking(asked=["depth", "weight_decay"], weight_decay=0.1, adv_size=797))
    assert "weight decay 0.1" in alone and "adv size" not in alone
    assert alone == titles(grokking(asked=["depth", "weight_decay", "adv_size"], weight_decay=0.1, adv_size=9))
    both = titles(grokking(asked=["loss"], loss="ce", adv_size=797),
                  grokking(asked=["loss"], loss="mse", adv_size=1000))
    assert "loss ce" in both and "loss mse" in both and "adv size" not in both


def test_ce_and_exact_ce_stand_side_by_side_at_one_scale():
    histories = [saturating(seed=seed, loss="ce") for seed in (1, 2)]
    histories += [grokking(seed=seed, loss="exact_ce") for seed in (3, 4)]
    fig = plot.figure(histories)
    left, below, right, below_right = fig.axes
    assert [left.get_title(), right.get_title()] == [
        f"loss\N{NO-BREAK SPACE}{loss}\nmean and range of 2 runs" for loss in ("ce", "exact_ce")]
    assert left.get_position().y0 == right.get_position().y0 and left.get_position().x0 < right.get_position().x0
    assert below.get_ylim() == below_right.get_ylim()
    assert len(lines(left, "0.45")) == 1 and lines(right, "0.45") == []
    assert marks(left, plot.OUTBREAK) and not marks(right, plot.OUTBREAK)


def test_a_scale_that_would_hide_a_curve_is_not_shared():
    large, small = grokking(width=8), make_history([0, 5], [0.1, 0.2], [0.1, 0.2], complexity=[0.1, 0.2], width=9)
    _, above, _, below = plot.figure([large, small]).axes
    assert above.get_ylim()[1] > 10 * below.get_ylim()[1]


# ---- how it is laid out ---------------------------------------------------------------------------------------------

def assert_readable(fig):
    """All text lies in the figure, and no two texts lie on one another."""
    renderer = FigureCanvasAgg(fig).get_renderer()
    fig.draw(renderer)
    beyond = [label for ax in fig.axes for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
              if not ax.get_ylim()[0] <= tick <= ax.get_ylim()[1]]  # matplotlib has them and does not draw them
    shown = [text for text in fig.findobj(Text) if text.get_text().strip() and text not in beyond]
    # An annotation's own extent holds its line, too.
    x0, y0, x1, y1 = np.array([Text.get_window_extent(text, renderer).extents for text in shown]).T
    said = np.array([text.get_text() for text in shown])
    assert said[(x0 < 0) | (y0 < 0) | (x1 > fig.bbox.x1) | (y1 > fig.bbox.y1)].tolist() == []
    wide = np.minimum.outer(x1, x1) - np.maximum.outer(x0, x0)
    high = np.minimum.outer(y1, y1) - np.maximum.outer(y0, y0)
    pairs = np.argwhere(np.triu(np.minimum(wide, high) > 0.01 * fig.dpi, 1))
    assert [(said[i], said[j]) for i, j in pairs] == []


LONG = dict(optimizer="adamw", weight_decay=0.01, label_noise=0.0, lr=0.001, loss="exact_ce", lc_samples=1024,
            robust_budget="low", init_scale=8.0)
CASES = {
    "one run": (2, lambda: [grokking()]),
    "one log point": (1, lambda: [one_point()]),
    "step 0 and 1": (2, lambda: [grokking(cut=2)]),
    "only nulls": (2, lambda: [nothing_known()]),
    "no attack, no complexity": (1, lambda: [make_history([0, 5], [0.1, 0.2], [0.1, 0.2])]),
    "three radii, twelve epsilons, saturated": (4, lambda: [saturating(epsilons=TWELVE, radii=("0.005", "0.05", "1"))]),
    "complexity of zero": (2, lambda: [make_history([0, 5], [0.1, 0.2], [0.1, 0.2], complexity=[0.0, 0.0])]),
    "log points far apart": (1, lambda: [make_history([0, 50_000, 100_000], [0.1, 1, 1], [0.1, 0.9, 0.9])]),
    "late log points": (1, lambda: [make_history([28_547, 33_000, 40_000], [1, 1, 1], [0.1, 0.9, 0.9])]),
    "fitted at once": (1, lambda: [make_history([0, 5], [1, 1], [0.1, 0.2])]),
    "fitted at the end": (1, lambda: [make_history([0, 50_000, 295_077], [0, 0.1, 1], [0.1, 0.9, 0.9])]),
    "seeds": (2, lambda: [grokking(seed=seed) for seed in range(3)]),
    "seeds, one unfinished, one not begun": (2, lambda: [grokking(seed=0), grokking(seed=1, cut=9),
                                                         {"step": [], "config": {}, "sizes": {}}]),
    "four configurations": (8, lambda: [grokking(seed=s, depth=d) for d in (2, 3, 4, 5) for s in (0, 1)][:-1]),
    "twelve configurations": (24, lambda: [saturating(lr=lr, depth=depth) for lr in (0.1, 0.01, 0.001)
                                           for depth in (2, 3, 4, 5)]),
    "twelve configurations, sixteen epsilons": (24, lambda: [saturating(width=k, epsilons=SIXTEEN)
                                                             for k in range(12)]),
    "thirteen configurations": (26, lambda: [grokking(width=k) for k in range(13)]),
    "many flags differ": (4, lambda: [grokking(**LONG), grokking(**{name: None for name in LONG})]),
    "many flags asked": (2, lambda: [saturating(asked=list(LONG), **LONG)]),
    "other epsilons, no complexity": (2, lambda: [grokking(), make_history([0], [0.1], [0.1], {"0.2": [0.0]}, lr=1)]),
}


@pytest.mark.parametrize("case", CASES)
def test_no_text_is_clipped_or_lies_on_another(case):
    count, histories = CASES[case]
    fig = plot.figure(histories())
    assert len(fig.axes) == count
    assert_readable(fig)


def test_twelve_configurations_on_a_page_are_printed_with_six_points():
    fig = plot.figure([saturating(width=k) for k in range(12)])
    width, height = fig.get_size_inches()
    scale = min(7.6 / width, 10.9 / height)  # what the margins of A4 leave
    assert min(text.get_fontsize() for text in fig.findobj(Text) if text.get_text()) * scale >= 5.95


def test_labels_are_spaced_without_changing_their_order():
    random = np.random.default_rng(0)
    for count in (1, 2, 5, 9):
        for wanted in (random.uniform(size=count), np.full(count, 0.5), np.zeros(count)):
            places = panels.spaced(wanted, 0.05, 0.0, 1.0)
            assert places.min() >= -1e-9 and places.max() <= 1 + 1e-9
            by_order = places[np.argsort(wanted, kind="stable")]
            assert np.all(np.diff(by_order) >= 0.05 - 1e-9)
    assert panels.spaced([0.2, 0.8], 0.1, 0, 1).tolist() == [0.2, 0.8]
    np.testing.assert_allclose(panels.spaced([0.5, 0.5, 0.9], 0.1, 0, 1), [0.45, 0.55, 0.9])  # no further than needed


# ---- the files ------------------------------------------------------------------------------------------------------

def assert_written(paths):
    png, svg = paths
    assert png.suffix == ".png" and svg.suffix == ".svg"
    assert matplotlib.image.imread(png).std() > 0.01  # there is something to see
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert [path.name for path in png.parent.iterdir() if path.name.startswith(".")] == []


def test_the_same_history_gives_the_same_files(tmp_path):
    first, second = plot.draw([grokking(cut=5)], tmp_path / "a.b"), plot.draw([grokking(cut=5)], tmp_path / "b.png")
    assert_written(first)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.png", "a.b.svg", "b.png", "b.svg"]


@pytest.mark.parametrize("key, label", [("0.03", "0.03"), ("0.2", "0.2"), ("0.005", "0.005"), ("0.0313725", "8/255"),
                                        ("0.00392157", "1/255"), ("0.00196078", "0.5/255"),
                                        ("0.0123457", "0.0123457")])
def test_epsilons_are_written_as_a_reader_would(key, label):
    assert flags.epsilon_label(key) == label


# ---- the command ----------------------------------------------------------------------------------------------------

def test_command_draws_beside_the_history_and_prints(tmp_path, capsys):
    paths = [tmp_path / name / "logs" / "training_history.json" for name in ("a", "b")]
    for seed, path in enumerate(paths):
        path.parent.mkdir(parents=True)
        write_history(path, grokking(seed=seed, cut=25))
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


def test_command_needs_no_display_and_no_environment(tmp_path):
    (tmp_path / "logs").mkdir()
    history = {key: value for key, value in grokking(cut=9).items() if key != "environment"}
    write_history(tmp_path / "logs" / "training_history.json", history)
    run_command(tmp_path, script="plot.py")
    assert_written([tmp_path / "logs" / f"training_history{suffix}" for suffix in (".png", ".svg")])


def changed(**changes):
    return json.dumps({**grokking(cut=3), **changes})


BAD = {
    "missing": None, "empty": "", "no JSON": "step,loss", "another version": changed(version=99), "a list": "[1, 2]",
    "no history": '{"step": 3}', "lacks sizes": changed(sizes={}), "sizes in words": changed(sizes={"train": "many"}),
    "lacks a column": json.dumps({key: value for key, value in one_point().items() if key != "robust_acc"}),
    "warnings in words": changed(warnings=["hm"]), "warnings of nothing": changed(warnings=[None]),
    "steps in words": changed(step=["a", "b", "c"]), "steps of null": changed(step=[None, 1, 2]),
    "negative step": changed(step=[-5, 1, 2]), "adv_acc a list": changed(adv_acc=[0.1, 0.2, 0.3]),
    "adv_acc in words": changed(adv_acc={"0.1": ["a", "b", "c"]}),
    "an epsilon in words": changed(adv_acc={"x": [0] * 3}),
    "complexity of numbers": changed(local_complexity={"train": {"0.05": [1, 2, 3]}}),
    "complexity of changing layers": changed(local_complexity={"train": {"0.05": [[1, 2], [3], []]}}),
    "complexity a list": changed(local_complexity=[[1]] * 3), "accuracy in words": changed(train_acc=["a", 0, 0]),
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


@pytest.mark.parametrize("text", ["--summary", "--table"])
def test_text_of_histories_that_say_little(text, tmp_path, capsys):
    paths = [tmp_path / f"{k}.json" for k in range(2)]
    paths[0].write_text(BAD["no log step"])
    write_history(paths[1], nothing_known())
    assert plot.main([text, *map(str, paths)]) == 0
    assert capsys.readouterr().out.count("\n") > 2


@pytest.mark.parametrize("out, reason", [(".", "folder"), ("sub", "folder"), ("", "folder"), ("nowhere/x", "nowhere"),
                                         ("x.pdf", ".png"), ("x.gif", ".png"), ("h.json/x", "no folder")])
def test_bad_out_gives_one_line(out, reason, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    write_history(tmp_path / "h.json", one_point())
    with pytest.raises(SystemExit, match="2"):
        plot.main(["h.json", "--out", out])
    assert reason in assert_one_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.json", "sub"]


def test_a_number_at_the_end_of_a_name_is_no_suffix(tmp_path):
    write_history(tmp_path / "h.json", one_point())
    assert plot.main([str(tmp_path / "h.json"), "--out", str(tmp_path / "lr0.1")]) == 0
    assert_written([tmp_path / "lr0.1.png", tmp_path / "lr0.1.svg"])


@pytest.mark.parametrize("stdout", [lambda: None, lambda: open("/dev/full", "w")])
def test_closed_output_gives_one_line(stdout, tmp_path, capsys, monkeypatch):
    write_history(tmp_path / "h.json", one_point())
    monkeypatch.setattr(sys, "stdout", stdout())
    assert plot.main(["--table", str(tmp_path / "h.json")]) == 2
    assert_one_line(capsys)


def test_pipe_that_nobody_reads_gives_one_line(tmp_path):
    write_history(tmp_path / "h.json", one_point())
    process = subprocess.Popen(command("--table", "h.json", script="plot.py"), cwd=tmp_path, env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(90) == 2 and error.count("\n") == 1 and error.startswith("plot.py: "), error


def test_output_that_knows_no_epsilon(tmp_path, monkeypatch):
    write_history(tmp_path / "h.json", one_point())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert plot.main(["--table", str(tmp_path / "h.json")]) == 0
    assert b"robust" in sys.stdout.buffer.getvalue()


def test_no_circle():
    assert not hasattr(panels, "plot") and not hasattr(partition, "plot") and not hasattr(panels, "partition")


def test_the_table_of_the_results_is_that_of_the_histories(capsys):
    paths = sorted(map(str, (ROOT / "results").glob("*.json")))
    assert plot.main(["--markdown", *paths]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "results" / "README.md").read_text()
