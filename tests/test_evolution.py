"""The trainer: fitness rises, a step leaves what it should, and resumption draws the same noise."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll import (
    MLP,
    BackendError,
    BatchMembers,
    Evolution,
    ExampleMembers,
    FitnessError,
    accuracy,
    cross_entropy,
    smoothed,
)
from eggroll.compiled import Compiled
from eggroll.model import kth_largest

KINDS = pytest.mark.parametrize(
    "members", [BatchMembers(64, sigma=0.05), ExampleMembers(24, sigma=0.02)]
)


@pytest.fixture
def network():
    return MLP(7, 16, 3, seed=1, bias=True)


def train(evolution, batch, steps, lr=0.2):
    optimizer = torch.optim.SGD(evolution.network.parameters(), lr=lr, momentum=0.9)
    fitness = []
    for _ in range(steps):
        evolution.backward(evolution.evaluate(*batch))
        fitness.append(evolution.mean_fitness.item())
        optimizer.step()
    return fitness


def weights_of(network):
    return [p.detach().clone() for p in network.parameters()]


@KINDS
@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_fitness_rises(network, batch, members, backend):
    fitness = train(Evolution(network, cross_entropy(), members, backend=backend), batch, 60, 0.05)
    assert fitness[-1] > 0.5 * fitness[0] > fitness[0]


def test_hits_alone_are_a_signal_for_batch_members(network, batch):
    members = BatchMembers(400, sigma=0.3)
    fitness = train(Evolution(network, accuracy, members), batch, 60, 0.1)
    assert fitness[-1] >= max(fitness[0] + 0.3, 0.8)


@KINDS
def test_a_resumed_trainer_goes_on_with_the_same_bits(network, batch, members):
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    evolution = Evolution(network, cross_entropy(), members, seed=3)
    train(evolution, batch, 3)
    saved = evolution.state_dict(), {n: t.clone() for n, t in network.state_dict().items()}
    train(evolution, batch, 2)
    whole = weights_of(network)
    network.load_state_dict(saved[1])
    resumed = Evolution(network, cross_entropy(), members, seed=3)
    resumed.load_state_dict(saved[0])
    train(resumed, batch, 2)
    assert all(map(torch.equal, whole, weights_of(network)))
    network.load_state_dict(start)
    other = Evolution(network, cross_entropy(), members, seed=4)
    train(other, batch, 5)
    assert not torch.equal(whole[0], network.layers[0].weight)


@KINDS
def test_a_warm_up_leaves_no_trace(network, batch, members):
    evolution = Evolution(network, cross_entropy(), members)
    before = weights_of(network)
    evolution.warm_up(*batch)
    assert evolution.step == 0 and all(p.grad is None for p in network.parameters())
    assert all(map(torch.equal, before, weights_of(network)))


@KINDS
def test_noise_is_fresh_at_every_step(network, batch, members):
    evolution = Evolution(network, cross_entropy(), members)
    first = evolution.evaluate(*batch)
    assert torch.equal(first, evolution.evaluate(*batch))  # the same step, the same members
    evolution.backward(first)
    assert not torch.equal(first, evolution.evaluate(*batch))


def test_a_forward_in_bfloat16_perturbs_a_copy_and_fills_float32_gradients(network, batch):
    exact = Evolution(network, cross_entropy(), BatchMembers(256, sigma=0.1))
    exact.backward(exact.evaluate(*batch))
    true = torch.cat([p.grad.flatten() for p in network.parameters()])
    before = weights_of(network)
    rough = Evolution(network, cross_entropy(), BatchMembers(256, sigma=0.1), dtype=torch.bfloat16)
    for _ in range(2):  # the copy follows the network
        rough.step = 0
        rough.backward(rough.evaluate(*batch))
    found = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert found.dtype == torch.float32 and all(map(torch.equal, before, weights_of(network)))
    # its noise is drawn in bfloat16, so it is other noise: both point along the same gradient
    loss = F.cross_entropy(network(batch[0]), batch[1])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, network.parameters())])
    for estimate in (true, found):
        assert F.cosine_similarity(estimate, gradient, 0) > 0.3


def test_mean_fitness_is_that_of_the_unperturbed_network(network, batch):
    expected = -F.cross_entropy(network(batch[0]), batch[1])
    for members in (BatchMembers(8, sigma=1.0), ExampleMembers(8, sigma=1.0)):
        evolution = Evolution(network, cross_entropy(), members)
        evolution.evaluate(*batch)
        torch.testing.assert_close(evolution.mean_fitness, expected.detach())


def test_the_population_that_is_really_used_is_told(network):
    evolution = Evolution(network, cross_entropy(), ExampleMembers(1000))
    assert evolution.population == 36 and evolution.counts == [(0, 16), (1, 16), (2, 4)]


@pytest.mark.parametrize(
    ("fitness", "members", "message"),
    [
        (lambda o, y: o, BatchMembers(4), "return"),
        (lambda o, y: cross_entropy()(o, y).mean(1), ExampleMembers(4), "or batch members"),
        (lambda o, y: cross_entropy()(o, y) * float("nan"), BatchMembers(4), "4 of 4 members"),
    ],
)
def test_a_fitness_that_cannot_be_used_is_named(network, batch, fitness, members, message):
    with pytest.raises(FitnessError, match=message):
        Evolution(network, fitness, members).evaluate(*batch)


# ---- backends ----


@KINDS
def test_compiled_equals_eager(network, batch, members):
    found = []
    for backend in ("eager", "compile"):
        evolution = Evolution(network, cross_entropy(), members, backend=backend)
        found.append(evolution.evaluate(*batch))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_smoothed_fitness_compiles_and_is_read_in_its_own_units(network, batch):
    found, fitness = [], []
    for backend in ("eager", "compile"):
        scored = smoothed(lambda o, y: 7 * accuracy(o, y) - 3, samples=64)
        evolution = Evolution(network, scored, ExampleMembers(12), backend=backend)
        evolution.warm_up(*batch)
        with torch.compiler.set_stance("fail_on_recompile"):
            found.append(evolution.evaluate(*batch))
        fitness.append(evolution.mean_fitness)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    expected = 7 * accuracy(network(batch[0]), batch[1]).mean() - 3
    torch.testing.assert_close(fitness, [expected, expected])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_scores_of_another_type_are_taken(dtype, network, batch):
    evolution = Evolution(
        network, lambda o, y: accuracy(o, y).to(dtype), ExampleMembers(12, sigma=0.5)
    )
    evolution.backward(evolution.evaluate(*batch))
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


def test_members_in_bfloat16_of_the_usual_network_are_not_taken_for_folded():
    network, inputs = MLP(), torch.randn(32, 784)
    members = BatchMembers(8)
    evolution = Evolution(network, cross_entropy(), members, dtype=torch.bfloat16)
    evolution.backward(evolution.evaluate(inputs, torch.zeros(32, dtype=torch.long)))
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


@KINDS
def test_nothing_is_compiled_after_the_first_step(network, batch, members):
    evolution = Evolution(network, cross_entropy(), members, backend="compile")
    inputs, labels = batch
    train(evolution, batch, 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(evolution, batch, 3)
        train(evolution, (inputs[:5], labels[:5]), 1)  # a batch that is cut off runs eagerly


def test_a_network_of_many_layers_is_compiled_layer_by_layer():
    layers = [module for _ in range(9) for module in (nn.Linear(5, 5), nn.Tanh())]
    network, inputs = nn.Sequential(*layers, nn.Linear(5, 3)), torch.randn(4, 5)
    evolution = Evolution(network, cross_entropy(), ExampleMembers(20), backend="compile")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evolution.evaluate(inputs, torch.tensor([0, 1, 2, 0]))
    assert evolution.backend == "compile"


def test_a_fitness_from_elsewhere_runs_eagerly(network, batch):
    seen = []

    def fitness(outputs, labels):
        seen.append(torch.compiler.is_compiling())
        return cross_entropy()(outputs, labels)

    train(Evolution(network, fitness, ExampleMembers(8), backend="compile"), batch, 2)
    assert seen and not any(seen)


def test_a_broken_compiler_costs_one_warning(network, batch):
    evolution = Evolution(network, cross_entropy(), ExampleMembers(8), backend="compile")
    evolution.expand = None

    def broken(*_):
        raise RuntimeError("no such instruction")

    evolution.warm_up(*batch)
    for scorer in evolution._scorers.values():
        scorer.compiled, scorer.shapes = broken, None
    with pytest.warns(UserWarning, match=r"going on with backend eager \(no such") as caught:
        train(evolution, batch, 2)
    assert evolution.backend == "eager" and len({str(w.message) for w in caught}) == 1


def test_an_error_of_the_function_itself_is_not_the_compilers():
    def wrong(x):
        return x @ torch.ones(3, 3)

    with warnings.catch_warnings(), pytest.raises(RuntimeError):
        warnings.simplefilter("error")
        Compiled(wrong, "compile", torch.device("cpu"))(torch.ones(2, 2))


def test_backends_that_cannot_run_are_named(network):
    for backend, message in (("jax", "not known"), ("fused", "on CUDA")):
        with pytest.raises(BackendError, match=message):
            Evolution(network, cross_entropy(), BatchMembers(4), backend=backend)


@pytest.mark.parametrize("activation", ["sign", "step", "argmax-k", "int8-round"])
def test_networks_without_a_gradient_evolve(activation, batch):
    network = MLP(7, 16, 3, seed=1, activation=activation)
    first = network.layers[0].weight
    F.cross_entropy(network(batch[0]), batch[1]).backward()
    assert first.grad is None or not first.grad.any()
    members = ExampleMembers(36, sigma=0.1, antithetic=True)
    fitness = train(Evolution(network, cross_entropy(), members), batch, 60, 0.05)
    assert fitness[-1] > fitness[0] + 0.2
    assert isinstance(network.layers[0], nn.Linear)


def test_the_fast_selection_of_the_kth_largest_is_the_reference():
    x = torch.randn(3, 5, 33).round(decimals=1)  # with ties
    for k in (1, 9, 33):
        reference = kth_largest(x.double(), k)  # torch's own
        assert torch.equal(kth_largest(x, k).double(), reference)
