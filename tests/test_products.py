"""Matrix products by oneDNN: as exact as MKL's, used where they were asked for, and nowhere else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import models
import products

onednn = pytest.mark.skipif(not products.available(), reason="this PyTorch has no oneDNN products")


class Counter(TorchDispatchMode):
    """Counts the products by oneDNN in its block."""

    def __enter__(self):
        self.made = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += "_linear_pointwise" in str(func)
        return func(*args, **(kwargs or {}))


def mlp():
    torch.manual_seed(0)
    return models.build_model("mlp", (1, 8, 8), 10, width=32)


def values(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def passes(layer, x, gradient):
    """Return output and gradients, in float64."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [t.double() for t in (y, *torch.autograd.grad(y, [x, *layer.parameters()], gradient))]


INPUTS = {"a batch": values(200, 784), "one image": values(1, 784), "transposed": values(784, 200).t(),
          "every second": values(200, 1568)[:, ::2], "one image expanded": values(1, 784).expand(200, 784),
          "no image": values(0, 784)}


@onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", INPUTS)
def test_products_are_as_exact_as_pytorchs(name, bias):
    x = INPUTS[name]
    gradient = values(50, len(x)).t()
    layer = nn.Linear(784, 50, bias=bias)
    exact = passes(copy.deepcopy(layer).double(), x.double(), gradient.double())
    usual = passes(layer, x, gradient)
    products.use(layer, [""])
    assert type(layer) is products.Linear
    for ours, theirs, truth in zip(passes(layer, x, gradient), usual, exact, strict=True):
        assert ours.shape == truth.shape
        assert (ours - truth).norm() <= 3 * (theirs - truth).norm() + 1e-7 * truth.norm()


@onednn
def test_only_the_named_layers_go_through_onednn_and_back():
    model, x = mlp(), values(20, 1, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = list(products.layers(model))
    for chosen, expected in ((names, 4 * 3 - 1), (names[1:2], 3), ([], 0)):  # images need no gradient
        products.use(model, chosen)
        twin = copy.deepcopy(model)
        twin.load_state_dict(model.state_dict())
        for network in (model, twin):
            with Counter() as counter:
                network(x).sum().backward()
            assert counter.made == expected
    assert all(type(layer) is nn.Linear for layer in products.layers(model).values())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@onednn
def test_only_the_gradients_that_are_asked_for_are_made():
    model, x = mlp(), values(20, 1, 8, 8)
    products.use(model, list(products.layers(model)))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Counter() as counter:
            assert not model(x).requires_grad
        assert counter.made == 4
    model.requires_grad_(False)
    assert not model(x).requires_grad
    with Counter() as counter:
        torch.autograd.grad(model(x.requires_grad_()).sum(), x)
    assert counter.made == 8


@onednn
def test_a_layer_used_twice_gets_the_sum_of_its_gradients():
    layer, x = nn.Linear(16, 16), values(8, 16)
    expected = torch.autograd.grad(layer(F.relu(layer(x))).sum(), list(layer.parameters()))
    products.use(layer, [""])
    for ours, theirs in zip(torch.autograd.grad(layer(F.relu(layer(x))).sum(), list(layer.parameters())), expected,
                            strict=True):
        torch.testing.assert_close(ours, theirs)


@onednn
def test_what_is_no_batch_of_float32_rows_is_left_to_pytorch():
    layer = nn.Linear(16, 4)
    products.use(layer, [""])
    x = values(2, 3, 16)
    with Counter() as counter:
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(layer(x[0, 0]), F.linear(x[0, 0], layer.weight, layer.bias))
        layer.double()(x.double())
    assert counter.made == 0
    assert products.layers(layer) == {}


def test_a_pytorch_without_the_operator_goes_its_usual_way(monkeypatch):
    monkeypatch.setattr(products, "available", lambda: False)
    model = mlp()
    assert products.choose(model, 20) == []
    products.use(model, ["layers.0", "layers.2"])
    assert {type(module) for module in model.layers} == {nn.Linear, nn.ReLU}


@onednn
def test_a_layer_is_chosen_if_it_is_clearly_faster(monkeypatch):
    model, gains = mlp(), {64: 1.05, 32: 1.5}
    monkeypatch.setattr(products, "gain", lambda layer, batch: gains[layer.in_features] if batch == 20 else 0)
    assert products.choose(model, 20) == ["layers.2", "layers.4", "layers.6"]
    assert products.choose(model, 30) == []


@onednn
def test_choosing_changes_nothing(monkeypatch):
    monkeypatch.setattr(products, "SECONDS", 0)
    model, state = mlp(), torch.get_rng_state()
    assert set(products.choose(model, 20)) <= set(products.layers(model))
    assert all(type(layer) is nn.Linear and layer.weight.grad is None for layer in products.layers(model).values())
    assert torch.equal(state, torch.get_rng_state())
