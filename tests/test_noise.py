"""Noise: keyed, independent, antithetic, and the same however the population is cut."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eggroll import MLP, Population, PopulationError
from eggroll.noise import CPU_BLOCK, generator_seed


def population(network, size=6, rank=1, seed=0, step=0):
    return Population(network, size, rank, 0.1, seed, step)


def correlation(x, y):
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].abs().item()


def test_the_same_key_gives_the_same_noise(small_network):
    first, second = (next(population(small_network).noise_blocks(0)) for _ in range(2))
    assert torch.equal(first.a, second.a) and torch.equal(first.b, second.b)


def test_drawing_noise_leaves_the_global_random_state_alone(small_network):
    before = torch.get_rng_state()
    next(population(small_network).noise_blocks(0))
    assert torch.equal(before, torch.get_rng_state())


def test_noise_is_standard_normal():
    noise = next(population(MLP(400, 300, 3), size=2 * CPU_BLOCK).noise_blocks(0))
    for factor in (noise.a, noise.b):
        assert factor.mean().abs() < 0.05
        assert (factor.std() - 1).abs() < 0.05
        assert (factor.pow(4).mean() - 3).abs() < 0.3


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_entries_of_a_perturbation_have_unit_variance_at_any_rank(rank):
    noise = next(population(MLP(60, 50, 3), 2 * CPU_BLOCK, rank).noise_blocks(0))
    assert (noise.materialise().var() - 1).abs() < 0.1


def test_noise_is_independent_across_layers_steps_seeds_blocks_and_members():
    """Equal shapes everywhere, so that equal seeds would show as a correlation of 1."""
    network = MLP(40, 40, 40)
    size = 4 * CPU_BLOCK
    draws = [
        torch.cat([block.b for block in population(network, size, 1, seed, step).noise_blocks(i)])
        for seed, step, i in itertools.product((0, 1), (0, 1), (0, 1, 2))
    ]
    parts = [part for draw in draws for part in draw.split(CPU_BLOCK)]
    assert max(correlation(x, y) for x, y in itertools.combinations(parts, 2)) < 0.15
    members = draws[0].flatten(1)
    off_diagonal = torch.corrcoef(members).fill_diagonal_(0)
    assert off_diagonal.abs().max() < 0.75  # 64 members of 40 numbers each


def test_factors_a_and_b_are_independent():
    noise = next(population(MLP(64, 64, 64), 2 * CPU_BLOCK).noise_blocks(1))
    assert correlation(noise.a, noise.b) < 0.1


def test_members_of_a_pair_are_exactly_antithetic(small_network):
    whole = population(small_network, size=2 * CPU_BLOCK + 4, rank=2)
    for pair in (0, 3, CPU_BLOCK + 1):
        plus, minus = whole.member(2 * pair), whole.member(2 * pair + 1)
        for name, weight in small_network.named_parameters():
            moved = plus[name] - weight
            assert moved.abs().max() > 0
            torch.testing.assert_close(moved, weight - minus[name], rtol=0, atol=1e-7)


key = st.tuples(
    st.integers(0, 2**17 - 1), st.integers(0, 31), st.integers(0, 1023)
)  # step, layer, block


@given(key, key, st.integers(0, 2**63))
def test_two_keys_of_a_run_never_share_a_generator(first, second, seed):
    low = [generator_seed(seed, *k) & 0xFFFFFFFF for k in (first, second)]
    assert (low[0] == low[1]) == (first == second)


def test_seeds_beyond_the_packed_range_still_differ():
    far = [(1 << 17, 0, 0), (0, 32, 0), (0, 0, 1024), (0, 0, 0)]
    assert len({generator_seed(0, *k) & 0xFFFFFFFF for k in far}) == len(far)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 4095}, "4095 is odd.*try 4096"),
        ({"size": 0}, "too small"),
        ({"size": -3}, "try 2"),
        ({"rank": 0}, "rank 0 is below 1"),
    ],
)
def test_a_population_that_cannot_be_says_what_to_type(small_network, arguments, message):
    with pytest.raises(PopulationError, match=message):
        population(small_network, **arguments)


def test_sigma_must_be_above_zero(small_network):
    with pytest.raises(PopulationError, match="sigma"):
        Population(small_network, 4, 1, 0.0, 0, 0)
