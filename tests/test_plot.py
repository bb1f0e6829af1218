"""The figures of histories, and the command line of plot.py."""

import csv
import json
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import test_curves
from conftest import ENVIRONMENT, ROOT, command, run_command
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Annotation, Text

import plot
from analysis import figure, panels, phases, runs
from records.history import read_history, write_history

EPSILONS = ("0.03", "0.1", "0.0313725")
TWELVE, SIXTEEN = (tuple(f"{k / 255:.6g}" for k in range(1, last + 1)) for last in (12, 16))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def make_history(steps, train, test, robust=None, complexity=None, radii=("0.05",), asked=None, **config):
    """A history with these curves; robust: {key: curve}, complexity: the sum of its two layers."""
    adv = {key: [v and min(1.0, v + 0.1) for v in values] for key, values in (robust or {}).items()}
    history = test_curves.make_history(steps, train, test, robust, adv)
    for name, scale in (("train", 1.0), ("test", 1.1), ("random", 2.0)) if complexity is not None else ():
        layers = [None if c is None else [0.75 * scale * c, 0.25 * scale * c] for c in complexity]
        history["local_complexity"][name] = {radius: layers for radius in radii}
    del history["config"]["epsilons"], history["config"]["n_steps"]
    history["config"] |= config
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
    """Training saturates slowly, gradients vanish, and the loss has spikes at step 10,000 and 56,234."""
    history = grokking(**options)
    steps = np.array(history["step"])
    history["train_saturated"] = [None, *sigmoid(4 * (np.log10(steps[1:]) - 3)).tolist()]
    history["zero_gradient"] = [None, *(0.5 * sigmoid(4 * (np.log10(steps[1:]) - 4))).tolist()]
    history["train_loss"] = np.where(np.isin(steps, (10_000, 56_234)), 1e-3, 1e-7).tolist()
    return history


def one_point():
    return make_history([0], [0.1], [0.1], {"0.1": [0.0]})


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


@pytest.fixture(scope="module")
def one_run():
    """(history, figure) of a run with everything in it."""
    history = saturating()
    return history, figure.figure([history])


@pytest.fixture(scope="module")
def two_losses():
    """The figure of two seeds with each of two losses."""
    options = dict(asked=["loss"])
    return figure.figure([*(saturating(seed=seed, loss="ce", **options) for seed in (1, 2)),
                          *(grokking(seed=seed, loss="mse", adv_size=seed, **options) for seed in (3, 4))])


def test_the_curves_are_the_columns(one_run):
    history, fig = one_run
    accuracy, complexity = fig.axes
    shades = matplotlib.colormaps["viridis"](np.linspace(0.75, 0.0, 3))
    for key, shade in zip(sorted(EPSILONS, key=float), shades, strict=True):
        assert lines(accuracy, shade) == [(history["step"], history["adv_acc"][key]),
                                          (history["step"], history["robust_acc"][key])]
    for colour, name in ((panels.TRAIN, "train_acc"), (panels.TEST, "test_acc"), ("0.45", "train_saturated"),
                         ("#E69F00", "zero_gradient")):
        assert lines(accuracy, colour) == [(history["step"], history[name])]
    for colour, points in ((panels.TRAIN, "train"), (panels.TEST, "test"), (panels.RANDOM, "random")):
        ((steps, values),) = lines(complexity, colour)
        assert steps == history["step"]
        np.testing.assert_allclose(values, np.sum(history["local_complexity"][points]["0.05"], axis=1))
    layers = np.array(history["local_complexity"]["train"]["0.05"])
    for area, top in zip(complexity.collections, np.cumsum(layers, axis=1).max(axis=0), strict=False):
        assert area.get_paths()[0].vertices[:, 1].max() == pytest.approx(top)


def test_interpolation_spikes_shares_and_phases_are_named(one_run):
    history, fig = one_run
    assert [history["step"][i] for i in phases.spikes(history)] == [10_000, 56_234]
    for ax in fig.axes:
        assert marks(ax, "0.35") == [100] and marks(ax, figure.SPIKE) == [10_000, 56_234]
    assert {"train 99% at step 100", "a spike of the training loss", "saturated", "zero gradient",
            "zero gradient: attacked images where that of cross-entropy is 0"} <= set(texts(fig))
    ax = fig.axes[1]
    total = np.sum(history["local_complexity"]["train"]["0.05"], axis=1)
    named = [text.get_text() for text in ax.texts if not isinstance(text, Annotation)]
    assert named == ["first descent ↘", "ascent ↗", "2nd descent ↘"]  # as they fit
    spans = [tuple(line.get_xdata()) for line in ax.lines if line.get_linewidth() > 10]
    assert spans == [(history["step"][first], history["step"][last]) for _, first, last in phases.phases(total)]
    assert_readable(fig)


def test_a_branch_is_marked_where_it_leaves_its_parent_which_the_title_names():
    path = "runs/parent/checkpoints/checkpoint_epoch_0000020_step_000000100.pt"
    branch = {**grokking(branch_from=path, asked=["branch_from"]), "branch": {"of": path, "step": 100}}
    parent = grokking(branch_from=None, asked=[])
    fig = figure.figure([branch, parent])
    assert [marks(ax, figure.BRANCH) for ax in fig.axes] == [[100], [100], [], []]
    titles = [ax.get_title().replace("\N{NBSP}", " ") for ax in fig.axes[::2]]
    assert "branch from step 100 of parent" in titles[0] and titles[1] == "no branch"
    assert any("leaves its parent" in text for text in texts(fig))
    assert_readable(fig)
    assert "loss ce" in runs.run_title(branch | {"config": branch["config"] | {"loss": "ce"}}).replace("\N{NBSP}", " ")


def test_an_epsilon_has_one_colour_in_all_panels():
    left, _, right, _ = figure.figure([grokking(epsilons=("0.03", "0.05")), grokking(epsilons=("0.05", "0.1"), width=9)]
                                      ).axes
    colours = [{text.get_text(): to_hex(text.get_color()) for text in ax.texts} for ax in (left, right)]
    assert colours[0]["ε 0.05"] == colours[1]["ε 0.05"] != colours[0]["ε 0.03"]


def test_what_of_adv_acc_is_rounding_is_filled_where_it_was_measured(one_run):
    def filled(history):
        ax = figure.figure([history]).axes[0]
        return [band.get_paths()[0].vertices[:, 1].tolist() for band in ax.collections]

    adv = grokking()["adv_acc"]["0.1"]
    rounding = [None, *(0.5 * value for value in adv[1:])]
    (heights,) = filled(grokking() | {"rounding": {"0.1": rounding}})
    assert {*adv[1:], *(0.5 * value for value in adv[1:])} <= {*heights} and adv[0] not in heights
    assert filled(grokking()) == []
    seeds = [grokking(seed=k) | {"rounding": {"0.1": rounding}} for k in (1, 2)]
    assert "band: the range of the runs" in texts(fig := figure.figure(seeds)) and "filled" not in str(texts(fig))


@pytest.mark.parametrize("curve, top", [  # around random points it is twice as high
    ([8.0] * 4 + [1.0] * 6, 1.5 * 2.0), ([1.2] * 4 + [1.0] * 6, 2 * 1.2), (2.0 ** -np.arange(10), 1.5 * 2 * 2.0**-5)])
def test_the_beginning_does_not_hide_what_follows_it(curve, top):
    one, other = (make_history(2 ** np.arange(10), [0.5] * 10, [0.5] * 10, complexity=values, width=width)
                  for width, values in ((8, curve), (9, [20.0] * 10)))
    for histories in ([one], [one, other]):
        assert figure.figure(histories).axes[1].get_ylim()[1] == pytest.approx(1.04 * top)


def test_what_is_certified_is_dotted_in_the_epsilons_colour():
    history = grokking(certify=200)
    fig = figure.figure([history | {"certified_acc": {"0.1": [None, *history["robust_acc"]["0.1"][1:]]}}])
    colour = panels.epsilon_colours([history])["0.1"]
    assert lines(fig.axes[0], colour)[1][1] == [None, *history["robust_acc"]["0.1"][1:]]
    assert "certified_acc at ε: no attack can succeed (200 images)" in texts(fig)
    assert_readable(fig)
    both = figure.figure([grokking(width=9), history | {"certified_acc": history["robust_acc"]}])
    assert "certified_acc at ε: no attack can succeed (200 images)" in texts(both)


def test_names_are_tied_outside_a_panel_where_a_run_ends_before_the_others():
    fig = figure.figure([grokking(cut=30), grokking(width=9)])
    ties = [line for line in fig.axes[0].lines if line.get_transform() == fig.axes[0].transAxes]
    assert ties and all(min(line.get_xdata()) >= 1 for line in ties)


def test_a_history_measured_again_says_so_and_has_its_runs_interpolation():
    fig = figure.figure([grokking() | {"interpolation": 77}])
    assert marks(fig.axes[0], "0.35") == [77] and any("training images, measured again" in text for text in texts(fig))


def test_null_is_a_gap_and_a_point_between_two_gaps_is_seen():
    steps, values = [0, 1, 2, 4, 8, 16], [0.1, 0.2, None, 0.4, None, 0.6]
    fig = figure.figure([make_history(steps, values, values, {"0.1": values}, values)])
    for ax in fig.axes:
        for found in curves_of(ax):
            assert np.isnan(found.get_ydata()).tolist() == [False, False, True, False, True, False]
            assert np.flatnonzero(found.get_markevery()).tolist() == [3, 5]


def test_seeds_are_mean_and_range_and_each_marks_its_spikes():
    histories = [saturating(seed=seed) for seed in range(3)]
    for history, test in zip(histories, (0.2, 0.5, 0.8), strict=True):
        history["test_acc"] = [test] * len(history["step"])
    histories[1]["train_loss"] = [1e-3 if step == 31_623 else 1e-7 for step in histories[1]["step"]]
    fig = figure.figure(histories)
    np.testing.assert_allclose(lines(fig.axes[0], panels.TEST)[0][1], 0.5)
    (band,) = [band for band in fig.axes[0].collections if to_hex(band.get_facecolor()[0]) == to_hex(panels.TEST)]
    assert set(band.get_paths()[0].vertices[:, 1]) == {0.2, 0.8}
    assert "mean and range of 3 runs" in texts(fig)
    assert sorted(set(marks(fig.axes[0], figure.SPIKE))) == [10_000, 31_623, 56_234]


def test_configurations_stand_side_by_side_at_one_scale(two_losses):
    left, below, right, below_right = sorted(two_losses.axes, key=lambda ax: ax.get_position().x0)
    titles = [left.get_title(), right.get_title()]
    assert titles == [f"loss\N{NO-BREAK SPACE}{loss}\nmean and range of 2 runs" for loss in ("ce", "mse")]
    assert left.get_position().y0 == right.get_position().y0 and left.get_position().x0 < right.get_position().x0
    assert below.get_ylim() == below_right.get_ylim()
    assert len(lines(left, "0.45")) == 1 and lines(right, "0.45") == []
    assert marks(left, figure.SPIKE) and not marks(right, figure.SPIKE)
    assert not {"saturated", "zero gradient"} & {text.get_text() for text in right.texts}
    assert not any("adv size" in text for text in texts(two_losses))
    assert_readable(two_losses)


def assert_readable(fig):
    """All text lies in the figure, and no two texts lie on one another."""
    renderer = FigureCanvasAgg(fig).get_renderer()
    fig.draw_without_rendering()
    beyond = [label for ax in fig.axes for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
              if not ax.get_ylim()[0] <= tick <= ax.get_ylim()[1]]  # matplotlib has them and does not draw them
    shown = [text for text in fig.findobj(Text) if text.get_text().strip() and text not in beyond]
    # The extent of an annotation would include its line.
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
    "only nulls": (2, lambda: [make_history([0, 1, 2, 4], *[[None] * 4] * 2, {"0.1": [None] * 4}, [None] * 4)]),
    "three radii, twelve epsilons": (4, lambda: [saturating(epsilons=TWELVE, radii=("0.005", "0.05", "1"),
                                                            asked=list(LONG), **LONG)]),
    "late log points, complexity of zero": (2, lambda: [make_history([28_547, 33_000, 40_000], [0, 0.1, 1],
                                                                     [0.1, 0.9, 0.9], complexity=[0.0, 0.0, 0.0])]),
    "no round step": (2, lambda: [make_history([0, 2504], [0.1, 0.7], [0.1, 0.6], complexity=[3.0, 4.0])]),
    "one unfinished, one not begun": (2, lambda: [grokking(seed=0), grokking(seed=1, cut=9),
                                                  {"step": [], "config": {}, "sizes": {}}]),
    "four flags, other epsilons, no complexity": (4, lambda: [
        grokking(**LONG), grokking(**{name: None for name in LONG}),
        *(make_history([0], [0.1], [0.1], {"0.2": [0]}, lr=lr) for lr in (1, 2))]),
    "thirteen configurations, sixteen epsilons": (26, lambda: [saturating(width=k, epsilons=SIXTEEN)
                                                               for k in range(13)]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] if CASES[name][0] > 20 else [])
                                  for name in CASES])
def test_extremes_are_readable(case):
    count, histories = CASES[case]
    fig = figure.figure(histories())
    assert len(fig.axes) == count
    assert_readable(fig)


def assert_written(paths):
    png, svg = paths
    assert png.suffix == ".png" and matplotlib.image.imread(png).std() > 0.01  # there is something to see
    assert svg.suffix == ".svg" and ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert not list(png.parent.glob(".*"))


def test_the_same_history_gives_the_same_files_whatever_the_users_style(tmp_path):
    first = figure.draw([one_point()], tmp_path / "lr0.1")
    assert_written(first)
    with matplotlib.rc_context({"text.usetex": True, "savefig.bbox": "tight", "font.size": 30, "savefig.dpi": 20}):
        second = figure.draw([one_point()], tmp_path / "b.png")
        assert matplotlib.rcParams["text.usetex"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.png", "b.svg", "lr0.1.png", "lr0.1.svg"]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    paths = [folder / name / "logs" / "training_history.json" for name in ("a", "b")]
    for seed, path in enumerate(paths):
        path.parent.mkdir(parents=True)
        write_history(path, grokking(seed=seed, cut=25))
    return folder, [str(path) for path in paths]


def test_command_draws_in_the_common_folder_and_prints(two_runs, capsys):
    folder, paths = two_runs
    assert plot.main(paths) == 0
    assert_written([folder / "sweep.png", folder / "sweep.svg"])
    capsys.readouterr()
    before = sorted(folder.rglob("*"))
    assert plot.main(["--summary", *paths]) == 0
    text = capsys.readouterr().out
    assert text.count("train accuracy reaches 99%") == 2 and paths[1] in text
    assert plot.main(["--table", *paths]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "a", "b"]
    assert sorted(folder.rglob("*")) == before  # text only


def test_command_needs_no_backend_and_a_closed_pipe_is_no_error(two_runs):
    """A notebook's `!python plot.py | head`: MPLBACKEND may name a module that is not installed."""
    folder, paths = two_runs
    environment = {**ENVIRONMENT, "MPLBACKEND": "module://no.such.backend"}
    (folder / "matplotlibrc").write_text("text.usetex: True\n")
    process = subprocess.Popen(command(paths[0], "--out=drawn", script="plot.py"), cwd=folder, text=True,
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(90) == 0 and error == "", error
    assert_written([folder / "drawn.png", folder / "drawn.svg"])


def test_help_and_typing_errors_import_neither_pytorch_nor_matplotlib():
    program = "import sys, plot\ntry: plot.main(sys.argv[1:])\nexcept SystemExit: pass\n" \
              "print(sorted({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    for word in ("--help", "--tabel"):
        done = subprocess.run([sys.executable, "-c", program, word], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.stdout.endswith("[]\n") and "Traceback" not in done.stderr, done.stderr


def test_without_matplotlib_one_line_says_what_to_install(two_runs, capsys, monkeypatch):
    for name in [name for name in sys.modules if name in ("analysis.figure", "analysis.panels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("analysis.figure")
    monkeypatch.delattr("analysis.panels")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main([two_runs[1][0]]) == 2
    assert "pip install" in assert_one_line(capsys)


def assert_one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("plot.py: ") and "Traceback" not in error
    return error


def test_a_history_without_a_log_step_gives_one_line(tmp_path, capsys):
    begun = {key: one_point()[key] for key in ("version", "config", "sizes", "warnings")} | {"step": []}
    (tmp_path / "h.json").write_text(json.dumps(begun))
    assert plot.main([str(tmp_path / "h.json")]) == 2
    assert "no history has a log step yet" in assert_one_line(capsys) and not list(tmp_path.glob("*.png"))


def test_bad_options_give_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    write_history(tmp_path / "h.json", one_point())
    for option, reason in {"--out=.": "folder", "--out=sub": "folder", "--out=": "folder", "--out=nowhere/x": "nowhere",
                           "--out=x.pdf": ".png", "--out=x.gif": ".png", "--out=h.json/x": "folder",
                           "--data_dir=data": "--partition"}.items():
        with pytest.raises(SystemExit, match="2"):
            plot.main(["h.json", option])
        assert reason in assert_one_line(capsys)
    for words, reason in {"--partition x.pt --table": "--table", "h.json --partition x.pt": "histories",
                          "logs/training_history.json --partition x.pt": "histories",
                          "h.json --csv --out=x": "another command"}.items():
        with pytest.raises(SystemExit, match="2"):
            plot.main(words.split())
        assert reason in assert_one_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.json", "sub"]


def test_csv_is_one_flat_table(tmp_path, capsys):
    path = tmp_path / "logs" / "training_history.json"
    path.parent.mkdir()
    write_history(path, {**grokking(cut=3), "layers": {"names": ["layers.1", "layers.3"], "units": [8, 8]},
                         "max_batch_loss": [None, 0.5, 0.5]})
    assert plot.main(["--csv", str(tmp_path)]) == 0  # the run's folder
    first, second, _ = csv.DictReader(capsys.readouterr().out.splitlines())
    history = read_history(path)
    assert first["max_batch_loss"] == "" and float(second["robust_acc/0.1"]) == history["robust_acc"]["0.1"][1]
    assert float(second["local_complexity/random/0.05/layers.3"]) == (
        history["local_complexity"]["random"]["0.05"][1][1])
    assert not {"run", "outcomes/test", "local_complexity"} & {*first}
    assert plot.main(["--csv", str(path), str(path)]) == 0
    assert capsys.readouterr().out.count(f"\n{path},") == 6


def test_full_output_gives_one_line(two_runs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert plot.main(["--table", two_runs[1][0]]) == 2
    assert_one_line(capsys)


def test_the_summary_in_the_documentation_is_what_is_printed(capsys):
    assert plot.main(["--summary", str(ROOT / "results" / "mnist.json")]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "summary.md").read_text()


def test_the_tables_of_the_results_are_those_of_the_histories():
    assert run_command(ROOT, script="results/runs.py").stdout == (ROOT / "results" / "runs.md").read_text()
