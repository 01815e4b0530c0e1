"""Activations without a gradient: what they compute, and that evolution trains through them."""

import json

import pytest
import torch
from conftest import SAMPLE, run_script
from safetensors.torch import load_file
from torch.nn import functional as F

import mnist_eggroll
from eggroll import MLP, Evolution, LayerwiseEvolution, cross_entropy
from eggroll.activations import ACTIVATIONS, make_activation
from lab import cli

FLAT = ("sign", "step", "argmax-k", "int8-round")


def test_each_activation_computes_what_its_name_says():
    x = torch.tensor([[-2.0, 0.5, 0.0, 3.0], [9.0, -1.0, 8.5, 0.1]])
    found = {name: make_activation(name, 2)(x) for name in ACTIVATIONS}
    assert found["sign"].tolist() == [[-1, 1, 0, 1], [1, -1, 1, 1]]
    assert found["step"].tolist() == [[0, 1, 0, 1], [1, 0, 1, 1]]
    assert found["argmax-k"].tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert torch.equal(found["relu"], x.clamp_min(0))
    assert torch.equal(found["gelu"], F.gelu(x))
    stored = 16 * found["int8-round"]
    assert torch.equal(stored, stored.round()) and stored.max() == 127
    torch.testing.assert_close(stored[0], 16 * F.gelu(x[0]), rtol=0, atol=0.5)


def test_units_that_tie_for_the_last_place_of_argmax_k_are_all_on():
    assert make_activation("argmax-k", 2)(torch.tensor([1.0, 1.0, 2.0])).tolist() == [1, 1, 1]


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="try gelu, relu, sign"):
        MLP(activation="swish")


def toy():
    """Three classes that a linear cut separates."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (120,), generator=generator)
    centres = 2 * torch.randn(3, 8, generator=generator)
    return centres[labels] + 0.5 * torch.randn(120, 8, generator=generator), labels


@pytest.mark.parametrize("activation", FLAT)
def test_backprop_reaches_the_head_alone(activation):
    network, (inputs, labels) = MLP(8, 32, 3, activation=activation), toy()
    F.cross_entropy(network(inputs), labels).backward()
    *hidden, head = (layer.weight.grad for layer in network.layers)
    assert head.any()
    assert all(grad is None or not grad.any() for grad in hidden)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [Evolution, LayerwiseEvolution])
def test_evolution_trains_the_hidden_layers_through_any_activation(activation, kind):
    network, (inputs, labels) = MLP(8, 32, 3, activation=activation, seed=0), toy()
    fitness = cross_entropy()
    options = {"population": 192, "sigma": 0.1}
    if kind is LayerwiseEvolution:
        options |= {"groups": 2, "difference": "central"}
    evolution = kind(network, fitness, **options)
    hidden = [layer.weight for layer in network.layers[:2]]
    optimizer = torch.optim.Adam(hidden, lr=0.01)  # the head, which has a gradient, stays out
    before = fitness(network(inputs), labels).mean()
    for _ in range(40):
        evolution.estimate(inputs, labels)
        optimizer.step()
    assert fitness(network(inputs), labels).mean() > before + 0.3


@pytest.mark.parametrize("script", ["mnist_backprop.py", "mnist_eggroll.py"])
def test_both_scripts_train_what_can_be_trained_through_argmax_k(script, tmp_path):
    flags = (*SAMPLE, "--hidden-dim", 32, "--epochs", 1, "--activation", "argmax-k")
    if script == "mnist_eggroll.py":
        flags = (*flags, "--population", 96)
    done = run_script(script, *flags, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["flags"]["activation"] == "argmax-k"
    network = MLP(hidden_dim=32)
    untrained = {k: v.clone() for k, v in network.state_dict().items()}
    weights = load_file(tmp_path / "model.safetensors")
    moved = {name: not torch.equal(w, untrained[name]) for name, w in weights.items()}
    assert moved["layers.2.weight"]
    assert moved["layers.0.weight"] == (script == "mnist_eggroll.py")


def test_units_that_jump_get_larger_perturbations_unless_a_flag_says_otherwise():
    def resolved(*flags):
        config = cli.parse(mnist_eggroll.Config, "", flags)
        flags = mnist_eggroll.resolve(config, torch.device("cpu")).evolution
        return flags.sigma, flags.difference

    assert resolved() == (0.004, "forward")
    for name in ("sign", "step", "argmax-k"):
        assert resolved("--activation", name) == (0.045, "central")
    assert resolved("--activation", "sign", "--sigma", "0.1") == (0.1, "central")
    assert resolved("--activation", "sign", "--estimator", "population") == (0.02, "central")
