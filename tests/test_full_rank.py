"""Naive evolution strategies, and layers of signs: the members that are materialised."""

import pytest
import torch
from conftest import SAMPLE, run_script
from torch.nn import functional as F

from eggroll import (
    MLP,
    Evolution,
    LayerwiseEvolution,
    PopulationError,
    cross_entropy,
    reference_forward,
)
from eggroll.binary import BinaryLinear, binarised
from eggroll.noise import CPU_BLOCK
from mnist_eggroll import PAPER, EvolutionFlags, check_members

FULL = {"perturbation": "full-rank"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_members_of_full_rank_are_the_network_with_dense_noise(bias, binary, batch):
    """With binary weights too: the noise is added before the signs are taken."""
    network = MLP(7, 5, 3, bias=bias, binary_weights=binary)
    size = 2 * CPU_BLOCK + 6
    population = Evolution(network, cross_entropy(), population=size, sigma=0.3, **FULL).ask()
    evolution = Evolution(network, cross_entropy(), population=size, sigma=0.3, **FULL)
    parts = [evolution.backend.forward(chunk, batch[0]) for chunk in population.chunks()]
    torch.testing.assert_close(torch.cat(parts), reference_forward(population, batch[0]))


def estimate(network, inputs, labels, *, draws, **options):
    evolution = Evolution(network, cross_entropy(), **options)
    total = 0
    for _ in range(draws):
        evolution.estimate(inputs, labels)
        total = total - torch.cat([p.grad.flatten() for p in network.parameters()])
    return total / draws


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_the_estimate_of_full_rank_converges_to_the_gradient_in_angle_and_norm(bias, groups):
    network = MLP(12, 8, 5, bias=bias, seed=0)
    inputs, labels = torch.randn(16, 12), torch.randint(0, 5, (16,))
    loss = F.cross_entropy(network(inputs), labels)
    true = -torch.cat([g.flatten() for g in torch.autograd.grad(loss, network.parameters())])
    options = {"population": 20_000, "sigma": 0.01, "shaping": "none", "groups": groups}
    found = estimate(network, inputs, labels, draws=4, **options, **FULL)
    assert F.cosine_similarity(found, true, dim=0) > 0.97
    assert abs(found.norm() / true.norm() - 1) < 0.08


@pytest.mark.parametrize("chunk_size", [1, 1000])
def test_chunks_do_not_change_the_estimate(chunk_size, small_network, batch):
    options = {"population": 4 * CPU_BLOCK, "draws": 2, **FULL}
    plain = estimate(small_network, *batch, **options)
    other = estimate(small_network, *batch, chunk_size=chunk_size, **options)
    assert torch.equal(plain, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturbation": "full"}, "try low-rank, full-rank"),
        ({"rank": 2, **FULL}, "try rank 1"),
        ({"backend": "compile", **FULL}, "backend eager"),
    ],
)
def test_what_no_backend_evaluates_is_refused(options, message, small_network):
    with pytest.raises(PopulationError, match=message):
        Evolution(small_network, cross_entropy(), population=4, **options)


# ---- binary weights ----


def test_a_binary_layer_computes_with_signs_of_one_size():
    layer = BinaryLinear(8, 3)
    matrix = layer(torch.eye(8)) - layer.bias
    assert torch.equal(torch.sign(matrix), torch.sign(layer.weight).T)
    torch.testing.assert_close(matrix.abs(), torch.full((8, 3), 0.5))


def plain_twin(network):
    """The network whose weights are what the binary one computes with."""
    twin = MLP(7, 5, 3)
    matrices = {name: binarised(w) for name, w in network.state_dict().items()}
    twin.load_state_dict(matrices)
    return twin


@pytest.mark.parametrize("kind", [Evolution, LayerwiseEvolution])
def test_low_rank_members_of_a_binary_network_are_those_of_its_matrix_of_signs(kind, batch):
    network = MLP(7, 5, 3, binary_weights=True)
    twin = plain_twin(network)
    assert torch.equal(network(batch[0]), twin(batch[0]))
    for either in (network, twin):
        kind(either, cross_entropy(), population=48, sigma=0.1).estimate(*batch)
    for own, other in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_backprop_has_no_gradient_through_the_signs_of_weights(batch):
    network = MLP(7, 5, 3, binary_weights=True)
    F.cross_entropy(network(batch[0]), batch[1]).backward()
    assert not any(p.grad.any() for p in network.parameters())


def test_evolution_trains_binary_weights(tmp_path):
    flags = (*SAMPLE, "--hidden-dim", 64, "--epochs", 2, "--population", 384, "--binary-weights")
    done = run_script("mnist_eggroll.py", *flags, "--bias", "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("test accuracy ")[-1].split("%")[0]) > 50


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"layers_per_member": "one", "perturbation": "full-rank"}, "add --estimator population"),
        (
            {"layers_per_member": "all", "perturbation": "activations"},
            "add --layers-per-member one",
        ),
    ],
)
def test_flags_that_need_other_members_say_what_to_type(flags, message):
    own = {name: value for name, value in PAPER.items() if hasattr(EvolutionFlags(), name)}
    settings = EvolutionFlags(**{**own, "estimator": "population", **flags})
    with pytest.raises(PopulationError, match=message):
        check_members(settings)


def test_the_script_runs_naive_evolution_strategies(tmp_path):
    flags = ("--estimator", "population", "--perturbation", "full-rank", "--quick")
    flags = (*flags, "--population", 32, "--hidden-dim", 16, "--epochs", 1)
    done = run_script("mnist_eggroll.py", *SAMPLE, *flags, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "full-rank-es" in done.stdout
