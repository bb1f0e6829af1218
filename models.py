"""The networks: a fully connected MLP, a plain CNN and a pre-activation ResNet-18.

Every model takes images in [0, 1], shape (N, C, H, W), and returns logits, shape (N, num_classes). It normalises
them in its first layer, so that an attack's epsilon and the radius of local complexity are in pixel units for every
data set. Each non-linearity is a module of its own and is used once in the forward pass: its input is the
pre-activation whose sign local complexity watches.
"""

import torch
from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh}
DEFAULT_WIDTH = {"mlp": 200, "cnn": 32, "resnet18": 16}
DEFAULT_DEPTH = 4


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


class MLP(nn.Module):
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

    def forward(self, x):
        return self.layers(self.normalize(x).flatten(1))


class CNN(nn.Module):
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

    def forward(self, x):
        return self.classifier(self.features(self.normalize(x)).mean((2, 3)))


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


class ResNet18(nn.Module):
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

    def forward(self, x):
        x = self.blocks(self.stem(self.normalize(x)))
        return self.classifier(self.act(self.norm(x)).mean((2, 3)))


def build_model(name, in_shape, num_classes, *, depth=None, width=None, activation="relu", batch_norm=False,
                init_scale=1.0, mean=None, std=None):
    """Return a freshly initialised network; the weights come from PyTorch's global random generator.

    name: "mlp", "cnn" or "resnet18". in_shape: (C, H, W). depth: number of linear layers, MLP only (default 4).
    width: hidden units (mlp, 200), channels of the first convolution (cnn, 32; resnet18, 16).
    init_scale: factor on every initial weight and bias; above 1 it delays generalisation (Liu et al. 2023,
    "Omnigrok", arXiv:2210.01117). mean, std: one value a channel, in pixel units of [0, 1] (default 0 and 1).

    Raises ValueError for an unknown name or activation, a size below 1, or a depth given to another model.
    """
    if name not in DEFAULT_WIDTH:
        raise ValueError(f"unknown model '{name}': choose from {', '.join(DEFAULT_WIDTH)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation '{activation}': choose from {', '.join(ACTIVATIONS)}")
    if depth is not None and name != "mlp":
        raise ValueError(f"depth can be chosen for the mlp only; the {name}'s is fixed")
    depth = DEFAULT_DEPTH if depth is None else depth
    width = DEFAULT_WIDTH[name] if width is None else width
    if depth < 2 or width < 1:
        raise ValueError(f"a network needs depth >= 2 and width >= 1, not depth {depth} and width {width}")

    common = (ACTIVATIONS[activation], batch_norm, mean, std)
    if name == "mlp":
        model = MLP(in_shape, num_classes, depth, width, *common)
    elif name == "cnn":
        model = CNN(in_shape, num_classes, width, *common)
    else:
        model = ResNet18(in_shape, num_classes, width, *common)
    if init_scale != 1.0:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    for parameter in module.parameters():
                        parameter.mul_(init_scale)
    return model
