"""The networks: a fully connected MLP, a plain CNN and a pre-activation ResNet-18.

Every model takes images in [0, 1], shape (N, C, H, W), and returns logits, shape (N, num_classes). It normalises the
images in its first layer, so that an attack's epsilon and the radius of local complexity are in pixel units for every
data set. Each non-linearity is a module of its own, used once in the forward pass: its input is the pre-activation
whose sign local complexity watches.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flags import IMPLIED

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh}


class Normalize(nn.Module):
    """(x - mean) / std for each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int):
        super().__init__()
        self.register_buffer("mean", (torch.zeros(channels) if mean is None else torch.tensor(mean)).view(-1, 1, 1))
        self.register_buffer("std", (torch.ones(channels) if std is None else torch.tensor(std)).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Network(nn.Module):
    """A network in two parts: encode, which is affine and ends before the first non-linearity or norm, and decode."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]

    def __init__(self, in_shape: Sequence[int], mean: Sequence[float] | None, std: Sequence[float] | None):
        super().__init__()
        self.normalize = Normalize(mean, std, in_shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class MLP(Network):
    """`depth` linear layers; the hidden ones are `width` units wide (Section 4 of the paper: depth 4, width 200)."""

    def __init__(self, in_shape: Sequence[int], num_classes: int, depth: int, width: int, activation: type[nn.Module],
                 batch_norm: bool, **statistics: Any):
        super().__init__(in_shape, **statistics)
        features = math.prod(in_shape)
        layers: list[nn.Module] = []
        for _ in range(depth - 1):
            norm = [nn.BatchNorm1d(width)] if batch_norm else []
            layers += [nn.Linear(features, width), *norm, activation()]
            features = width
        self.layers = nn.Sequential(*layers, nn.Linear(features, num_classes))

    def encode(self, x: Tensor) -> Tensor:
        return self.layers[0](self.normalize(x).flatten(1))

    def decode(self, hidden: Tensor) -> Tensor:
        for layer in list(self.layers)[1:]:
            hidden = layer(hidden)
        return hidden


class CNN(Network):
    """Five 3x3 convolutions (three of them halve the resolution), the spatial mean, two linear layers."""

    def __init__(self, in_shape: Sequence[int], num_classes: int, width: int, activation: type[nn.Module],
                 batch_norm: bool, **statistics: Any):
        super().__init__(in_shape, **statistics)
        channels = in_shape[0]
        layers: list[nn.Module] = []
        for out_channels, stride in [(width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 2)]:
            norm = [nn.BatchNorm2d(out_channels)] if batch_norm else []
            layers += [nn.Conv2d(channels, out_channels, 3, stride, padding=1), *norm, activation()]
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels, 4 * width), activation(), nn.Linear(4 * width, num_classes))

    def encode(self, x: Tensor) -> Tensor:
        return self.features[0](self.normalize(x))

    def decode(self, hidden: Tensor) -> Tensor:
        for layer in list(self.features)[1:]:
            hidden = layer(hidden)
        return self.classifier(hidden.mean((2, 3)))


class PreActBlock(nn.Module):
    """Norm, activation and convolution, twice, added to the shortcut (He et al. 2016, arXiv:1603.05027, Fig. 1b)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: type[nn.Module], batch_norm: bool):
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else nn.Identity
        self.norm1, self.act1 = norm(in_channels), activation()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=not batch_norm)
        self.norm2, self.act2 = norm(out_channels), activation()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=not batch_norm)
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = None if same_shape else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv2(self.act2(self.norm2(self.conv1(out))))


class ResNet18(Network):
    """Pre-activation ResNet-18 with a 3x3 stem; the four stages have width, 2, 4 and 8 times width channels."""

    def __init__(self, in_shape: Sequence[int], num_classes: int, width: int, activation: type[nn.Module],
                 batch_norm: bool, **statistics: Any):
        super().__init__(in_shape, **statistics)
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

    def encode(self, x: Tensor) -> Tensor:
        return self.stem(self.normalize(x))

    def decode(self, hidden: Tensor) -> Tensor:
        hidden = self.blocks(hidden)
        return self.classifier(self.act(self.norm(hidden)).mean((2, 3)))


MODELS: dict[str, Callable[..., Network]] = {"mlp": MLP, "cnn": CNN, "resnet18": ResNet18}


def build_model(name: str, in_shape: Sequence[int], num_classes: int, *, depth: int | None = None,
                width: int | None = None, activation: str = "relu", batch_norm: bool = False, init_scale: float = 1.0,
                mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Network:
    """Return a freshly initialised network; the weights come from PyTorch's global random generator.

    name: a key of MODELS. in_shape: (C, H, W). depth: number of linear layers, MLP only (default 4). width: hidden
    units (mlp, 200), channels of the first convolution (cnn, 32; resnet18, 16). activation: a key of ACTIVATIONS.
    init_scale: factor on every initial weight and bias; above 1 it delays generalisation (Liu et al. 2023,
    "Omnigrok", arXiv:2210.01117). mean, std: one value for each channel, in pixel units of [0, 1] (default 0 and 1).

    Raises ValueError for an unknown name or activation, a size below 1, or a depth given to another model.
    """
    for what, value, known in (("model", name, MODELS), ("activation", activation, ACTIVATIONS)):
        if value not in known:
            raise ValueError(f"unknown {what} '{value}': choose from {', '.join(known)}")
    if depth is not None and name not in IMPLIED["depth"]:
        raise ValueError(f"depth can be chosen for the mlp only; the {name}'s is fixed")
    size = {"width": IMPLIED["width"][name] if width is None else width}
    if name in IMPLIED["depth"]:
        size["depth"] = IMPLIED["depth"][name] if depth is None else depth
    if size["width"] < 1 or size.get("depth", 2) < 2:
        raise ValueError(f"a network needs depth >= 2 and width >= 1, not depth {depth} and width {width}")

    model = MODELS[name](in_shape, num_classes, activation=ACTIVATIONS[activation], batch_norm=batch_norm, mean=mean,
                         std=std, **size)
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        for parameter in nn.ModuleList(layers).parameters():
            parameter.mul_(init_scale)
    return model


def from_config(config: Mapping[str, Any], in_shape: Sequence[int], num_classes: int,
                mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Network:
    """Return the network that a run's config describes, freshly initialised, in the config's dtype.

    The other arguments and the errors are those of build_model.
    """
    options = ("depth", "width", "activation", "batch_norm", "init_scale")
    model = build_model(config["model"], in_shape, num_classes, mean=mean, std=std,
                        **{name: config[name] for name in options if name in config})
    return model.to(getattr(torch, config.get("dtype", "float32")))


def load_network(checkpoint: Mapping[str, Any], path: str | Path = "checkpoint") -> Network:
    """Return the network of a checkpoint (a dict, as train.py writes it), in eval mode, on the CPU. ValueError, in one
    line that begins with path, if its weights do not fit its config."""
    config, sizes = checkpoint["config"], checkpoint["sizes"]
    model = from_config(config, sizes["in_shape"], sizes["num_classes"])
    load_weights(model, checkpoint, path)
    return model.eval()


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Load the weights of the checkpoint in path; ValueError, in one line, if they do not fit the model."""
    try:
        model.load_state_dict(checkpoint["model_state_dict"])
    except (RuntimeError, AttributeError):
        raise ValueError(f"{path}: its weights do not fit the network that its config describes") from None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold the model in eval mode and its parameters free of gradients; afterwards every flag is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)
