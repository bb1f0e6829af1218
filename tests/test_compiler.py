"""When the network of the training step is compiled, and that trying it changes nothing. The compiler is a stand-in."""

import pytest
import torch

import compiler
import models


@pytest.fixture
def network():
    torch.manual_seed(0)
    return models.build_model("cnn", (3, 8, 8), 10, width=2, batch_norm=True)


@pytest.fixture
def images():
    return torch.rand(4, 3, 8, 8)


@pytest.fixture
def pretend(monkeypatch):
    """Put in torch.compile's place what gives a network of other numbers, or raises error."""
    def install(error=None):
        def compile(network, **_):
            def fast(images):
                if error:
                    raise error
                return 2 * network(images)
            return fast

        monkeypatch.setattr(torch, "compile", compile)
        monkeypatch.setattr(compiler, "cpp_compiler", lambda: "/usr/bin/c++")
    return install


@pytest.mark.parametrize("mode, seconds, found", [("off", 1e9, True), ("auto", 60, True), ("auto", 1e9, False)])
def test_nothing_is_compiled_that_need_not_be(network, images, pretend, monkeypatch, mode, seconds, found):
    pretend(AssertionError("compiled"))
    monkeypatch.setattr(compiler, "cpp_compiler", lambda: found)
    assert compiler.compiled(network, images, mode, seconds, report=pytest.fail) is network


@pytest.mark.parametrize("mode, pace, taken", [("auto", 0.5, True), ("auto", 0.99, False), ("on", 2, True)])
def test_auto_takes_what_is_faster_and_on_takes_it_anyhow(network, images, pretend, monkeypatch, mode, pace, taken):
    pretend()
    monkeypatch.setattr(compiler, "one_pass", lambda net, _: 1 if net is network else pace)
    said = []
    assert (compiler.compiled(network, images, mode, 1e9, said.append) is not network) == taken
    assert len(said) == 1 and said[0].endswith("not used") == (not taken)


@pytest.mark.parametrize("error", [None, RuntimeError("no working compiler found\nand a long story")])
def test_trying_leaves_the_network_and_the_random_numbers_alone(network, images, pretend, error):
    pretend(error)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    said = []
    net = compiler.compiled(network, images, "on", 0, said.append)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(random, torch.get_rng_state())
    if error:
        assert net is network
        assert said == ["torch.compile failed, the steps run without it: no working compiler found"]


def test_a_compiler_is_found_where_the_environment_names_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compiler.cpp_compiler() is None
    tool = tmp_path / "my-c++"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CXX", "my-c++")
    assert compiler.cpp_compiler() == str(tool)
