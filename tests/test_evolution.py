"""The trainer: fitness rises, the network is left alone, and what cannot run is refused."""

import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS, Step, batch, make, mlp
from torch import nn

from eggroll import (
    BlockLowRank,
    Evolution,
    FitnessError,
    LowRank,
    NodePerturbation,
    PopulationError,
    Smoothing,
    accuracy,
    cross_entropy,
    noise,
)

EVERY = pytest.mark.parametrize(
    "estimator",
    [
        BlockLowRank(320, sigma=0.05, units=4),
        LowRank(320, sigma=0.05),
        NodePerturbation(24, sigma=0.02, units=4),
        NodePerturbation(24, sigma=0.02, units=4, antithetic=True),
    ],
    ids=["block low rank", "low rank", "node perturbation", "antithetic"],
)


def train(evolution, steps, lr=0.05):
    optimizer = torch.optim.SGD(evolution.network.parameters(), lr=lr, momentum=0.9)
    fitness = []
    for _ in range(steps):
        evolution.backward(evolution.evaluate(*batch()))
        fitness.append(evolution.mean_fitness.item())
        optimizer.step()
    return fitness


def weights_of(network):
    return [p.detach().clone() for p in network.parameters()]


# ---- training ----


@EVERY
def test_fitness_rises(estimator):
    fitness = train(Evolution(make("mlp"), cross_entropy, estimator), 60)
    assert fitness[-1] > 0.5 * fitness[0] > fitness[0]


@EVERY
def test_accuracy_alone_is_a_signal_once_it_is_smoothed(estimator):
    evolution = Evolution(make("mlp"), accuracy, estimator, smoothing=Smoothing(2.0, 64))
    fitness = train(evolution, 60)
    assert fitness[-1] >= max(fitness[0] + 0.3, 0.8)


def test_raw_accuracy_is_a_signal_for_members_that_are_scored_on_the_batch():
    fitness = train(Evolution(make("mlp"), accuracy, BlockLowRank(600, 0.3, units=4)), 80, 0.2)
    assert fitness[-1] >= fitness[0] + 0.25


def test_networks_without_a_gradient_evolve():
    network = make("step units")
    estimator = NodePerturbation(48, sigma=0.2, units=16, antithetic=True)
    fitness = train(Evolution(network, cross_entropy, estimator), 60)
    assert fitness[-1] > fitness[0] + 0.3 and isinstance(network[1], Step)


def test_a_layer_that_computes_with_a_function_of_its_weight_evolves():
    class Signs(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.sign(), self.bias)

    network = nn.Sequential(Signs(7, 16), nn.GELU(), Signs(16, 3))
    fitness = train(Evolution(network, cross_entropy, NodePerturbation(40, 0.05)), 60)
    assert fitness[-1] > 0.7 * fitness[0]


# ---- noise ----


@EVERY
def test_noise_is_fresh_at_every_step_and_the_same_for_the_same_step(estimator):
    evolution = Evolution(make("mlp"), cross_entropy, estimator)
    first = evolution.evaluate(*batch())
    assert torch.equal(first, evolution.evaluate(*batch()))
    evolution.backward(first)
    assert not torch.equal(first, evolution.evaluate(*batch()))


@EVERY
@pytest.mark.parametrize("smoothing", [None, 2.0])
def test_a_resumed_trainer_is_bit_identical_and_another_seed_is_not(estimator, smoothing):
    def make_evolution(network, seed=3):
        smooth = Smoothing(smoothing, 16) if smoothing else None
        return Evolution(network, cross_entropy, estimator, seed, smooth)

    network = make("mlp")
    evolution = make_evolution(network)
    train(evolution, 3)
    saved = evolution.state_dict(), {n: t.clone() for n, t in network.state_dict().items()}
    train(evolution, 2)
    whole = weights_of(network)
    found = []
    for seed in (3, 4):
        network.load_state_dict(saved[1])
        resumed = make_evolution(network, seed)
        resumed.load_state_dict(saved[0])
        train(resumed, 2)
        found.append(all(map(torch.equal, whole, weights_of(network))))
    assert found == [True, False]


@pytest.mark.parametrize("other", [{"step": 1}, {"seed": 1}, {"parameter": 1}, {"block": 1}])
def test_noise_of_different_keys_is_independent(other):
    def draw(seed=0, step=0, parameter=0, block=0):
        rng = noise.generator(seed, step, parameter, block, torch.device("cpu"))
        return noise.gaussian((20_000,), torch.empty(0), rng)

    one, two = draw(), draw(**other)
    assert torch.equal(one, draw())
    assert abs((one * two).mean()) < 4 / math.sqrt(20_000)


@EVERY
def test_scores_of_a_batch_do_not_depend_on_the_batch_before(estimator):
    """As a warm-up evaluates one batch and training another, at the same step."""
    inputs, labels = batch()
    evolution = Evolution(make("mlp"), cross_entropy, estimator)
    expected = evolution.evaluate(inputs, labels)
    evolution = Evolution(make("mlp"), cross_entropy, estimator)
    evolution.evaluate(3 * inputs, labels)
    evolution._noise(evolution.draws[0])  # as if a process had begun with this draw
    assert torch.equal(evolution.evaluate(inputs, labels), expected)


@EVERY
def test_layers_of_one_size_do_not_share_noise(estimator):
    network = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))
    evolution = Evolution(network, cross_entropy, estimator)
    evolution.evaluate(*batch())
    drawn = {}
    for draw in evolution.draws:
        for index, parts in evolution._noise(draw).items():
            drawn.setdefault(index, parts)
    for field in ("a", "b", "signs"):
        if hasattr(drawn[0], field):
            one, two = (getattr(drawn[i], field) for i in (0, 1))
            one, two = (v if torch.is_tensor(v) else next(iter(v.values())) for v in (one, two))
            assert not torch.equal(one, two)


KEYS = st.tuples(st.integers(0, 65_535), st.integers(0, 31), st.integers(0, 2_047))


@given(st.integers(0, 2**32 - 1), KEYS, KEYS)
def test_keys_of_one_run_never_share_a_generator(seed, one, other):
    low = [noise.generator_seed(seed, *key) & 0xFFFFFFFF for key in (one, other)]
    assert (low[0] == low[1]) == (one == other)


def test_neighboring_seeds_have_no_shifted_noise():
    seeds = [{noise.generator_seed(s, step, 0, 0) for step in range(1_000)} for s in (0, 1)]
    assert not seeds[0] & seeds[1]


def test_signs_are_balanced_and_uncorrelated():
    drawn = noise.signs((64, 1_000), torch.float32, torch.Generator().manual_seed(0))
    assert drawn.unique().tolist() == [-1, 1]
    correlation = drawn @ drawn.T / 1_000 - torch.eye(64)
    assert abs(drawn.mean()) < 0.02 and correlation.abs().max() < 0.15


# ---- the network ----


@EVERY
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:not evolved")
def test_evaluation_writes_neither_weights_nor_inputs_nor_the_global_generator(name, estimator):
    network, (inputs, labels) = make(name), batch()
    before, seen, state = weights_of(network), inputs.clone(), torch.get_rng_state()
    outputs = network(inputs)
    Evolution(network, cross_entropy, estimator).evaluate(inputs, labels)
    assert all(map(torch.equal, before, weights_of(network))) and torch.equal(inputs, seen)
    assert torch.equal(outputs, network(inputs)) and torch.equal(state, torch.get_rng_state())


def test_weights_that_change_are_those_that_members_perturb():
    network = make("mlp")
    evolution = Evolution(network, cross_entropy, NodePerturbation(40, sigma=1e-3, units=4))
    evolution.evaluate(*batch())
    network.load_state_dict(mlp().state_dict())
    evolution.evaluate(*batch())
    expected = cross_entropy(network(batch()[0])[None], batch()[1]).mean()
    torch.testing.assert_close(evolution.mean_fitness, expected.detach())


def test_parameters_that_stay_fixed_are_named_once_and_get_no_gradient():
    network = make("head first")
    network.unused = nn.Linear(3, 3)
    network.body.weight.requires_grad_(False)
    evolution = Evolution(network, cross_entropy, NodePerturbation(24))
    names = "body.weight, body.bias, norm.weight, norm.bias, unused.weight, unused.bias"
    with pytest.warns(UserWarning, match=f"not evolved.*: {names}"):
        evolution.evaluate(*batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evolution.backward(evolution.evaluate(*batch()))
    found = {name for name, p in network.named_parameters() if p.grad is not None}
    assert found == {"head.weight", "head.bias"}


def test_modules_follow_the_networks_training_mode():
    network = nn.Sequential(nn.Linear(7, 8), nn.Dropout(0.9), nn.Linear(8, 3))
    evolution = Evolution(network, cross_entropy, LowRank(8))
    evolution.evaluate(*batch())
    assert network.training
    network.eval()
    evolution.evaluate(*batch())
    expected = cross_entropy(network(batch()[0])[None], batch()[1]).mean()
    torch.testing.assert_close(evolution.mean_fitness, expected.detach())


class Folds(nn.Module):
    def __init__(self, fold):
        super().__init__()
        self.fold, self.head = fold, nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.fold(x))


@pytest.mark.parametrize(
    "fold", [lambda x: x.flatten(1), lambda x: x.reshape(len(x), -1), lambda x: x - x.mean(0)]
)
def test_a_network_that_folds_the_leading_axis_is_told_what_to_write(fold):
    inputs = torch.randn(5, 3, 4) if fold(torch.ones(5, 3, 4)).dim() == 2 else torch.randn(5, 12)
    evolution = Evolution(Folds(fold), cross_entropy, LowRank(8))
    with pytest.raises(PopulationError, match=r"keep the leading axis.*flatten\(-3\)"):
        evolution.evaluate(inputs, torch.zeros(5, dtype=torch.long))
    assert evolution.network.training  # as it was before the inspection


def test_an_error_of_the_network_itself_stays_its_own():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Evolution(make("mlp"), cross_entropy, LowRank(8)).evaluate(torch.ones(4, 9), batch()[1])


def test_a_network_with_nothing_to_evolve_is_refused():
    with pytest.raises(PopulationError, match=r"no nn\.Linear"):
        Evolution(nn.Conv2d(1, 1, 1), cross_entropy, LowRank(8))
    frozen = nn.Sequential(nn.Linear(7, 3)).requires_grad_(False)
    with pytest.raises(PopulationError, match=r"never calls an nn\.Linear that is trainable"):
        Evolution(frozen, cross_entropy, LowRank(8)).evaluate(*batch())


# ---- the population ----


def counts(estimator, network=None):
    """Members that are used of each layer of the 784-256-256-10 network."""
    sizes = [(9, 256), (256, 256), (256, 10)]
    layers = [nn.Linear(i, o) for i, o in sizes]
    network = network or nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
    evolution = Evolution(network, cross_entropy, estimator)
    evolution.inspect(torch.randn(4, 9))
    assert evolution.population == sum(draw.members for draw in evolution.draws)
    assert f"population {evolution.population:,}" in evolution.describe_population()
    return [draw.members for draw in evolution.draws]


@pytest.mark.parametrize(
    ("population", "blocks", "node", "pairs"),
    [
        (1, [32, 32, 1], [16, 16, 1], 2),
        (37, [32, 32, 1], [16, 16, 1], 36),
        (134, [64, 64, 2], [64, 64, 4], 134),
        (500, [256, 256, 8], [240, 240, 15], 500),
        (1000, [480, 480, 15], [256, 256, 16], 1000),
        ((2048, 4096, 128), [2048, 4096, 128], [256, 256, 16], None),
        ((100, 7, 5), [96, 32, 5], [96, 16, 5], None),
    ],
)
def test_a_population_is_rounded_to_whole_directions(population, blocks, node, pairs):
    assert counts(BlockLowRank(population)) == blocks
    assert counts(NodePerturbation(population)) == node
    if pairs:
        assert sum(counts(LowRank(population))) == pairs


def test_antithetic_members_come_in_pairs_and_may_be_twice_as_many():
    assert counts(NodePerturbation(40, antithetic=True)) == [32, 32, 2]
    assert counts(NodePerturbation(9999, antithetic=True)) == [512, 512, 32]


def test_where_units_mix_a_member_perturbs_all_of_them():
    network = nn.Sequential(nn.Linear(9, 32), nn.LayerNorm(32), nn.Linear(32, 3))
    with pytest.warns(UserWarning, match="not evolved"):
        assert counts(BlockLowRank((64, 8)), network) == [64, 8]


@pytest.mark.parametrize(
    ("make_estimator", "message"),
    [
        (partial(BlockLowRank, 0), "population must be at least 1, got 0"),
        (partial(NodePerturbation, (4, 0, 1)), r"population must be at least 1, got \(4, 0, 1\)"),
        (partial(LowRank, -2), "must be at least 1, got -2"),
        (partial(BlockLowRank, 8, sigma=0.0), "sigma must be > 0, got 0.0"),
        (partial(LowRank, 8, sigma=-1.0), "sigma must be > 0, got -1.0"),
        (partial(BlockLowRank, 8, rank=0), "rank must be at least 1, got 0"),
        (partial(BlockLowRank, 8, units=0), "units must be at least 1, got 0"),
        (partial(NodePerturbation, 8, units=12), r"a power of two, got 12 \(try 16\)"),
    ],
)
def test_invalid_settings_are_named_with_what_to_type(make_estimator, message):
    with pytest.raises(PopulationError, match=message):
        make_estimator()


def test_counts_of_other_layers_are_named():
    with pytest.raises(PopulationError, match=r"\(8, 8\) has 2 counts, and the network has 3"):
        Evolution(make("mlp"), cross_entropy, BlockLowRank((8, 8))).evaluate(*batch())


# ---- fitness ----


@EVERY
def test_mean_fitness_is_that_of_the_unperturbed_network_in_its_own_units(estimator):
    network, (inputs, labels) = make("mlp"), batch()
    for smoothing in (None, Smoothing(2.0, 16)):
        evolution = Evolution(network, lambda o, y: 7 * accuracy(o, y) - 3, estimator, 0, smoothing)
        evolution.evaluate(inputs, labels)
        expected = 7 * accuracy(network(inputs), labels).mean() - 3
        torch.testing.assert_close(evolution.mean_fitness, expected)


@pytest.mark.parametrize(
    ("fitness", "estimator", "message"),
    [
        (lambda o, y: o, LowRank(4), r"shape \(1, 11\) or \(1,\), got \(1, 11, 3\)"),
        (lambda o, y: 0.5, LowRank(4), "a tensor of shape .*, got float"),
        (lambda o, y: cross_entropy(o, y).mean(1), NodePerturbation(4), "add smoothing, or use"),
        (lambda o, y: cross_entropy(o, y) * float("nan"), LowRank(4), "4 of 4 members is not fin"),
    ],
)
def test_a_fitness_that_cannot_be_used_is_named(fitness, estimator, message):
    with pytest.raises(FitnessError, match=message):
        Evolution(make("mlp"), fitness, estimator).evaluate(*batch())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@EVERY
def test_scores_of_another_type_are_taken(dtype, estimator):
    network = make("mlp")
    evolution = Evolution(network, lambda o, y: accuracy(o, y).to(dtype), estimator)
    evolution.backward(evolution.evaluate(*batch()))
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


def test_a_fitness_of_the_whole_batch_and_its_mean_over_examples_are_one():
    found = []
    for fitness in (cross_entropy, lambda o, y: cross_entropy(o, y).mean(1)):
        found.append(Evolution(make("mlp"), fitness, BlockLowRank(40)).evaluate(*batch()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Sequential(nn.GELU(), nn.Dropout(0.5))])
def test_a_network_keeps_its_training_mode(activation):
    network = nn.Sequential(nn.Linear(7, 12), activation, nn.Linear(12, 3))
    network[1].eval()
    Evolution(network, cross_entropy, BlockLowRank(40)).evaluate(*batch())
    assert network.training and network[0].training and not network[1].training
