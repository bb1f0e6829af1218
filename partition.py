"""A picture of a network's partition of the input space, on a plane through three test images.

A ReLU network is affine on each of the regions that its units' zero sets cut the input space into (Humayun et al.,
arXiv:2402.15555, Section 3). On a plane these zero sets are lines, broken where they cross the lines of earlier layers.
Drawn for several checkpoints of a run, they show the regions migrate from the training points to the decision boundary.

    python plot.py --partition CHECKPOINT...
"""

import itertools
import math

import numpy as np
import torch

import data
import local_complexity
import models
import plot
import runlog

RASTER = 600  # pixels along each side of a panel
MARGIN = 0.35  # how far the picture reaches beyond the three images, relative to their distance from its centre
DECISION = (0.84, 0.37, 0.0)  # the colour of the decision boundary: vermillion, after Okabe and Ito
BATCH_NUMBERS = 2**22  # of one layer's pre-activations held at once: 16 MB in float32


def load_all(paths):
    """Return (checkpoints, networks, dataset); ValueError names the file that is none of ours or does not go along."""
    checkpoints = [runlog.load_checkpoint(path) for path in paths]
    first, networks = checkpoints[0]["config"], []
    try:
        dataset = data.load_dataset(first["dataset"], first["data_dir"], first["train_size"], first["seed"],
                                    first["image_size"], first["label_noise"])
    except KeyError as error:
        raise ValueError(f"{paths[0]}: its config lacks {error}") from None
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        other = [checkpoint["config"].get(name) != first[name] for name in ("dataset", "image_size")]
        if any(other):
            raise ValueError(f"{path} was trained on other images than {paths[0]}: there is no plane for both")
        try:
            networks.append(models.load_network(checkpoint))
        except KeyError as error:
            raise ValueError(f"{path}: its config lacks {error}") from None
        except RuntimeError:
            raise ValueError(f"{path}: its weights do not fit the network that its config describes") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return checkpoints, networks, dataset


def three_images(dataset, seed=0):
    """Return (x, y): three test images in [0, 1], shape (3, C, H, W), of three classes if there are so many."""
    order = torch.randperm(len(dataset.y_test), generator=torch.Generator().manual_seed(seed)).tolist()
    first_of_class = {dataset.y_test[i].item(): i for i in reversed(order)}
    chosen = sorted(first_of_class.values(), key=order.index)[:3]
    chosen += [i for i in order if i not in chosen][:3 - len(chosen)]
    return dataset.x_test[chosen].double() / 255, dataset.y_test[chosen]


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
    encode, decode = (model.encode, model.decode) if isinstance(model, models.Network) else (torch.nn.Identity(), model)
    with models.evaluating(model), torch.no_grad():
        origin, (step_u, step_v) = encode(centre[None]), encode(axes) - encode(torch.zeros_like(axes[:1]))
    side = max(1, min(raster, math.isqrt(BATCH_NUMBERS // max(origin.numel(), *units.values())) - 1))

    def changes(values):
        """values: (height + 1, width + 1, …), of neighbouring points -> bool (height, width)."""
        here = values[:-1, :-1]
        differs = (here != values[1:, :-1]) | (here != values[:-1, 1:])
        return differs.flatten(2).any(2).cpu().numpy()

    for top, left in itertools.product(range(0, raster, side), repeat=2):
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
    import matplotlib

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


def figure(paths):
    """Return a matplotlib figure: the partition of each checkpoint on the same plane, side by side.

    paths: checkpoint files of runs on the same images. Raises ValueError or OSError, with one line, for a file that is
    no checkpoint, does not fit its own config, or was trained on other images than the first.
    """
    from matplotlib.figure import Figure

    checkpoints, networks, dataset = load_all(paths)
    x, y = three_images(dataset)
    centre, axes, places = plane_through(x)
    reach = (1 + MARGIN) * places.abs().max().item()

    flags = plot.differing_flags(checkpoints)
    titles = ["\n".join(filter(None, [f"step {checkpoint['step']:,}", plot.group_title([checkpoint], flags)]))
              for checkpoint in checkpoints]
    columns = min(len(paths), 3)
    rows = -(-len(paths) // columns)
    panel, thumb, gap = RASTER / plot.DPI, 0.72, 0.25
    head = 0.2 + 0.15 * max(title.count("\n") + 1 for title in titles)
    width, height = thumb + 2 * gap + columns * (panel + gap), 0.3 + rows * (head + panel) + 0.75
    fig = Figure((width, height))

    def square(left, top, side):
        """Axes without ticks, in inches; on whole pixels, so that a pixel of the raster is one of the PNG."""
        place = np.round(plot.DPI * np.array([left, height - top - side, side, side])) / plot.DPI
        return fig.add_axes(place / [width, height, width, height], xticks=[], yticks=[])

    for k, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
        ax = square(gap, 0.3 + head + k * (thumb + 1.5 * gap), thumb)
        ax.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_title(f"{'ABC'[k]}: class {label}", fontsize=plot.SMALL, pad=3)
    for i, (network, title) in enumerate(zip(networks, titles, strict=True)):
        layers, decision = boundaries(network, centre, axes, reach)
        row, column = divmod(i, columns)
        ax = square(thumb + 2 * gap + column * (panel + gap), 0.3 + row * (head + panel) + head, panel)
        ax.imshow(paint(layers, decision), origin="lower", extent=(-reach, reach, -reach, reach), interpolation="none")
        mark_images(ax, places.tolist())
        ax.set_title(title, fontsize=plot.SMALL + 1, pad=4)

    title = f"{plot.run_title(checkpoints[0], flags)}: the plane through three test images"
    fig.text(0.5, 1 - 0.2 / height, title, ha="center", va="center", fontsize=plot.SMALL + 2)
    add_legend(fig, max(len(local_complexity.layer_units(network, x.shape[1:])) for network in networks), 2 * reach)
    return fig


def mark_images(ax, places):
    for letter, (u, v) in zip("ABC", places, strict=True):
        ax.plot(u, v, "o", ms=11, mfc="white", mec="black", mew=1)
        ax.text(u, v, letter, ha="center", va="center_baseline", fontsize=plot.SMALL)


def add_legend(fig, n_layers, side):
    from matplotlib.lines import Line2D

    colours = layer_colours(n_layers)
    shown = range(n_layers) if n_layers <= 6 else (0, n_layers // 2, n_layers - 1)
    handles = [Line2D([], [], color=colours[k], lw=2, label=f"units of layer {k + 1} change sign") for k in shown]
    handles.append(Line2D([], [], color=DECISION, lw=3, label="the predicted class changes"))
    fig.legend(handles=handles, loc="lower center", ncols=2, fontsize=plot.SMALL, frameon=False,
               title=f"side of a panel: {side:.3g} (Euclidean distance between images in [0, 1])",
               title_fontsize=plot.SMALL)
