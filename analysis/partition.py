"""Pictures and films of a network's partition of the input space, on a plane through three test images.

A ReLU network is affine on each of the regions into which the zero sets of its units cut the input space (Humayun et
al., arXiv:2402.15555, Section 3). On a plane these are lines that bend where they cross those of earlier layers. Over
the checkpoints of a run, the regions migrate from the training points to the decision boundary.
"""

import itertools
import logging
import math
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data
import local_complexity
import models
from analysis import panels, runs
from analysis.panels import SMALL, Axes, Figure
from records import checkpoints, files
from records.history import append

RASTER = 600  # pixels along each side of a panel
MARGIN = 0.35  # how far the picture reaches beyond the three images, relative to their distance from its centre
DECISION = (0.84, 0.37, 0.0)  # the colour of the decision boundary: vermillion, after Okabe and Ito
BATCH_NUMBERS = 2**22  # pre-activations of one layer held at once: 16 MB in float32
FILM_RASTER, FILM_DPI = 400, 100
FILM_PIXELS = 6_000_000  # of the plane, in all frames of a film: a GIF stays near 3 MB
FRAMES_PER_SECOND, LAST_FRAMES = 6, 6  # the last frame is held for a second


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def load(path: str | Path) -> tuple[dict, nn.Module]:
    """Return (checkpoint, network). ValueError names a file that is not a checkpoint or does not fit its config."""
    checkpoint = checkpoints.load_checkpoint(path)
    try:
        return checkpoint, models.load_network(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_all(paths: Sequence[str | Path], data_dir: str | None = None) -> tuple[list[dict], "Plane"]:
    """Return (checkpoints without their tensors, a plane through images of the data that they were all trained on).

    The data are in data_dir, or else in the folder of the first checkpoint's config.
    """
    found: list[dict] = []
    for path in paths:
        checkpoint, _ = load(path)
        found.append({key: value for key, value in checkpoint.items() if not key.endswith("state_dict")})
        if any(checkpoint["config"].get(name) != found[0]["config"].get(name)
               for name in ("dataset", "image_size", "modulus")):
            raise ValueError(f"{path} was trained on other images than {paths[0]}: there is no plane for both")
    config = found[0]["config"]
    folder = data_dir or config["data_dir"]
    if not (data_dir or data.source_of(config["dataset"]).package or Path(folder).expanduser().exists()):
        raise ValueError(f"{paths[0]}: its data were in {folder}, which is not here: name their folder with --data_dir")
    dataset = data.from_config(config, folder)
    if not checkpoints.is_of_data(found[0], data.fingerprint(dataset)):
        raise ValueError(f"the images or labels in {folder} are not those that {paths[0]} was trained on")
    for path, checkpoint in zip(paths, found, strict=True):
        if tuple(checkpoint["sizes"]["in_shape"]) != tuple(dataset.x_test.shape[1:]):
            raise ValueError(f"{path} was trained on images of another shape than those of {dataset.name}")
    return found, plane_through(*three_images(dataset))


# ---- the plane ------------------------------------------------------------------------------------------------------

def three_images(dataset: data.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x, y): three test images in [0, 1], shape (3, C, H, W), of three classes if there are that many.

    Raises ValueError if there are fewer than three test images.
    """
    if len(dataset.y_test) < 3:
        raise ValueError(f"a plane needs three test images, and {dataset.name} has {len(dataset.y_test)}")
    order = torch.randperm(len(dataset.y_test), generator=torch.Generator().manual_seed(0)).numpy()
    first_of_class = np.sort(np.unique(dataset.y_test.numpy()[order], return_index=True)[1])
    chosen = order[[*first_of_class, *np.setdiff1d(np.arange(len(order)), first_of_class)][:3]]
    return data.pixels(dataset.x_test[chosen], torch.float64), dataset.y_test[chosen]


class Plane(NamedTuple):
    """The plane through three images x, (3, C, H, W), of the classes y, and how far it is drawn."""

    x: torch.Tensor
    y: torch.Tensor
    centre: torch.Tensor  # (C, H, W), the mean of the images
    axes: torch.Tensor  # (2, C, H, W), orthonormal: distances in the picture are Euclidean distances between images
    places: torch.Tensor  # (3, 2), the images' coordinates
    reach: float  # along both axes, from the centre


def plane_through(x: torch.Tensor, y: torch.Tensor) -> Plane:
    """Return the plane through three images; ValueError if they lie on a line."""
    centre = x.mean(0)
    axes, triangle = torch.linalg.qr((x[1:] - x[0]).flatten(1).T)
    if triangle.diagonal().abs().min() < 1e-6 * max(1.0, triangle.abs().max().item()):
        raise ValueError("the three test images lie on a line: there is no plane through them")
    places = (x - centre).flatten(1) @ axes
    return Plane(x, y, centre, axes.T.view(2, *x.shape[1:]), places, (1 + MARGIN) * places.abs().max().item())


def boundaries(model: nn.Module, plane: Plane, raster: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (layers, decision): where units of each layer change sign, and where the predicted class changes.

    The plane is sampled at (raster + 1)^2 points. layers: bool (layers, raster, raster), true at [l, i, j] if the sign
    of some unit of layer l at point (i, j) differs from that at its neighbour (i + 1, j) or (i, j + 1); decision: bool
    (raster, raster), the same for the argmax. i counts along the plane's second axis, j along its first. The plane is
    covered tile by tile, which bounds the memory.
    """
    units = local_complexity.layer_units(model, tuple(plane.centre.shape))
    modules = [model.get_submodule(name) for name in units]
    found = np.zeros((len(units) + 1, raster, raster), dtype=bool)  # the layers, then the decision
    parameter = next(model.parameters())
    centre, (across, up) = plane.centre.to(parameter), plane.axes.to(parameter)
    ticks = torch.linspace(-plane.reach, plane.reach, raster + 1, dtype=torch.float64).to(parameter).view(-1, 1, 1, 1)
    side = max(1, min(raster, math.isqrt(BATCH_NUMBERS // max(centre.numel(), *units.values())) - 1))

    def changes(values: torch.Tensor) -> np.ndarray:
        """values: (height + 1, width + 1, …) of neighbouring points -> bool (height, width)."""
        here = values[:-1, :-1]
        return ((here != values[1:, :-1]) | (here != values[:-1, 1:])).flatten(2).any(2).cpu().numpy()

    tiles = list(itertools.product(range(0, raster, side), repeat=2))
    for top, left in tqdm(tiles, unit="tile", leave=False, disable=None, delay=2):  # a CNN takes minutes
        v, u = ticks[top:top + side + 1], ticks[left:left + side + 1]
        shape, tile = (len(v), len(u)), np.s_[top:top + side, left:left + side]

        def watch(module, args, shape=shape, tile=tile):
            found[modules.index(module)][tile] = changes((args[0] > 0).unflatten(0, shape))

        points = (centre + v[:, None] * up + u * across).flatten(0, 1)
        with local_complexity.pre_hooks(modules, watch), models.evaluating(model), torch.no_grad():
            found[-1][tile] = changes(model(points).argmax(1).view(*shape, 1))
    return found[:-1], found[-1]


def layer_colours(count: int) -> np.ndarray:
    """Return one colour for each layer, from light to dark: (count, 3), RGB."""
    return matplotlib.colormaps["viridis"](np.linspace(0.8, 0.1, count))[:, :3]


def paint(layers: np.ndarray, decision: np.ndarray) -> np.ndarray:
    """Return (raster, raster, 3): the layers' boundaries on white, the deepest on top, then the decision's."""
    from scipy import ndimage

    picture = np.ones((*decision.shape, 3))
    for mask, colour in zip(layers, layer_colours(len(layers)), strict=True):
        picture[mask] = colour
    picture[ndimage.binary_dilation(decision, np.ones((3, 3)))] = DECISION  # three pixels wide, to stand out
    return picture


# ---- figures --------------------------------------------------------------------------------------------------------

@panels.default_style
def figure(paths: Sequence[str | Path], data_dir: str | None = None) -> Figure:
    """Return a figure: the partition of each checkpoint on the same plane, side by side.

    data_dir: where the images are, by default the folder in the first checkpoint's config. Raises ValueError or OSError
    for a file that is not a checkpoint, does not fit its own config, or was trained on other images than the first, and
    where the images are missing.
    """
    found, plane = load_all(paths, data_dir)
    flags = runs.differing_flags(found, also_same={"n_steps"})
    columns = min(len(paths), 3)
    rows = -(-len(paths) // columns)
    fig = panels.new_figure(1.2 + 3.3 * columns, 3.45 * rows + 1.1,
                            f"{runs.run_title(found[0], flags)}: the plane through three test images")
    grid = fig.add_gridspec(1, 2, width_ratios=[0.8, 3.2 * columns])
    left, right = grid[0].subgridspec(3 * rows, 1), grid[1].subgridspec(rows, columns)
    draw_images([fig.add_subplot(left[k]) for k in range(3)], plane)
    axes = [fig.add_subplot(right[k]) for k in range(len(paths))]
    drawn = []
    for ax, path, checkpoint in zip(axes, paths, found, strict=True):
        layers, decision = boundaries(load(path)[1], plane, RASTER)
        draw_plane(ax, paint(layers, decision), plane)
        title = f"step {checkpoint['step']:,}\n{runs.group_title([checkpoint], flags)}"
        ax.set_title(title.strip(), fontsize=SMALL + 1, pad=4)
        drawn.append(len(layers))
    add_legend(fig, max(drawn), plane)
    panels.lay_out(fig)
    for ax in axes:
        snap(ax, RASTER)
    return fig


def snap(ax: Axes, raster: int) -> None:
    """Move a panel to whole pixels, so that a pixel of the picture is a pixel of the file."""
    size = np.array(ax.figure.bbox.size)
    corner = np.round(ax.get_position().get_points().mean(axis=0) * size - raster / 2)
    ax.set_position((*(corner / size), *(raster / size)))


def draw_images(axes: Sequence[Axes], plane: Plane) -> None:
    for ax, image, label, letter in zip(axes, plane.x, plane.y, "ABC", strict=True):
        shown = image[:3] if len(image) > 2 else image.mean(0, keepdim=True).expand(3, -1, -1)
        ax.imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_title(f"{letter}: class {label}", fontsize=SMALL, pad=3)
        ax.set(xticks=[], yticks=[])


def draw_plane(ax: Axes, picture: np.ndarray, plane: Plane) -> Any:
    """Show the picture and the places of the three images in it; returns what holds the picture."""
    ax.set(xticks=[], yticks=[])
    for letter, (u, v) in zip("ABC", plane.places.tolist(), strict=True):
        ax.plot(u, v, "o", ms=11, mfc="white", mec="black", mew=1)
        ax.text(u, v, letter, ha="center", va="center_baseline", fontsize=SMALL)
    return ax.imshow(picture, origin="lower", extent=(-plane.reach, plane.reach) * 2, interpolation="none")


def add_legend(fig: Figure, n_layers: int, plane: Plane) -> None:
    from matplotlib.lines import Line2D

    colours = layer_colours(n_layers)
    shown = range(n_layers) if n_layers <= 3 else (0, n_layers // 2, n_layers - 1)
    handles = [Line2D([], [], color=colours[k], lw=2, label=f"units of layer {k + 1} change sign") for k in shown]
    handles.append(Line2D([], [], color=DECISION, lw=3, label="the predicted class changes"))
    fig.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False,
               title=f"side of a panel: {2 * plane.reach:.3g} (Euclidean distance between images in [0, 1])",
               title_fontsize=SMALL)


# ---- films ----------------------------------------------------------------------------------------------------------

@panels.default_style
def film(paths: Sequence[str | Path], out: Path, data_dir: str | None = None) -> None:
    """Write a film of a run's checkpoints, one frame each in the order of their steps, to out (.gif or .mp4).

    Next to the partition are the accuracies in the checkpoints, with a mark that moves. Raises ValueError or OSError as
    figure() does, for checkpoints of several runs, and for an MP4 without ffmpeg.
    """
    from matplotlib.animation import FFMpegWriter, PillowWriter

    kind = FFMpegWriter if out.suffix == ".mp4" else PillowWriter
    if not kind.isAvailable():
        raise ValueError(f"{out}: an MP4 needs ffmpeg, which is not installed; a GIF does not")
    found, plane = load_all(paths, data_dir)
    flags = runs.differing_flags(found, also_same={"n_steps"})
    if flags:
        raise ValueError(f"a film shows one run, and these checkpoints differ in --{flags[0]}: write a PNG")
    order = sorted(range(len(paths)), key=lambda i: found[i]["step"])
    raster = min(FILM_RASTER, math.isqrt(FILM_PIXELS // len(paths)))
    n_layers = len(local_complexity.layer_units(load(paths[0])[1], tuple(plane.centre.shape)))
    fig, show = film_figure([found[i] for i in order], plane, raster, n_layers)
    writer = kind(fps=FRAMES_PER_SECOND)
    logging.getLogger("matplotlib.animation").setLevel(logging.CRITICAL)  # ffmpeg's words are in the error below
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / out.name
        try:
            with writer.saving(fig, str(part), FILM_DPI):
                for i in tqdm(order, unit="frame", leave=False, disable=None):
                    checkpoint, network = load(paths[i])
                    show(paint(*boundaries(network, plane, raster)), checkpoint["step"])
                    writer.grab_frame()
                for _ in range(LAST_FRAMES):
                    writer.grab_frame()
        except subprocess.CalledProcessError as error:
            raise OSError(f"ffmpeg could not write {out}: {error.stderr.strip()[-200:]!r}") from None
        files.write_atomically(out, part.read_bytes())


def film_figure(found: Sequence[dict], plane: Plane, raster: int, n_layers: int) -> tuple[Figure, Callable]:
    """Return (fig, show): show(picture, step) draws a frame. The accuracies are those in the checkpoints `found`."""
    history: dict = {"step": [], "adv_acc": {}, "robust_acc": {}}
    for checkpoint in found:
        append(history, {name: checkpoint.get(name) for name in (
            "step", "train_acc", "test_acc", *panels.SHARES, "adv_acc", "robust_acc")})
    side = raster / FILM_DPI
    fig = panels.new_figure(side + 4.8, side + 1.6, runs.run_title(found[0]), FILM_DPI)
    axes = fig.subplot_mosaic("PLLL;PABC", width_ratios=[side, 0.95, 0.95, 0.95], height_ratios=[3, 1])
    shown = draw_plane(axes["P"], np.ones((raster, raster, 3)), plane)
    axes["P"].set_title("step 0", fontsize=SMALL + 1.5, pad=4)
    curves = axes["L"]
    panels.step_axis(curves, *panels.span([history]), 2.7)
    panels.accuracy_panel(curves, [history], panels.epsilon_colours([history]))
    panels.mark_interpolation([curves], [history])
    mark = curves.axvline(0, color="black", lw=1.5, marker="^", markevery=[0], clip_on=False)
    draw_images([axes[letter] for letter in "ABC"], plane)
    add_legend(fig, n_layers, plane)
    panels.lay_out(fig)
    snap(axes["P"], raster)

    def show(picture: np.ndarray, step: int) -> None:
        shown.set_data(picture)
        mark.set_xdata([step, step])
        axes["P"].set_title(f"step {step:,}", fontsize=SMALL + 1.5, pad=4)
    return fig, show
