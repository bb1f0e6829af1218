"""The networks: a fully connected MLP, a plain CNN and a pre-activation ResNet-18.

Every model takes images in [0, 1], shape (N, C, H, W), and returns logits, shape (N, num_classes). It normalises
them in its first layer, so that an attack's epsilon and the radius of local complexity are in pixel units for every
data set. Each non-linearity is a module of its own and is used once in the forward pass: its input is the
pre-activation whose sign local complexity watches. model(x) is model.decode(model.encode(x)), where encode is affine:
the normalisation and the first linear or convolutional layer.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh}


class Normalize(nn.Module):
    """(x - mean) / std for each channel."""

    def __init__(self, mean, std, channels):
        super().__init__()
        mean = [0.0] * channels if mean is None else mean
        std = [1.0] * channels if std is None else std
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


class Network(nn.Module):
    """A network in two parts: encode, which is affine and ends before the first non-linearity or norm, and decode."""

    def forward(self, x):
        return self.decode(self.encode(x))


class MLP(Network):
    """`depth` linear layers, the hidden ones `width` units wide (Section 4 of the paper: depth 4, width 200)."""

    def __init__(self, in_shape, num_classes, depth, width, activation, batch_norm, mean, std):
        super().__init__()
        channels, height, image_width = in_shape
        features = channels * height * image_width
        layers = []
        for _ in range(depth - 1):
            layers.append(nn.Linear(features, width))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width))
            layers.append(activation())
            features = width
        layers.append(nn.Linear(features, num_classes))
        self.normalize = Normalize(mean, std, channels)
        self.layers = nn.Sequential(*layers)

    def encode(self, x):
        return self.layers[0](self.normalize(x).flatten(1))

    def decode(self, hidden):
        for layer in list(self.layers)[1:]:
            hidden = layer(hidden)
        return hidden


class CNN(Network):
    """Five 3x3 convolutions (three of them halve the resolution), the spatial mean, two linear layers."""

    def __init__(self, in_shape, num_classes, width, activation, batch_norm, mean, std):
        super().__init__()
        channels = in_shape[0]
        self.normalize = Normalize(mean, std, channels)
        layers = []
        for out_channels, stride in [(width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 2)]:
            layers.append(nn.Conv2d(channels, out_channels, 3, stride, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(activation())
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels, 4 * width), activation(), nn.Linear(4 * width, num_classes)
        )

    def encode(self, x):
        return self.features[0](self.normalize(x))

    def decode(self, hidden):
        for layer in list(self.features)[1:]:
            hidden = layer(hidden)
        return self.classifier(hidden.mean((2, 3)))


class PreActBlock(nn.Module):
    """norm, activation, convolution, twice, added to the shortcut (He et al. 2016, arXiv:1603.05027, Fig. 1b)."""

    def __init__(self, in_channels, out_channels, stride, activation, batch_norm):
        super().__init__()

        def norm(channels):
            return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()

        bias = not batch_norm
        self.norm1, self.act1 = norm(in_channels), activation()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)
        self.norm2, self.act2 = norm(out_channels), activation()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        out = self.act1(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return shortcut + self.conv2(self.act2(self.norm2(out)))


class ResNet18(Network):
    """Pre-activation ResNet-18 with a 3x3 stem; the four stages have width, 2, 4 and 8 times width channels."""

    def __init__(self, in_shape, num_classes, width, activation, batch_norm, mean, std):
        super().__init__()
        self.normalize = Normalize(mean, std, in_shape[0])
        self.stem = nn.Conv2d(in_shape[0], width, 3, padding=1)
        blocks, channels = [], width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(PreActBlock(channels, width * 2**stage, stride, activation, batch_norm))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        self.act = activation()
        self.classifier = nn.Linear(channels, num_classes)

    def encode(self, x):
        return self.stem(self.normalize(x))

    def decode(self, hidden):
        hidden = self.blocks(hidden)
        return self.classifier(self.act(self.norm(hidden)).mean((2, 3)))


@dataclass(frozen=True)
class Architecture:
    """A network of MODELS: its class, and the width and depth it has by default (depth None: it is fixed)."""

    network: type
    width: int
    depth: int | None = None


MODELS = {"mlp": Architecture(MLP, width=200, depth=4), "cnn": Architecture(CNN, width=32),
          "resnet18": Architecture(ResNet18, width=16)}


def build_model(name, in_shape, num_classes, *, depth=None, width=None, activation="relu", batch_norm=False,
                init_scale=1.0, mean=None, std=None):
    """Return a freshly initialised network; the weights come from PyTorch's global random generator.

    name: "mlp", "cnn" or "resnet18". in_shape: (C, H, W). depth: number of linear layers, MLP only (default 4).
    width: hidden units (mlp, 200), channels of the first convolution (cnn, 32; resnet18, 16).
    init_scale: factor on every initial weight and bias; above 1 it delays generalisation (Liu et al. 2023,
    "Omnigrok", arXiv:2210.01117). mean, std: one value a channel, in pixel units of [0, 1] (default 0 and 1).

    Raises ValueError for an unknown name or activation, a size below 1, or a depth given to another model.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model '{name}': choose from {', '.join(MODELS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation '{activation}': choose from {', '.join(ACTIVATIONS)}")
    architecture = MODELS[name]
    size = {"width": architecture.width if width is None else width}
    if architecture.depth is not None:
        size["depth"] = architecture.depth if depth is None else depth
    elif depth is not None:
        raise ValueError(f"depth can be chosen for the mlp only; the {name}'s is fixed")
    if size["width"] < 1 or size.get("depth", 2) < 2:
        raise ValueError(f"a network needs depth >= 2 and width >= 1, not depth {depth} and width {width}")

    model = architecture.network(in_shape, num_classes, activation=ACTIVATIONS[activation], batch_norm=batch_norm,
                                 mean=mean, std=std, **size)
    if init_scale != 1.0:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    for parameter in module.parameters():
                        parameter.mul_(init_scale)
    return model


def from_config(config, in_shape, num_classes, mean=None, std=None):
    """Return the network that a run's config (a dict) describes, freshly initialised, in the config's dtype.

    in_shape, num_classes, mean and std as in build_model; so are the errors.
    """
    options = ("depth", "width", "activation", "batch_norm", "init_scale")
    model = build_model(config["model"], tuple(in_shape), num_classes, mean=mean, std=std,
                        **{name: config[name] for name in options if name in config})
    return model.to(getattr(torch, config.get("dtype", "float32")))


def load_network(checkpoint):
    """Return the network of a checkpoint (a dict, as train.py writes it), in eval mode, on the CPU.

    Raises ValueError, in one line, if its parts do not fit together.
    """
    try:
        config, sizes, state = checkpoint["config"], checkpoint["sizes"], checkpoint["model_state_dict"]
        model = from_config(config, sizes["in_shape"], sizes["num_classes"])
        model.load_state_dict(state)
    except KeyError as error:
        raise ValueError(f"its config lacks {error}") from None
    except (RuntimeError, TypeError, AttributeError):
        raise ValueError("its weights do not fit the network that its config describes") from None
    return model.eval()


@contextmanager
def evaluating(model):
    """Hold the model in eval mode and its parameters free of gradients; afterwards every flag is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
