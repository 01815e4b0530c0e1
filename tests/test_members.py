"""Populations, blocks, noise and gradients of both kinds of members."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from eggroll import (
    BatchMembers,
    Evolution,
    ExampleMembers,
    PopulationError,
    cross_entropy,
    noise,
    reference,
)
from eggroll.members import share
from eggroll.moved import spread

MNIST = (256, 256, 10)  # outputs of the experiment's layers


@pytest.fixture
def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False)).double()


@pytest.fixture
def batch():
    torch.manual_seed(2)
    return torch.randn(7, 6, dtype=torch.float64), torch.randint(0, 5, (7,))


def counts(members, outputs=MNIST):
    return [count for _, count in members.counts(outputs)]


@pytest.mark.parametrize(
    ("population", "expected"),
    [
        (144, [64, 64, 16]),
        (1000, [256, 256, 16]),
        (134, [59, 59, 16]),
        (50, [17, 17, 16]),
        (12, [4, 4, 4]),
        (3, [1, 1, 1]),
        ((48, 64, 16), [48, 64, 16]),
    ],
)
def test_example_members_are_shared_equally_up_to_their_orthogonal_rows(population, expected):
    assert counts(ExampleMembers(population)) == expected


def test_antithetic_members_are_shared_in_pairs_and_may_be_twice_as_many():
    assert counts(ExampleMembers(50, antithetic=True)) == [18, 16, 16]
    assert counts(ExampleMembers(2000, antithetic=True)) == [512, 512, 32]
    assert counts(BatchMembers(50, perturb="one")) == [18, 16, 16]
    assert counts(BatchMembers(50)) == [50]


@given(st.integers(3, 2000), st.lists(st.integers(1, 300), min_size=1, max_size=3))
def test_shares_use_all_members_that_the_layers_can_have(population, most):
    found = share(population, most, 1)
    assert sum(found) == min(population, sum(most))
    assert all(0 < count <= limit for count, limit in zip(found, most, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchMembers(7), r"7 is odd; antithetic pairs need an even number \(try 8\)"),
        (lambda: ExampleMembers(7, antithetic=True), r"try 8"),
        (lambda: ExampleMembers(0), "below 1"),
        (lambda: ExampleMembers(8, units=0), r"units 0 is below 1 \(try 16\)"),
        (lambda: BatchMembers(4, sigma=0), "not above 0"),
        (lambda: BatchMembers(4, rank=0), "rank 0"),
        (lambda: BatchMembers(4, perturb="some"), "'all' or 'one'"),
        (lambda: BatchMembers(4, shaping="rank"), "try z-score"),
        (lambda: ExampleMembers(4, shaping="z-score"), "try none, sign"),
        (lambda: ExampleMembers(2).counts(MNIST), "try 3"),
        (lambda: ExampleMembers((8, 8)).counts(MNIST), "names 2 layers, and 3 evolve"),
        (lambda: ExampleMembers((300, 8, 20)).counts(MNIST), r"try 256\+8\+16"),
        (lambda: Evolution(nn.Tanh(), cross_entropy(), BatchMembers(4)), "no nn.Linear"),
    ],
)
def test_a_population_that_cannot_be_is_refused_with_what_to_type(make, message):
    with pytest.raises(PopulationError, match=message):
        make()


def estimate(network, members, batch, **options):
    evolution = Evolution(network, cross_entropy(), members, **options)
    scores = evolution.evaluate(*batch)
    evolution.backward(scores)
    return evolution, scores, {n: -p.grad for n, p in network.named_parameters()}


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
def test_batch_gradient_equals_sum_of_materialised_perturbations(network, batch, antithetic, rank):
    members = BatchMembers(40, 0.1, rank=rank, antithetic=antithetic, shaping="none")
    evolution, scores, found = estimate(network, members, batch)
    for name, total in reference.batch_gradient(evolution, scores).items():
        assert torch.allclose(found[name], total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("units", [2, 16])
@pytest.mark.parametrize("antithetic", [True, False])
def test_example_gradient_equals_sum_of_materialised_perturbations(
    network, batch, antithetic, units
):
    members = ExampleMembers(14, 0.1, antithetic=antithetic, units=units)
    evolution, scores, found = estimate(network, members, batch)
    for name, total in reference.example_gradient(evolution, scores).items():
        assert torch.allclose(found[name], total, atol=1e-10)


def test_noise_of_an_example_gradient_is_what_theory_says(network, batch):
    """(N - M)(O - 1) / ((N - 1) M) relative to each example's delta, averaged over the batch."""
    inputs, labels = batch
    outputs = network(inputs)
    (deltas,) = torch.autograd.grad(cross_entropy()(outputs[None], labels).sum(), outputs)
    members, rows, o = 4, 8, 5
    expected = (rows - members) * (o - 1) / ((rows - 1) * members)
    noise_of_weights = (
        deltas.square().sum(1) * network[1](network[0](inputs)).square().sum(1)
    ).sum()
    expected = expected * noise_of_weights.item() / len(inputs) ** 2
    true = torch.autograd.grad(
        cross_entropy()(network(inputs)[None], labels).mean(), network[2].weight
    )[0]
    evolution = Evolution(network, cross_entropy(), ExampleMembers((2, members), 1e-3))
    errors = []
    for _ in range(400):
        evolution.backward(evolution.evaluate(inputs, labels))
        errors.append((-network[2].weight.grad - true).square().sum().item())
    assert sum(errors) / len(errors) == pytest.approx(expected, rel=0.1)


def test_a_batch_of_blanks_gives_a_gradient_of_zero(batch):
    network = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 5, bias=False))
    _, _, found = estimate(network, ExampleMembers(16), (torch.zeros(7, 6), batch[1]))
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.parametrize("shaping", ["z-score", "centered-rank", "sign"])
@pytest.mark.parametrize("antithetic", [True, False])
def test_shaped_gradients_do_not_know_the_scale_of_the_fitness(network, batch, shaping, antithetic):
    members = BatchMembers(32, shaping=shaping, antithetic=antithetic)

    def gradient(scale):
        evolution = Evolution(network, lambda o, y: scale * cross_entropy()(o, y) + 7, members)
        evolution.backward(evolution.evaluate(*batch))
        return [p.grad.clone() for p in network.parameters()]

    for one, other in zip(gradient(1), gradient(100), strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.999
        assert one.norm() == pytest.approx(other.norm().item(), rel=0.01)


def test_the_estimate_does_not_depend_on_sigma_where_the_fitness_keeps_its_units(network, batch):
    sizes = [
        estimate(network, ExampleMembers(16, sigma), batch)[2]["2.weight"].norm().item()
        for sigma in (1e-3, 1e-2)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


CHUNKED = [
    BatchMembers(150),
    BatchMembers(150, rank=2, antithetic=False),
    BatchMembers(150, perturb="one"),
    ExampleMembers((128, 100, 8)),
    ExampleMembers((128, 100, 8), antithetic=True),
    ExampleMembers((128, 100, 8), units=128),
]


@pytest.mark.parametrize("members", CHUNKED)
def test_no_bit_depends_on_the_chunk_size(members):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(30, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 7)
    )
    batch = torch.randn(33, 30), torch.randint(0, 7, (33,))
    _, scores, found = estimate(network, members, batch)
    for chunk_size in (64, 128, 1000):
        _, others, gradients = estimate(network, members, batch, chunk_size=chunk_size)
        assert torch.equal(scores, others)
        assert all(torch.equal(found[name], gradients[name]) for name in found)


def test_a_block_is_drawn_whole_so_a_larger_population_begins_with_the_smaller(network, batch):
    small, large = (estimate(network, BatchMembers(p), batch)[1] for p in (40, 64))
    assert torch.equal(small, large[:40])


# ---- noise ----


@pytest.mark.parametrize("other", [{"step": 1}, {"seed": 1}, {"parameter": 1}, {"block": 1}])
def test_noise_is_independent_across_keys(other):
    def draw(seed=0, step=0, parameter=0, block=0):
        keys = noise.Keys(seed, step, torch.device("cpu"))
        return noise.gaussian((20_000,), keys.generator(parameter, block), torch.empty(0))

    one, two = draw(), draw(**other)
    assert torch.equal(one, draw())
    assert abs((one * two).mean()) < 4 / math.sqrt(20_000)


KEYS = st.tuples(
    st.integers(0, 65_535), st.integers(0, 31), st.integers(0, 1_023), st.integers(0, 1)
)


@given(st.integers(0, 2**32 - 1), KEYS, KEYS)
def test_keys_of_one_run_never_share_a_generator(seed, one, other):
    low = [noise.generator_seed(seed, *key) & 0xFFFFFFFF for key in (one, other)]
    assert (low[0] == low[1]) == (one == other)


def test_neighbouring_seeds_have_no_shifted_noise():
    seeds = [{noise.generator_seed(s, step, 0, 0) for step in range(1_000)} for s in (0, 1)]
    assert not seeds[0] & seeds[1]


def test_signs_are_balanced_and_uncorrelated():
    drawn = noise.signs((64, 1_000), torch.Generator().manual_seed(0), torch.float32)
    assert drawn.unique().tolist() == [-1, 1]
    correlation = drawn @ drawn.T / 1_000 - torch.eye(64)
    assert abs(drawn.mean()) < 0.02 and correlation.abs().max() < 0.15


@pytest.mark.parametrize(("outputs", "members"), [(5, 5), (8, 3), (10, 4), (40, 7), (256, 48)])
def test_orthogonal_rows_are_hadamard_matrices_down_the_diagonal(outputs, members):
    size = noise.row_units(outputs, members)
    generator = torch.Generator().manual_seed(0)
    drawn, blocks = noise.orthogonal_rows(outputs, size, generator, torch.float32)
    assert len(drawn) >= noise.most_rows(outputs) >= outputs
    rows = spread(drawn, blocks, outputs)
    assert torch.equal(rows.T @ rows, size * torch.eye(outputs))
    if outputs % size == 0:
        assert torch.equal(rows @ rows.T, size * torch.eye(outputs))
    assert rows[:members].any(0).all()  # as few as they are, they move all units
