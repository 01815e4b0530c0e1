"""The estimate: the sum it claims to be, and the gradient it claims to estimate."""

import math

import pytest
import torch
from torch.nn import functional as F

from eggroll import MLP, Evolution, accuracy, cross_entropy
from eggroll.estimator import estimate_layer, materialised_estimate, pair_weights
from eggroll.noise import CPU_BLOCK


def gradient_of_fitness(network, inputs, labels):
    """Autograd's gradient of the mean log-likelihood, all parameters in one vector."""
    loss = F.cross_entropy(network(inputs), labels)
    return -torch.cat([g.flatten() for g in torch.autograd.grad(loss, network.parameters())])


def estimate(network, inputs, labels, *, draws=1, **options):
    """Mean of `draws` estimates of the ascent direction, as one vector."""
    evolution = Evolution(network, cross_entropy(), **options)
    total = 0
    for _ in range(draws):
        evolution.estimate(inputs, labels)
        total = total - torch.cat([p.grad.flatten() for p in network.parameters()])
    return total / draws


def cosine(x, y):
    return F.cosine_similarity(x, y, dim=0).item()


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_update_equals_sum_of_materialised_perturbations(rank, bias):
    network = MLP(7, 5, 3, bias=bias)
    pairs = 2 * CPU_BLOCK + 3
    population = Evolution(network, cross_entropy(), population=2 * pairs, rank=rank).ask()
    weights = torch.randn(pairs)
    for index, layer in enumerate(network.layers):
        fast = estimate_layer(layer, population.noise_blocks(index), weights)
        plain = materialised_estimate(layer, population.noise_blocks(index), weights)
        torch.testing.assert_close(fast[0], plain[0], rtol=1e-4, atol=1e-4)
        assert (fast[1] is None) == (not bias)
        if bias:
            torch.testing.assert_close(fast[1], plain[1], rtol=1e-4, atol=1e-4)


def test_a_rank_one_population_makes_an_update_of_full_rank():
    network = MLP(20, 16, 10)
    evolution = Evolution(network, cross_entropy(), population=200)
    evolution.estimate(torch.randn(32, 20), torch.randint(0, 10, (32,)))
    assert torch.linalg.matrix_rank(network.layers[1].weight.grad) == 16


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_unshaped_estimate_converges_to_the_gradient_in_angle_and_norm(rank, bias):
    network = MLP(12, 8, 5, bias=bias, seed=0)
    inputs, labels = torch.randn(16, 12), torch.randint(0, 5, (16,))
    true = gradient_of_fitness(network, inputs, labels)
    options = {"population": 20_000, "rank": rank, "sigma": 0.01, "shaping": "none"}
    found = estimate(network, inputs, labels, draws=4, **options)
    # 40,000 pairs for 200 parameters: noise of sqrt(200 / 40,000) = 7 % of the norm
    assert cosine(found, true) > 0.99
    assert abs(found.norm() / true.norm() - 1) < 0.05


def test_error_of_the_mean_shrinks_with_the_square_root_of_the_draws():
    network = MLP(12, 8, 5, seed=0)
    inputs, labels = torch.randn(16, 12), torch.randint(0, 5, (16,))
    true = gradient_of_fitness(network, inputs, labels)
    options = {"population": 500, "sigma": 0.01, "shaping": "none"}
    few = (estimate(network, inputs, labels, draws=4, **options) - true).norm()
    many = (estimate(network, inputs, labels, draws=64, **options) - true).norm()
    assert 2.8 < few / many < 5.6  # sqrt(64 / 4) = 4


@pytest.mark.parametrize("pairs", [16, 64, 256, 1024])
def test_cosine_with_the_true_gradient_grows_as_theory_says(pairs):
    """cos = 1 / sqrt(1 + (d + 1) / N) for d parameters and N pairs."""
    network = MLP(30, 20, 10, seed=0)
    inputs, labels = torch.randn(32, 30), torch.randint(0, 10, (32,))
    true = gradient_of_fitness(network, inputs, labels)
    evolution = Evolution(network, cross_entropy(), population=2 * pairs, sigma=0.005)
    found = []
    for _ in range(24):
        evolution.estimate(inputs, labels)
        found.append(cosine(-torch.cat([p.grad.flatten() for p in network.parameters()]), true))
    expected = 1 / math.sqrt(1 + (len(true) + 1) / pairs)
    assert abs(sum(found) / len(found) / expected - 1) < 0.1


@pytest.mark.parametrize("shaping", ["none", "z-score"])
def test_groups_estimate_the_gradient_of_the_whole_batch(shaping):
    """Easy examples in one group and hard ones in another must not count as merit."""
    network = MLP(12, 8, 5, seed=0)
    inputs, labels = torch.randn(16, 12), torch.randint(0, 5, (16,))
    inputs[::4] *= 3
    true = gradient_of_fitness(network, inputs, labels)
    options = {"population": 20_000, "groups": 4, "sigma": 0.01, "shaping": shaping}
    found = estimate(network, inputs, labels, draws=4, **options)
    assert cosine(found, true) > 0.97
    if shaping == "none":
        assert abs(found.norm() / true.norm() - 1) < 0.08


def test_z_scored_estimate_has_the_length_of_the_unit_gradient_whatever_sigma():
    """Shaping that divides by the spread takes sigma and the gradient's length out."""
    network = MLP(12, 8, 5, seed=0)
    inputs, labels = torch.randn(16, 12), torch.randint(0, 5, (16,))
    for sigma in (0.003, 0.03):
        found = estimate(network, inputs, labels, draws=2, population=20_000, sigma=sigma)
        true = gradient_of_fitness(network, inputs, labels)
        along = found @ true / true.norm()
        assert abs(along - 1) < 0.06


@pytest.mark.parametrize("shaping", ["z-score", "centered-rank", "sign"])
def test_every_shaping_points_uphill(shaping):
    network = MLP(12, 8, 5, seed=0)
    inputs, labels = torch.randn(16, 12), torch.randint(0, 5, (16,))
    true = gradient_of_fitness(network, inputs, labels)
    found = estimate(network, inputs, labels, population=20_000, shaping=shaping)
    assert cosine(found, true) > 0.95


def test_pair_weights_divide_by_sigma_only_where_scores_keep_their_units():
    scores = torch.tensor([3.0, 1.0, 0.0, 0.0])
    assert torch.allclose(pair_weights(scores, "none", sigma=0.1), torch.tensor([5.0, 0.0]))
    for shaping in ("z-score", "centered-rank", "sign"):
        weights = [pair_weights(scores, shaping, sigma=s) for s in (0.1, 10.0)]
        assert torch.equal(*weights)


def toy():
    """Three classes that a linear cut separates."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (120,), generator=generator)
    centres = 2 * torch.randn(3, 8, generator=generator)
    return centres[labels] + 0.5 * torch.randn(120, 8, generator=generator), labels


@pytest.mark.parametrize("fitness", [cross_entropy(), accuracy])
@pytest.mark.parametrize("shaping", ["z-score", "centered-rank", "sign"])
@pytest.mark.parametrize("bias", [False, True])
def test_fitness_rises(fitness, shaping, bias):
    inputs, labels = toy()
    network = MLP(8, 16, 3, bias=bias, seed=0)
    evolution = Evolution(network, fitness, population=64, sigma=0.05, shaping=shaping)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(60):
        evolution.estimate(inputs, labels)
        optimizer.step()
    assert (network(inputs).argmax(-1) == labels).float().mean() > 0.9


def test_noise_is_fresh_at_every_step(small_network, batch):
    evolution = Evolution(small_network, cross_entropy(), population=8)
    evolution.estimate(*batch)
    first = small_network.layers[0].weight.grad.clone()
    evolution.estimate(*batch)
    assert not torch.allclose(first, small_network.layers[0].weight.grad)


def test_a_step_can_be_taken_again_by_its_number(small_network, batch):
    evolution = Evolution(small_network, cross_entropy(), population=8)
    evolution.estimate(*batch)
    first = small_network.layers[0].weight.grad.clone()
    evolution.step = 0
    evolution.estimate(*batch)
    assert torch.equal(first, small_network.layers[0].weight.grad)


def test_an_unknown_shaping_is_refused(small_network):
    with pytest.raises(ValueError, match="try z-score, centered-rank, sign, none"):
        Evolution(small_network, cross_entropy(), population=4, shaping="zscore")
