import pytest
import torch

from models import ACTIVATIONS, build_model

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar": (3, 32, 32), "imagenette": (3, 128, 128)}
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


def test_depth_counts_linear_layers():
    for depth in (2, 3, 6, 9):
        model = build_model("mlp", (1, 8, 8), 10, depth=depth, width=5)
        assert sum(isinstance(m, torch.nn.Linear) for m in model.modules()) == depth


def test_images_are_normalised_inside():
    torch.manual_seed(0)
    inside = build_model("cnn", (3, 8, 8), 10, width=4, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    torch.manual_seed(0)
    bare = build_model("cnn", (3, 8, 8), 10, width=4)
    x = torch.rand(2, 3, 8, 8)
    by_hand = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert torch.equal(inside(x), bare(by_hand))


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


def test_init_scale_multiplies_the_initial_weights():
    torch.manual_seed(0)
    one = build_model("mlp", (1, 8, 8), 10, width=5, batch_norm=True)
    torch.manual_seed(0)
    three = build_model("mlp", (1, 8, 8), 10, width=5, batch_norm=True, init_scale=3.0)
    for (name, small), large in zip(one.named_parameters(), three.parameters(), strict=True):
        factor = 1 if "layers.1." in name or "layers.4." in name or "layers.7." in name else 3  # batch norm's own
        assert torch.allclose(large, factor * small), name


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
