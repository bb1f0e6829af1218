"""Local complexity against its definition, computed one image at a time in float64."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from local_complexity import layer_units, local_complexity, random_directions
from models import build_model

KINDS = (nn.ReLU, nn.GELU, nn.LeakyReLU, nn.Tanh)


def definition(model, x, radius, directions, kinds=KINDS):
    """The counts as the definition reads: a pass for each vertex, the signs of all of them kept and compared."""
    model.eval()
    signs = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: signs[-1].append(torch.sign(args[0]).flatten()))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    counts = []
    for image in x:
        signs.clear()
        for direction in directions:
            for side in (1, -1):
                signs.append([])
                with torch.no_grad():
                    model((image + side * radius * direction.view_as(image)).unsqueeze(0))
        layers = [torch.stack(layer) for layer in zip(*signs, strict=True)]
        counts.append([int((layer != layer[0]).any(0).sum()) for layer in layers])
    for hook in hooks:
        hook.remove()
    return torch.tensor(counts)


def make(name, in_shape, seed=0, **kwargs):
    """A float64 model in eval mode whose batch norms are far from the identity."""
    torch.manual_seed(seed)
    channels = in_shape[0]
    model = build_model(name, in_shape, 10, mean=[0.3] * channels, std=[0.25] * channels, **kwargs).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def points_and_directions(in_shape, n_points=3, n_directions=4):
    x = torch.rand(n_points, *in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, random_directions(n_directions, x[0].numel(), seed=2, dtype=torch.float64)


MODELS = [
    ("mlp", (1, 8, 8), dict(depth=2, width=30)),
    ("mlp", (3, 8, 8), dict(depth=4, width=30, batch_norm=True, activation="leaky_relu")),
    ("mlp", (1, 28, 28), dict(depth=3, width=40, activation="tanh")),
    ("cnn", (1, 8, 8), dict(width=4, activation="gelu")),
    ("cnn", (3, 16, 16), dict(width=3, batch_norm=True)),
    ("resnet18", (1, 8, 8), dict(width=4, batch_norm=True)),
    ("resnet18", (3, 12, 12), dict(width=2, activation="gelu")),
]


@pytest.mark.parametrize("name, in_shape, kwargs", MODELS)
@pytest.mark.parametrize("radius", [0.3, 3.0])
def test_counts_equal_the_definition(name, in_shape, kwargs, radius):
    model = make(name, in_shape, **kwargs)
    x, directions = points_and_directions(in_shape)
    expected = definition(model, x, radius, directions)
    counts = local_complexity(model, x, radius, directions)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, expected)
    assert counts.shape == (len(x), len(layer_units(model, in_shape)))
    assert 0 < counts.sum() < len(x) * sum(layer_units(model, in_shape).values())


def test_training_mode_of_the_caller_does_not_change_the_counts():
    model = make("cnn", (1, 8, 8), width=4, batch_norm=True)
    x, directions = points_and_directions((1, 8, 8))
    expected = definition(model, x, 0.3, directions)
    statistics = [buffer.clone() for buffer in model.buffers()]
    model.train()
    assert torch.equal(local_complexity(model, x, 0.3, directions), expected)
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))


@pytest.mark.parametrize("batch_size", [None, 1])
def test_an_exact_zero_is_a_sign_of_its_own(batch_size):
    """Points 0.5 ± 0.5 on the first two of four pixels; binary fractions, so that every zero is exact."""
    directions = torch.eye(4)[:2]
    x = torch.tensor([0.5, 0.75, 0.0, 0.25]).view(1, 1, 2, 2)
    linear = nn.Linear(4, 6)
    rows = {
        "positive and zero": [1, 0, 0, 0],
        "negative and zero": [-1, 0, 0, 0],
        "always zero": [0, 0, 1, 0],
        "always positive": [0, 0, 0, 1],
        "positive and negative": [1, -1, 0, 0],
        "always negative": [0, -1, 0, 0],
    }
    linear.weight.data = torch.tensor(list(rows.values()), dtype=torch.float32)
    linear.bias.data.zero_()
    model = nn.Sequential(nn.Flatten(), linear, nn.ReLU())
    assert local_complexity(model, x, 0.5, directions, batch_size).tolist() == [[3]]
    assert definition(model, x, 0.5, directions).tolist() == [[3]]


@pytest.mark.parametrize("name", ["mlp", "resnet18"])
def test_several_radii_equal_single_calls(name):
    model = make(name, (1, 8, 8), width=4, batch_norm=True)
    x, directions = points_and_directions((1, 8, 8), n_points=5)
    radii = [0.5, 0.01, 2]
    together = local_complexity(model, x, radii, directions)
    assert together.shape == (3, 5, len(layer_units(model, (1, 8, 8))))
    assert torch.equal(together, torch.stack([local_complexity(model, x, r, directions) for r in radii]))
    assert torch.equal(local_complexity(model, x, [0.5], directions), together[:1])


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("batch_size", [1, 8, 17, 1000])
def test_batch_size_bounds_every_pass_and_keeps_the_counts(name, batch_size):
    model = make(name, (1, 8, 8), width=4)
    x, directions = points_and_directions((1, 8, 8), n_points=5)
    expected = definition(model, x, 0.4, directions)
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(max(len(args[0]), len(output))))
    assert torch.equal(local_complexity(model, x, 0.4, directions, batch_size), expected)
    assert max(seen) <= batch_size


class Odd(nn.Module):
    """Not affine up to its first linear layer, or not cut in two by it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.unused = nn.Linear(3, 3)
        self.first, self.second = nn.Linear(64, 20), nn.Linear(20 if kind != "bypass" else 84, 10)
        self.act1, self.act2 = nn.ReLU(), nn.Tanh()

    def forward(self, x):
        x = x.flatten(1)
        if self.kind == "clamp":
            x = x.clamp(0, 1)
        if self.kind == "activation first":
            x = self.act1(x - 0.5)
        h = self.first(x)
        if self.kind != "activation first":
            h = self.act1(h)
        if self.kind == "bypass":
            h = torch.cat([h, x], 1)
        return self.act2(self.second(h))


@pytest.mark.parametrize("kind", ["clamp", "activation first", "bypass", "none"])
def test_a_model_that_does_not_begin_with_a_linear_layer(kind):
    torch.manual_seed(0)
    model = Odd(kind).double()
    x, directions = points_and_directions((1, 8, 8), n_points=8)
    for radius in (0.05, 1.0):
        assert torch.equal(local_complexity(model, x, radius, directions), definition(model, x, radius, directions))


class Autoencoder(Odd):
    """A module of somebody else that has an encode and a decode of its own."""

    def encode(self, x):
        raise AssertionError("this is not a models.Network")

    decode = encode


def test_only_our_networks_are_cut_in_two():
    torch.manual_seed(0)
    model = Autoencoder("none").double()
    x, directions = points_and_directions((1, 8, 8))
    assert torch.equal(local_complexity(model, x, 0.3, directions), definition(model, x, 0.3, directions))


class Sine(nn.Module):
    def forward(self, x):
        return (3 * x).sin()


def test_an_activation_is_one_entry_of_the_registry(monkeypatch):
    monkeypatch.setitem(models.ACTIVATIONS, "sine", Sine)
    model = make("cnn", (1, 8, 8), width=4, activation="sine")
    x, directions = points_and_directions((1, 8, 8))
    counts = local_complexity(model, x, 0.3, directions)
    assert counts.shape == (3, 6) and torch.equal(counts, definition(model, x, 0.3, directions, Sine))


@pytest.mark.parametrize("kind", [nn.SiLU, nn.ELU, nn.Sigmoid, nn.Hardtanh, nn.PReLU, nn.RReLU])
def test_pytorchs_activations_are_layers(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), kind(), nn.Linear(30, 20), kind()).double()
    x, directions = points_and_directions((1, 8, 8))
    assert layer_units(model, (1, 8, 8)) == {"2": 30, "4": 20}
    counts = local_complexity(model, x, 1.0, directions)
    assert counts.sum() > 0 and torch.equal(counts, definition(model, x, 1.0, directions, kind))


def test_a_softmax_is_no_layer():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.GLU(), nn.Linear(10, 10), nn.Softmax(1))
    assert layer_units(model, (1, 8, 8)) == {"2": 20}


class DarkRoom(nn.Module):
    """The identity, but the first unit is not a number where it is above a limit."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, h):
        return torch.cat([torch.where(h[:, :1] > self.limit, math.nan, h[:, :1]), h[:, 1:]], 1)


@pytest.mark.parametrize("batch_size", [None, 7, 1])
def test_what_is_not_a_number_has_no_count(batch_size):
    """-1 for a point and a layer if a single vertex gives NaN there; the layers before it and other points count."""
    torch.manual_seed(0)
    first = nn.Linear(64, 10)
    first.weight.data[0], first.bias.data[0] = 1 / 8, 0.0  # the first unit: eight times the mean
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), DarkRoom(4.9), nn.Linear(10, 20), nn.ReLU()).double()
    x, directions = points_and_directions((1, 8, 8), n_points=4)
    directions[0] = 1 / 8  # towards brighter images; the others keep the mean
    directions[1:] -= (directions[1:] @ directions[0])[:, None] * directions[0]
    directions = torch.linalg.qr(directions.T).Q.T.contiguous()
    x = x - x.mean((1, 2, 3), keepdim=True) + torch.tensor([0.3, 0.6, 0.61, 0.9], dtype=x.dtype).view(4, 1, 1, 1)
    with_numbers = nn.Sequential(*(nn.Identity() if isinstance(layer, DarkRoom) else layer for layer in model))
    expected = definition(with_numbers, x, 0.05, directions)
    expected[2:, 1] = -1  # 4.88 + 0.05 is above 4.9, 4.8 + 0.05 below
    assert torch.equal(local_complexity(model, x, 0.05, directions, batch_size), expected)
    before = nn.Sequential(*(model[i] for i in (0, 1, 3, 2, 4, 5)))  # one unit of the first layer
    expected[2:] = -1
    assert torch.equal(local_complexity(before, x, 0.05, directions, batch_size), expected)
    first.weight.data.fill_(math.nan)
    assert (local_complexity(model, x, [0.05, 1.0], directions, batch_size) == -1).all()


def test_vertices_go_no_further_than_the_last_layer():
    model = make("cnn", (1, 8, 8), width=4)
    x, directions = points_and_directions((1, 8, 8))
    last = model.classifier[-1]
    seen = []
    last.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    assert torch.equal(local_complexity(model, x, 0.3, directions), definition(model, x, 0.3, directions))
    assert sum(seen) <= 1 + len(x) * 2 * len(directions)  # those of the definition, and the blank image of layer_units


def test_layer_units_are_named_in_forward_order():
    assert layer_units(make("mlp", (1, 8, 8), depth=3, width=7, batch_norm=True), (1, 8, 8)) == {
        "layers.2": 7, "layers.5": 7
    }
    units = layer_units(make("resnet18", (3, 8, 8), width=2), (3, 8, 8))
    assert list(units)[:3] == ["blocks.0.act1", "blocks.0.act2", "blocks.1.act1"] and list(units)[-1] == "act"
    assert list(units.values()) == [128] * 5 + [64] * 4 + [32] * 4 + [16] * 3 + [16]


class Fragile(nn.Module):
    """The identity; fails at a given call."""

    def __init__(self, fails_at):
        super().__init__()
        self.calls_left = fails_at

    def forward(self, x):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise RuntimeError("out of order")
        return x


@pytest.mark.parametrize("fails_at", [0, 1, 2, 15])
def test_modes_and_hooks_are_as_before(fails_at):
    """Also when the model fails: while its layers are listed, among the vertices."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.Dropout(), Fragile(fails_at),
                          nn.ReLU(), nn.Linear(20, 5)).double()
    model.train()
    model[2].eval()
    model[1].weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    x, directions = points_and_directions((1, 8, 8), n_points=20)
    if fails_at:
        with pytest.raises(RuntimeError, match="out of order"):
            local_complexity(model, x, 0.1, directions, batch_size=8)
    else:
        local_complexity(model, x, 0.1, directions, batch_size=8)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_random_directions_are_orthonormal_and_fixed_by_the_seed():
    directions = random_directions(25, 784, seed=5)
    assert directions.shape == (25, 784) and directions.dtype == torch.float32
    assert torch.allclose(directions @ directions.T, torch.eye(25), atol=1e-5)
    assert torch.equal(directions, random_directions(25, 784, seed=5))
    assert not torch.allclose(directions, random_directions(25, 784, seed=6), atol=1e-2)
    square = random_directions(9, 9, dtype=torch.float64)
    assert torch.allclose(square.T @ square, torch.eye(9, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("n_directions", [0, 11])
def test_random_directions_that_cannot_exist(n_directions):
    with pytest.raises(ValueError, match="orthonormal"):
        random_directions(n_directions, 10)


@pytest.mark.parametrize("radius", [0, -0.1, float("nan"), float("inf"), [], [0.1, 0], [[0.1]]])
def test_bad_radius(radius):
    x, directions = points_and_directions((1, 8, 8))
    with pytest.raises(ValueError, match="radius"):
        local_complexity(make("mlp", (1, 8, 8), width=4), x, radius, directions)


def test_bad_directions_points_and_batch_size():
    model = make("mlp", (1, 8, 8), width=4)
    x, directions = points_and_directions((1, 8, 8))
    for bad in (directions[:, :-1], directions[0], directions[:0], directions.view(-1, 1, 8, 8)):
        with pytest.raises(ValueError, match="shape"):
            local_complexity(model, x, 0.1, bad)
    for bad in (2 * directions, torch.ones_like(directions) / 8, directions * float("nan")):
        with pytest.raises(ValueError, match="orthonormal"):
            local_complexity(model, x, 0.1, bad)
    with pytest.raises(ValueError, match="floating point"):
        local_complexity(model, (255 * x).to(torch.uint8), 0.1, directions)
    with pytest.raises(ValueError, match="batch_size"):
        local_complexity(model, x, 0.1, directions, batch_size=0)


def test_models_whose_layers_cannot_be_counted():
    x, directions = points_and_directions((1, 8, 8))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    with pytest.raises(ValueError, match="no activation module"):
        local_complexity(linear, x, 0.1, directions)
    relu = nn.ReLU()
    shared = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), relu, nn.Linear(10, 10), relu).double()
    with pytest.raises(ValueError, match="used twice"):
        local_complexity(shared, x, 0.1, directions)


class Folded(nn.Module):
    """Eight rows of the batch for each image, as in a network over patches, or one for all images together."""

    def __init__(self, fold):
        super().__init__()
        self.fold, self.relu, self.first, self.last = fold, nn.ReLU(), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.relu(self.fold(self.first(x.flatten(1).view(-1, 8)), len(x))))


@pytest.mark.parametrize("fold", [lambda z, n: z, lambda z, n: z.view(n, 8, 16).transpose(0, 1),
                                  lambda z, n: z.view(n, 8, 16).mean((0, 1))])
def test_rows_that_are_not_the_images_are_refused(fold):
    x, directions = points_and_directions((1, 8, 8))
    for batch_size in (None, 1, 7):
        with pytest.raises(ValueError, match="'relu' receives"):
            local_complexity(Folded(fold).double(), x, 0.1, directions, batch_size)
    unfolded = Folded(lambda z, n: z.view(n, 8, 16)).double()
    counts = local_complexity(unfolded, x, 0.1, directions)
    assert torch.equal(counts, definition(unfolded, x, 0.1, directions))
    assert torch.equal(counts, local_complexity(unfolded, x, 0.1, directions, 7))


@pytest.mark.filterwarnings("error")
def test_activations_called_as_functions_are_warned_of():
    model = Odd("none")
    assert layer_units(model, (1, 8, 8)) == {"act1": 20, "act2": 10}  # silent: warnings are errors here
    for function in (F.relu, torch.relu, F.gelu, torch.Tensor.relu_):
        mixed = nn.Sequential(model, Apply(function))
        with pytest.warns(UserWarning, match=f"calls {function.__name__} as a function"):
            assert len(layer_units(mixed, (1, 8, 8))) == 2


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_autocast_and_inference_mode_do_not_change_the_counts():
    x, directions = points_and_directions((1, 8, 8))
    for model in (make("mlp", (1, 8, 8), width=40).float(), Odd("none")):
        expected = local_complexity(model, x.float(), 0.3, directions.float())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(local_complexity(model, x.float(), 0.3, directions.float()), expected)
        with torch.inference_mode():
            assert torch.equal(local_complexity(model, x.float() * 1, 0.3, directions.float()), expected)


def test_a_scripted_model_is_refused():
    x, directions = points_and_directions((1, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still in use
        scripted = torch.jit.trace(Odd("none").double(), x)
    for model in (scripted, nn.Sequential(scripted, nn.ReLU())):
        with pytest.raises(ValueError, match="scripted"):
            local_complexity(model, x, 0.1, directions)


def test_the_images_are_not_changed_by_a_model_that_works_in_place():
    model = nn.Sequential(Apply(lambda x: x.sub_(0.5)), nn.Flatten(), nn.Linear(64, 9), nn.ReLU(inplace=True)).double()
    x, directions = points_and_directions((1, 8, 8))
    before = x.clone()
    local_complexity(model, x, 0.1, directions)
    assert torch.equal(x, before)


def test_no_points_give_no_counts():
    model = make("mlp", (1, 8, 8), depth=3, width=4)
    x, directions = points_and_directions((1, 8, 8))
    assert local_complexity(model, x[:0], 0.1, directions).shape == (0, 2)
    assert local_complexity(model, x[:0], [0.1, 0.2], directions).shape == (2, 0, 2)


@pytest.mark.parametrize("name, first", [("mlp", "layers.0"), ("cnn", "features.0"), ("resnet18", "stem")])
def test_vertices_need_no_pass_through_the_first_layer(name, first):
    model = make(name, (1, 8, 8), width=4, batch_norm=True).float()
    x, directions = points_and_directions((1, 8, 8), n_points=20)
    seen = []
    model.get_submodule(first).register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    local_complexity(model, x.float(), 0.1, directions)
    assert len(x) < sum(seen) < 2 * len(x) < 2 * len(directions) * len(x)
