"""Pictures and films of a network's partition of the input space, on a plane through three test images.

A ReLU network is affine on each of the regions that its units' zero sets cut the input space into (Humayun et al.,
arXiv:2402.15555, Section 3). On a plane these zero sets are lines, broken where they cross the lines of earlier layers.
Drawn for several checkpoints of a run, they show the regions migrate from the training points to the decision boundary.

    python plot.py --partition CHECKPOINT...
    python plot.py --partition CHECKPOINT... --out partition.gif
"""

import io
import itertools
import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import data
import local_complexity
import models
from analysis import panels, runs, statistics
from analysis.panels import SMALL
from runtime import checkpoints, files

RASTER = 600  # pixels along each side of a panel
MARGIN = 0.35  # how far the picture reaches beyond the three images, relative to their distance from its centre
DECISION = (0.84, 0.37, 0.0)  # the colour of the decision boundary: vermillion, after Okabe and Ito
BATCH_NUMBERS = 2**22  # of one layer's pre-activations held at once: 16 MB in float32
FILM_RASTER, FILM_DPI = 400, 100
FILM_BYTES = 2_700_000  # for the pictures of the plane in a GIF
PIXEL_BYTES = 0.36  # that one full of lines takes in a GIF
FRAME_SECONDS, LAST_FRAME_SECONDS = 0.15, 2.0


# ---- what the checkpoints hold --------------------------------------------------------------------------------------

def load(path):
    """Return (checkpoint, network); ValueError names the file that is none of ours or does not fit its own config."""
    checkpoint = checkpoints.load_checkpoint(path)
    try:
        return checkpoint, models.load_network(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_all(paths):
    """Return (checkpoints without their tensors, the data set that they all were trained on)."""
    checkpoints = []
    for path in paths:
        checkpoint, _ = load(path)
        checkpoints.append({key: value for key, value in checkpoint.items() if not key.endswith("state_dict")})
        other = [name for name in ("dataset", "image_size")
                 if checkpoint["config"].get(name) != checkpoints[0]["config"].get(name)]
        if other:
            raise ValueError(f"{path} was trained on other images than {paths[0]}: there is no plane for both")
    first = checkpoints[0]["config"]
    try:
        dataset = data.load_dataset(first["dataset"], first["data_dir"], first["train_size"], first["seed"],
                                    first["image_size"], first["label_noise"])
    except KeyError as error:
        raise ValueError(f"{paths[0]}: its config lacks {error}") from None
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        if tuple(checkpoint["sizes"]["in_shape"]) != tuple(dataset.x_test.shape[1:]):
            raise ValueError(f"{path} was trained on images of another shape than those of {first['dataset']} in "
                             f"{first['data_dir']}")
    return checkpoints, dataset


def history_of(checkpoints):
    """The accuracies that the checkpoints hold, as columns of a history; None where one was no log step's."""
    def value(entry, *keys):
        for key in keys:
            entry = entry.get(key) if isinstance(entry, dict) else None
        return entry if isinstance(entry, float) else None

    def column(*keys):
        return [value(checkpoint, *keys) for checkpoint in checkpoints]

    attacked = {}
    for name in ("adv_acc", "robust_acc"):
        found = [checkpoint.get(name) for checkpoint in checkpoints]
        keys = dict.fromkeys(key for entry in found if isinstance(entry, dict) for key in entry)
        attacked[name] = {key: column(name, key) for key in keys}
    return {"step": [checkpoint["step"] for checkpoint in checkpoints], **attacked,
            **{name: column(name) for name in ("train_acc", "test_acc", "train_saturated")}}


# ---- the plane ------------------------------------------------------------------------------------------------------

def three_images(dataset, seed=0):
    """Return (x, y): three test images in [0, 1], shape (3, C, H, W), of three classes if there are so many.

    Raises ValueError if there are fewer than three test images.
    """
    if len(dataset.y_test) < 3:
        raise ValueError(f"a plane needs three test images, and {dataset.name} holds {len(dataset.y_test)}")
    order = torch.randperm(len(dataset.y_test), generator=torch.Generator().manual_seed(seed)).tolist()
    first_of_class = {dataset.y_test[i].item(): i for i in reversed(order)}
    chosen = sorted(first_of_class.values(), key=order.index)[:3]
    chosen += [i for i in order if i not in chosen][:3 - len(chosen)]
    return data.pixels(dataset.x_test[chosen], torch.float64), dataset.y_test[chosen]


def plane_through(x):
    """Return (centre, axes, places): the plane through three points.

    x: (3, C, H, W). centre: (C, H, W), their mean. axes: (2, C, H, W), orthonormal, so that distances in the picture
    are Euclidean distances between images. places: (3, 2), where the points lie on it. Raises ValueError if the three
    lie on a line.
    """
    centre = x.mean(0)
    sides = (x[1:] - x[0]).flatten(1).T
    axes, triangle = torch.linalg.qr(sides)
    if triangle.diagonal().abs().min() < 1e-6 * max(1.0, triangle.abs().max().item()):
        raise ValueError("the three test images lie on a line: there is no plane through them")
    places = (x - centre).flatten(1) @ axes
    return centre, axes.T.view(2, *x.shape[1:]), places


def plane_of(dataset):
    """Return (images, labels, centre, axes, places, reach): three test images and their plane, as far as drawn."""
    x, y = three_images(dataset)
    centre, axes, places = plane_through(x)
    return x, y, centre, axes, places, (1 + MARGIN) * places.abs().max().item()


def boundaries(model, centre, axes, reach, raster=RASTER):
    """Return (layers, decision): where units of each layer change sign, and where the predicted class changes.

    The plane is sampled at (raster + 1)^2 points from -reach to reach along both axes. layers: bool (layers, raster,
    raster), true at [l, i, j] if a unit of layer l is positive at point (i, j) and not at its neighbour (i + 1, j) or
    (i, j + 1), or the other way round; decision: bool (raster, raster), the same of the argmax. i counts along the
    second axis, j along the first. The memory is bounded whatever the model: the plane is covered tile by tile. The
    first layer is affine, so it is needed at the centre and along the axes only.
    """
    units = local_complexity.layer_units(model, tuple(centre.shape))
    modules = [model.get_submodule(name) for name in units]
    layers = np.zeros((len(units), raster, raster), dtype=bool)
    decision = np.zeros((raster, raster), dtype=bool)
    parameter = next(model.parameters())
    centre, axes = centre.to(parameter), axes.to(parameter)
    ticks = torch.linspace(-reach, reach, raster + 1, dtype=torch.float64).to(parameter)
    encode, decode = (model.encode, model.decode) if isinstance(model, models.Network) else (nn.Identity(), model)
    with models.evaluating(model), torch.no_grad():
        origin, (step_u, step_v) = encode(centre[None]), encode(axes) - encode(torch.zeros_like(axes[:1]))
    side = max(1, min(raster, math.isqrt(BATCH_NUMBERS // max(origin.numel(), *units.values())) - 1))

    def changes(values):
        """values: (height + 1, width + 1, …), of neighbouring points -> bool (height, width)."""
        here = values[:-1, :-1]
        differs = (here != values[1:, :-1]) | (here != values[:-1, 1:])
        return differs.flatten(2).any(2).cpu().numpy()

    # A convolutional network takes minutes.
    tiles = list(itertools.product(range(0, raster, side), repeat=2))
    for top, left in tqdm(tiles, unit="tile", leave=False, disable=None, delay=2):
        v, u = ticks[top:top + side + 1], ticks[left:left + side + 1]
        shape = len(v), len(u)
        tile = np.s_[top:top + side, left:left + side]

        def watch(module, args, shape=shape, tile=tile):
            layers[modules.index(module)][tile] = changes((args[0] > 0).unflatten(0, shape))

        ones = [1] * step_u.dim()
        points = origin + v.view(-1, 1, *ones) * step_v + u.view(-1, *ones) * step_u
        with local_complexity.pre_hooks(modules, watch), models.evaluating(model), torch.no_grad():
            decision[tile] = changes(decode(points.flatten(0, 1)).argmax(1).view(*shape, 1))
    return layers, decision


def layer_colours(count):
    """One colour a layer, from light to dark: (count, 3), RGB."""
    return matplotlib.colormaps["viridis"](np.linspace(0.8, 0.1, count))[:, :3]


def paint(layers, decision):
    """The picture, (raster, raster, 3): the layers' boundaries on white, the deepest on top, then the decision's."""
    picture = np.ones((*decision.shape, 3))
    for mask, colour in zip(layers, layer_colours(len(layers)), strict=True):
        picture[mask] = colour
    padded = np.pad(decision, 1)  # three pixels wide, to stand out
    thick = np.any([np.roll(padded, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)], axis=0)[1:-1, 1:-1]
    picture[thick] = DECISION
    return picture


# ---- figures --------------------------------------------------------------------------------------------------------

def figure(paths):
    """Return a matplotlib figure: the partition of each checkpoint on the same plane, side by side.

    paths: checkpoint files of runs on the same images. Raises ValueError or OSError, with one line, for a file that is
    no checkpoint, does not fit its own config, or was trained on other images than the first.
    """
    checkpoints, dataset = load_all(paths)
    x, y, centre, axes, places, reach = plane_of(dataset)
    flags = runs.differing_flags(checkpoints)
    titles = ["\n".join(filter(None, [f"step {checkpoint['step']:,}", runs.group_title([checkpoint], flags)]))
              for checkpoint in checkpoints]
    columns = min(len(paths), 3)
    rows = -(-len(paths) // columns)
    panel, thumb, gap = RASTER / panels.DPI, 0.72, 0.25
    head = 0.2 + 0.15 * max(title.count("\n") + 1 for title in titles)
    title = f"{runs.run_title(checkpoints[0], flags)}: the plane through three test images"
    width = thumb + 2 * gap + columns * (panel + gap)
    above = panels.title_inches(title, width)
    fig = Figure((width, above + rows * (head + panel) + 0.75))
    panels.add_title(fig, title)
    for k in range(3):
        draw_image(square(fig, gap, above + head + k * (thumb + 1.5 * gap), thumb), x[k], f"{'ABC'[k]}: class {y[k]}")
    most_layers = 0
    for i, (path, over) in enumerate(zip(paths, titles, strict=True)):
        layers, decision = boundaries(load(path)[1], centre, axes, reach)
        most_layers = max(most_layers, len(layers))
        row, column = divmod(i, columns)
        ax = square(fig, thumb + 2 * gap + column * (panel + gap), above + row * (head + panel) + head, panel)
        draw_plane(ax, paint(layers, decision), places, reach)
        ax.set_title(over, fontsize=SMALL + 1, pad=4)
    add_legend(fig, most_layers, 2 * reach)
    return fig


def square(fig, left, top, side, dpi=panels.DPI):
    """Axes without ticks, in inches; on whole pixels, so that a pixel of the raster is one of the file."""
    bottom = round(dpi * (fig.get_figheight() - top - side)) / dpi
    return panels.add_axes(fig, round(dpi * left) / dpi, fig.get_figheight() - bottom - side, side, side,
                           xticks=[], yticks=[])


def draw_image(ax, image, title):
    ax.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_title(title, fontsize=SMALL, pad=3)


def draw_plane(ax, picture, places, reach):
    """Show the picture and the places of the three images on it; returns what holds the picture."""
    shown = ax.imshow(picture, origin="lower", extent=(-reach, reach, -reach, reach), interpolation="none")
    for letter, (u, v) in zip("ABC", places.tolist(), strict=True):
        ax.plot(u, v, "o", ms=11, mfc="white", mec="black", mew=1)
        ax.text(u, v, letter, ha="center", va="center_baseline", fontsize=SMALL)
    return shown


def add_legend(fig, n_layers, side):
    from matplotlib.lines import Line2D

    colours = layer_colours(n_layers)
    shown = range(n_layers) if n_layers <= 3 else (0, n_layers // 2, n_layers - 1)  # two lines, for which there is room
    handles = [Line2D([], [], color=colours[k], lw=2, label=f"units of layer {k + 1} change sign") for k in shown]
    handles.append(Line2D([], [], color=DECISION, lw=3, label="the predicted class changes"))
    fig.legend(handles=handles, loc="lower center", ncols=2, fontsize=SMALL, frameon=False,
               title=f"side of a panel: {side:.3g} (Euclidean distance between images in [0, 1])", title_fontsize=SMALL)


# ---- films ----------------------------------------------------------------------------------------------------------

def film(paths, out):
    """Write a film of a run's checkpoints, one frame each in the order of their steps, to out (.gif or .mp4).

    Beside the partition stand the accuracies that the checkpoints hold, with a mark that moves. Returns out. Raises
    ValueError or OSError as figure() does, for checkpoints of several runs, and for an MP4 without ffmpeg.
    """
    out = Path(out)
    if out.suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise ValueError(f"{out}: an MP4 is written by ffmpeg, which is not installed; a GIF needs nothing more")
    checkpoints, dataset = load_all(paths)
    flags = runs.differing_flags(checkpoints)
    if flags:
        raise ValueError(f"a film shows one run, and these checkpoints differ in --{flags[0]}: write a PNG")
    order = sorted(range(len(paths)), key=lambda i: checkpoints[i]["step"])
    checkpoints = [checkpoints[i] for i in order]
    plane = plane_of(dataset)
    raster = min(FILM_RASTER, math.isqrt(round(FILM_BYTES / PIXEL_BYTES / len(paths))))
    fig = show = None
    frames = []
    for i in tqdm(order, unit="frame", leave=False, disable=None):
        checkpoint, network = load(paths[i])
        layers, decision = boundaries(network, *plane[2:4], plane[5], raster)
        if fig is None:
            fig, show = film_figure(checkpoints, plane, raster, len(layers))
        frames.append(show(paint(layers, decision), checkpoint["step"]))
    (write_mp4 if out.suffix == ".mp4" else write_gif)(frames, out)
    return out


def film_figure(checkpoints, plane, raster, n_layers):
    """Return (fig, show): show(picture, step) draws a frame and returns it, uint8 (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    x, y, _, _, places, reach = plane
    history = history_of(checkpoints)
    right, least = panels.room_for(panels.accuracy_names([history]))
    title = runs.run_title(checkpoints[0])
    side, left, thumb, height = raster / FILM_DPI, raster / FILM_DPI + 0.9, 0.8, max(2.2, least)
    width = 3 * thumb + 0.3
    top = panels.title_inches(title, left + width + right) + 0.25
    size = left + width + right, max(top + side, top + height + 0.65 + thumb) + 0.75
    fig = Figure(np.ceil(np.multiply(size, FILM_DPI / 2)) * 2 / FILM_DPI, dpi=FILM_DPI)  # even: a video's wish
    canvas = FigureCanvasAgg(fig)
    ax = square(fig, 0.15, top, side, FILM_DPI)
    shown = draw_plane(ax, np.ones((raster, raster, 3)), places, reach)
    beside = panels.add_axes(fig, left, top, width, height)
    panels.step_axis(beside, *panels.span([history]))
    beside.set_ylabel("accuracy", fontsize=SMALL + 1)
    panels.accuracy_panel(beside, [history])
    if statistics.interpolation_index(history["train_acc"]):  # of later checkpoints alone, the first says nothing
        panels.mark_interpolation([beside], [history])
    mark = beside.axvline(0, color="black", lw=1.5, marker="^", markevery=[0], clip_on=False, animated=True)
    for k in range(3):
        draw_image(square(fig, left + k * (thumb + 0.15), top + height + 0.65, thumb, FILM_DPI), x[k],
                   f"{'ABC'[k]}: class {y[k]}")
    panels.add_title(fig, title)
    add_legend(fig, n_layers, 2 * reach)
    canvas.draw()
    still = canvas.copy_from_bbox(fig.bbox)

    def show(picture, step):
        shown.set_data(picture)
        mark.set_xdata([step, step])
        ax.set_title(f"step {step:,}", fontsize=SMALL + 1.5, pad=4)
        canvas.restore_region(still)
        fig.draw_artist(ax)
        beside.draw_artist(mark)
        return np.array(canvas.buffer_rgba())[..., :3]
    return fig, show


def write_gif(frames, path):
    from PIL import Image

    # The colours that are seen most stay as they are: so far apart, Pillow takes none of them for another.
    seen = Image.fromarray(np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]])).getcolors(2**24)
    kept = np.empty((0, 3), dtype=int)
    for _, colour in sorted(seen, reverse=True):
        if len(kept) < 64 and np.all(np.abs(kept - colour).max(axis=1) > 8):
            kept = np.vstack([kept, colour])
    palette = Image.new("P", (1, 1))
    palette.putpalette(kept.ravel().tolist())
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    milliseconds = [round(1000 * FRAME_SECONDS)] * (len(frames) - 1) + [round(1000 * LAST_FRAME_SECONDS)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    files.write_atomically(path, buffer.getvalue())


def write_mp4(frames, path):
    height, width, _ = frames[0].shape
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "film.mp4"
        done = subprocess.run(
            ["ffmpeg", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r",
             str(1 / FRAME_SECONDS), "-i", "-", "-pix_fmt", "yuv420p", str(written)],
            input=b"".join(frame.tobytes() for frame in frames), capture_output=True)
        if done.returncode != 0:
            raise OSError(f"ffmpeg could not write {path}: {done.stderr.decode(errors='replace').strip()[-200:]!r}")
        files.write_atomically(path, written.read_bytes())
