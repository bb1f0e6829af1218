"""Pictures and GIFs of a network's partition of the input space, on a plane through three test images.

A ReLU network is affine on each of the regions into which the zero sets of its units cut the input space (Humayun et
al., arXiv:2402.15555, Section 3). On a plane these are lines that bend where they cross those of earlier layers. Over
the checkpoints of a run, the regions migrate from the training points to the decision boundary.
"""

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import AxesImage
from PIL import Image
from torch import nn
from tqdm import tqdm

import data
import local_complexity
import models
from analysis import panels, runs
from analysis.panels import SMALL, Axes, Figure
from analysis.statistics import interpolation_step
from flags import MEASUREMENT, flags_of
from records import checkpoints, files
from records.history import History, append
from records.run import own_history

RASTER = 600  # pixels along each side of a panel
MARGIN = 0.35  # how far the picture reaches beyond the three images, relative to their distance from its centre
DECISION = (0.84, 0.37, 0.0)  # the colour of the decision boundary: vermillion, after Okabe and Ito
BATCH_NUMBERS = 2**22  # pre-activations of one layer held at once: 16 MB in float32
GIF_RASTER, GIF_DPI, GIF_COLOURS = 400, 100, 64
GIF_PIXELS = 6_000_000  # of the plane, in all frames of a GIF: the file stays near 2 MB


def load_all(paths: Sequence[str | Path], data_dir: str | None = None) -> tuple[list[Any], "Plane"]:
    """Return (checkpoints, plane): the former in the order of their steps, with "path" in place of their tensors.

    data_dir: where the run's data are, by default the folder in its config. Raises ValueError for a file that is not a
    checkpoint, for checkpoints of several runs, and for other data than those of the run.
    """
    found: list[Any] = [{"path": path} | {key: value for key, value in checkpoints.load_checkpoint(path).items()
                               if not key.endswith("state_dict")} for path in paths]
    if flags := runs.differing_flags(found, also_same={"n_steps"} | flags_of(MEASUREMENT)):
        raise ValueError(f"these checkpoints are of several runs: they differ in --{flags[0]}")
    dataset = data.from_config(found[0]["config"], data_dir)
    if not checkpoints.is_of_data(found[0], data.fingerprint(dataset)):
        raise ValueError(f"the images or labels are not those that {paths[0]} was trained on: give the folder of its "
                         "data with --data_dir")
    return sorted(found, key=lambda checkpoint: checkpoint["step"]), plane_through(*three_images(dataset))


def network_in(path: str | Path) -> nn.Module:
    """Return the network of a checkpoint. ValueError if its weights do not fit its config."""
    return models.load_network(checkpoints.load_checkpoint(path), path)


def three_images(dataset: data.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x, y): three test images in [0, 1], shape (3, C, H, W), of three classes if there are that many."""
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
    """Return the plane through three images x, (3, C, H, W), of the classes y."""
    centre = x.mean(0)
    axes = torch.linalg.qr((x[1:] - x[0]).flatten(1).T).Q
    places = (x - centre).flatten(1) @ axes
    return Plane(x, y, centre, axes.T.view(2, *x.shape[1:]), places, (1 + MARGIN) * places.abs().max().item())


def boundaries(model: nn.Module, plane: Plane, raster: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (layers, decision): where units of each layer change sign, and where the predicted class changes.

    The plane is sampled at (raster + 1)^2 points, tile by tile, which bounds the memory. layers: bool (layers, raster,
    raster), true at [l, i, j] if the sign of some unit of layer l at point (i, j) differs from that at (i + 1, j) or
    (i, j + 1); decision: bool (raster, raster), the same for the argmax. i counts along the plane's second axis.
    """
    units = local_complexity.layer_units(model, tuple(plane.centre.shape))
    modules = [model.get_submodule(name) for name in units]
    found = np.zeros((len(units) + 1, raster, raster), dtype=bool)  # the layers, then the decision
    parameter = next(model.parameters())
    centre, (across, up) = plane.centre.to(parameter), plane.axes.to(parameter)
    ticks = torch.linspace(-plane.reach, plane.reach, raster + 1, dtype=torch.float64).to(parameter).view(-1, 1, 1, 1)
    side = max(1, min(raster, math.isqrt(BATCH_NUMBERS // max(centre.numel(), *units.values())) - 1))
    tiles = list(itertools.product(range(0, raster, side), repeat=2))
    for top, left in tqdm(tiles, unit="tile", leave=False, disable=None, delay=2):  # a CNN takes minutes
        v, u = ticks[top:top + side + 1], ticks[left:left + side + 1]
        points = centre + v[:, None] * up + u * across
        signs: list[torch.Tensor] = []
        with (local_complexity.pre_hooks(modules, lambda module, args, signs=signs: signs.append(args[0] > 0)),
              models.evaluating(model), torch.no_grad()):
            signs.append(model(points.flatten(0, 1)).argmax(1, keepdim=True))
        for mask, values in zip(found, signs, strict=True):
            grid = values.unflatten(0, points.shape[:2]).flatten(2)
            here = grid[:-1, :-1]
            changes = ((here != grid[1:, :-1]) | (here != grid[:-1, 1:])).any(2)
            mask[top:top + side, left:left + side] = changes.cpu().numpy()
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


@panels.default_style
def figure(paths: Sequence[str | Path], data_dir: str | None = None) -> Figure:
    """Return a figure: the partition of each checkpoint of a run on the same plane, side by side.

    data_dir and errors: those of load_all() and of network_in().
    """
    found, plane = load_all(paths, data_dir)
    columns = min(len(paths), 3)
    rows = -(-len(paths) // columns)
    fig = panels.new_figure(1.2 + 3.3 * columns, 3.45 * rows + 1.1, runs.run_title(found[0]))
    grid = fig.add_gridspec(1, 2, width_ratios=[0.8, 3.2 * columns])
    left, right = grid[0].subgridspec(3 * rows, 1), grid[1].subgridspec(rows, columns)
    draw_images([fig.add_subplot(left[k]) for k in range(3)], plane)
    axes = [fig.add_subplot(right[k]) for k in range(len(paths))]
    for ax, checkpoint in zip(axes, found, strict=True):
        layers, decision = boundaries(network_in(checkpoint["path"]), plane, RASTER)
        draw_plane(ax, plane, paint(layers, decision), checkpoint["step"])
    add_legend(fig, len(layers), plane)
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
        ax.imshow((image[:3].permute(1, 2, 0) if len(image) > 2 else image[0]).numpy(), cmap="gray", vmin=0, vmax=1)
        ax.set_title(f"{letter}: class {label}", fontsize=SMALL, pad=3)
        ax.set(xticks=[], yticks=[])


def draw_plane(ax: Axes, plane: Plane, picture: np.ndarray, step: int) -> AxesImage:
    """Show the picture and the places of the three images in it; returns what holds the picture."""
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"step {step:,}", fontsize=SMALL + 1, pad=4)
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


@panels.default_style
def gif(paths: Sequence[str | Path], out: Path, data_dir: str | None = None) -> None:
    """Write a GIF with one frame for each checkpoint of a run, in the order of their steps.

    Next to the partition are the accuracies in the checkpoints, with a mark that moves. Errors: those of figure().
    """
    found, plane = load_all(paths, data_dir)
    own = own_history(Path(found[0]["path"]), found[0])
    history: History = {"step": [], "adv_acc": {}, "robust_acc": {},
                        "interpolation": interpolation_step(own) if own else None}
    for checkpoint in found:
        append(history, {name: checkpoint.get(name) for name in (
            "step", "train_acc", "test_acc", *panels.SHARES, "adv_acc", "robust_acc")})
    raster = min(GIF_RASTER, math.isqrt(GIF_PIXELS // len(paths)))
    side = raster / GIF_DPI
    fig = panels.new_figure(side + 4.8, side + 1.6, runs.run_title(found[0]), GIF_DPI)
    axes = fig.subplot_mosaic("PLLL;PABC", width_ratios=[side, 0.95, 0.95, 0.95], height_ratios=[3, 1])
    shown = draw_plane(axes["P"], plane, np.ones((raster, raster, 3)), 0)
    panels.step_axis(axes["L"], *panels.span([history]), 2.7)
    panels.accuracy_panel(axes["L"], [history], panels.epsilon_colours([history]))
    panels.mark_interpolation([axes["L"]], [history])
    mark = axes["L"].axvline(0, color="black", lw=1.5, marker="^", markevery=[0], clip_on=False)
    draw_images([axes[letter] for letter in "ABC"], plane)
    add_legend(fig, len(local_complexity.layer_units(network_in(paths[0]), tuple(plane.centre.shape))), plane)
    panels.lay_out(fig)
    snap(axes["P"], raster)
    canvas = FigureCanvasAgg(fig)
    frames: list[Image.Image] = []
    for checkpoint in tqdm(found, unit="frame", leave=False, disable=None):
        shown.set_data(paint(*boundaries(network_in(checkpoint["path"]), plane, raster)))
        mark.set_xdata([checkpoint["step"]] * 2)
        axes["P"].set_title(f"step {checkpoint['step']:,}", fontsize=SMALL + 1, pad=4)
        canvas.draw()
        frame = Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB")
        frames.append(frame.quantize(GIF_COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=3,
                                     palette=frames[0] if frames else None, dither=Image.Dither.NONE))
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[170] * (len(frames) - 1) + [1000])  # ms
    files.write_atomically(out, buffer.getvalue())
