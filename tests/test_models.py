import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import ACTIVATIONS, MODELS, build_model, from_config, load_network

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "colour": (3, 40, 40)}
WIDTHS = {"mlp": 12, "cnn": 4, "resnet18": 4}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch_norm"])
def test_every_model_on_every_shape_gives_finite_logits_and_gradients(name, shape, batch_norm):
    torch.manual_seed(0)
    model = build_model(name, shape, 7, width=WIDTHS[name], batch_norm=batch_norm,
                        mean=[0.5] * shape[0], std=[0.25] * shape[0])
    logits = model(torch.rand(3, *shape))
    assert logits.shape == (3, 7)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 3, 6])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def parameter_count(*args, **kwargs):
    return sum(p.numel() for p in build_model(*args, **kwargs).parameters())


def test_the_default_networks_are_the_papers():
    assert parameter_count("mlp", (1, 28, 28), 10) == (784 + 1) * 200 + 2 * (200 + 1) * 200 + (200 + 1) * 10
    resnet = build_model("resnet18", (3, 32, 32), 10)
    convolutions = [m for m in resnet.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len([m for m in convolutions if m.kernel_size == (3, 3)]) + 1 == 18  # with the linear layer
    assert resnet.stem.out_channels == 16
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in resnet.modules())
    cnn = build_model("cnn", (3, 32, 32), 10)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in cnn.modules()) == 5
    assert sum(isinstance(m, torch.nn.Linear) for m in cnn.modules()) == 2


def test_images_are_normalised_inside():
    torch.manual_seed(0)
    inside = build_model("cnn", (3, 8, 8), 10, width=4, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    torch.manual_seed(0)
    bare = build_model("cnn", (3, 8, 8), 10, width=4)
    x = torch.rand(2, 3, 8, 8)
    by_hand = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert torch.equal(inside(x), bare(by_hand))


def plain_logits(name, w, x):
    """The logits of the CNN ("cnn") or the ResNet-18 with the weights w, in eval mode, by PyTorch's functions alone."""
    def conv(x, place, stride=1, padding=1):
        return F.conv2d(x, w[f"{place}.weight"], w.get(f"{place}.bias"), stride, padding)

    def norm(x, place):
        names = [f"{place}.{part}" for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *(w[name] for name in names)) if names[0] in w else x

    def linear(x, place):
        return F.linear(x, w[f"{place}.weight"], w[f"{place}.bias"])

    if name == "cnn":
        places = sorted(int(key.split(".")[1]) for key in w if key.startswith("features") and w[key].dim() == 4)
        for k, stride in zip(places, (1, 2, 1, 2, 2), strict=True):
            x = norm(conv(x, f"features.{k}", stride), f"features.{k + 1}").relu()
        return linear(linear(x.mean((2, 3)), "classifier.0").relu(), "classifier.2")
    x = conv(x, "stem")
    for k, stride in enumerate((1, 1, 2, 1, 2, 1, 2, 1)):
        block = f"blocks.{k}"
        out = norm(x, f"{block}.norm1").relu()
        short = conv(out, f"{block}.shortcut", stride, padding=0) if f"{block}.shortcut.weight" in w else x
        x = short + conv(norm(conv(out, f"{block}.conv1", stride), f"{block}.norm2").relu(), f"{block}.conv2")
    return linear(norm(x, "norm").relu().mean((2, 3)), "classifier")


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_the_convolutional_networks_equal_plain_functions(name, batch_norm):
    torch.manual_seed(0)
    model = build_model(name, (3, 20, 20), 5, width=4, batch_norm=batch_norm).double()
    x = torch.rand(4, 3, 20, 20, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    model(x)  # gives batch norm its statistics
    torch.testing.assert_close(model.eval()(x), plain_logits(name, model.state_dict(), x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", WIDTHS)
def test_each_activation_is_a_module_used_once(name, activation):
    model = build_model(name, (3, 16, 16), 10, width=4, activation=activation)
    kinds = tuple(ACTIVATIONS.values())
    calls = []
    for module in model.modules():
        if isinstance(module, kinds):
            assert isinstance(module, ACTIVATIONS[activation])
            module.register_forward_hook(lambda module, *_: calls.append(module))
    model(torch.rand(2, 3, 16, 16))
    assert len(calls) == len(set(calls)) == sum(isinstance(m, kinds) for m in model.modules())
    assert len(calls) == {"mlp": 3, "cnn": 6, "resnet18": 17}[name]


@pytest.mark.parametrize("name", MODELS)
def test_init_scale_multiplies_the_initial_weights(name):
    torch.manual_seed(0)
    one = build_model(name, (1, 8, 8), 10, width=5, batch_norm=True)
    torch.manual_seed(0)
    three = build_model(name, (1, 8, 8), 10, width=5, batch_norm=True, init_scale=3.0)
    norms = {place for place, module in one.named_modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))}
    for (place, small), large in zip(one.named_parameters(), three.parameters(), strict=True):
        assert torch.allclose(large, small if place.rpartition(".")[0] in norms else 3 * small), place


@pytest.mark.parametrize("name, options, says", [
    ("vgg", {}, "unknown model 'vgg'"),
    ("mlp", {"activation": "swish"}, "unknown activation 'swish'"),
    ("mlp", {"depth": 1}, "depth 1"),
    ("mlp", {"width": 0}, "width 0"),
    ("cnn", {"depth": 3}, "depth can be chosen for the mlp only"),
])
def test_wrong_options_are_named(name, options, says):
    with pytest.raises(ValueError, match=says):
        build_model(name, (1, 8, 8), 10, **options)


# ---- checkpoints

def checkpoint_of(**config):
    torch.manual_seed(0)
    config = {"model": "mlp", "width": 8, "depth": 3, "dtype": "float32", **config}
    model = from_config(config, (1, 4, 4), 3, [0.5], [0.25])
    sizes = {"in_shape": [1, 4, 4], "num_classes": 3}
    return model, {"config": config, "sizes": sizes, "model_state_dict": copy.deepcopy(model.state_dict())}


@pytest.mark.parametrize("config", [{}, {"batch_norm": True, "dtype": "float64"}, {"model": "cnn", "depth": None},
                                    {"model": "resnet18", "depth": None, "batch_norm": True}])
def test_a_checkpoint_gives_its_network_back(config):
    model, checkpoint = checkpoint_of(**config)
    found = load_network(checkpoint)
    assert not any(module.training for module in found.modules())
    for (name, value), (other, expected) in zip(found.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, expected) and value.dtype == expected.dtype
    x = torch.rand(2, 1, 4, 4, dtype=next(model.parameters()).dtype)
    assert torch.equal(found(x), model.eval()(x))
    with torch.no_grad():
        next(found.parameters()).zero_()  # the checkpoint has its own memory
    assert all(torch.equal(v, checkpoint["model_state_dict"][name]) for name, v in model.state_dict().items())


@pytest.mark.parametrize("damage", [lambda state: state.pop("layers.0.bias"),
                                    lambda state: state.update({"layers.0.bias": torch.zeros(3)})])
def test_weights_that_do_not_fit_the_config_are_refused(damage):
    _, checkpoint = checkpoint_of()
    damage(checkpoint["model_state_dict"])
    with pytest.raises(ValueError, match="do not fit"):
        load_network(checkpoint)
