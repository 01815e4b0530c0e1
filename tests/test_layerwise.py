"""Members that perturb one layer each: what they compute, and the gradient they estimate."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from eggroll import (
    MLP,
    FitnessError,
    LayerwiseEvolution,
    PopulationError,
    accuracy,
    cross_entropy,
    layer_members,
    plain_linear,
)
from eggroll.centre import Centre, forward_of_members
from eggroll.credit import example_credit, materialised_credit
from eggroll.directions import KINDS, draw_directions
from eggroll.projections import SAMPLINGS, draw_projections
from eggroll.sharing import share_equally

NO_GROUPS = torch.zeros(16, dtype=torch.long)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(examples=16, inputs=12, classes=5, seed=0):
    own = generator(seed)
    return torch.randn(examples, inputs, generator=own), torch.randint(
        0, classes, (examples,), generator=own
    )


def true_gradient(network, inputs, labels):
    loss = F.cross_entropy(network(inputs), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, network.parameters())])


def mean_estimate(network, inputs, labels, *, draws, **options):
    # larger chunks than on a CPU by default: so small a network is all calls
    options = {"chunk_size": 512} | options
    evolution = LayerwiseEvolution(network, cross_entropy(), **options)
    total = 0
    for _ in range(draws):
        evolution.estimate(inputs, labels)
        total = total + torch.cat([p.grad.flatten() for p in network.parameters()])
    return total / draws


def cosine(x, y):
    return F.cosine_similarity(x, y, dim=0).item()


# ---- the factors ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", [8, 10])
def test_directions_have_the_identity_as_their_mean(kind, outputs):
    a = draw_directions(kind, 400, 12, 2, outputs, torch.empty(0), generator())
    assert a.shape == (400, 12, 2, outputs)
    rows = a.flatten(0, 2)
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(outputs), rtol=0, atol=0.06)


@pytest.mark.parametrize("outputs", [1, 8, 10])
def test_a_full_set_of_orthogonal_directions_leaves_no_noise(outputs):
    members = 1 << (outputs - 1).bit_length()
    a = draw_directions("orthogonal", 3, members, 1, outputs, torch.empty(0), generator())[:, :, 0]
    for group in a:
        torch.testing.assert_close(group.T @ group / members, torch.eye(outputs))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("rank", [1, 3])
def test_projections_have_the_moment_that_they_claim(sampling, rank):
    rows, _ = data()
    drawn = draw_projections(sampling, rows, NO_GROUPS, 8000, rank, generator())
    assert drawn.u.shape == (8000, rank, 16)
    found = drawn.u.square().mean((0, 1))
    torch.testing.assert_close(found, drawn.moment, rtol=0.1, atol=0)


@pytest.mark.parametrize("sampling", ["gaussian", "batch-subspace"])
def test_projections_are_those_of_the_b_that_is_formed(sampling):
    rows, _ = data()
    drawn = draw_projections(sampling, rows, NO_GROUPS, 5, 2, generator())
    torch.testing.assert_close(drawn.u, torch.einsum("mri,ei->mre", drawn.b, rows))


def degenerate_rows(kind):
    rows, _ = data(16, 24)
    if kind == "duplicates":
        rows[8:] = rows[:8]
    elif kind == "blank":
        rows[3:6] = 0
    elif kind == "more rows than inputs":
        rows = rows[:, :10]
    elif kind == "all blank":
        rows = torch.zeros_like(rows)
    return rows


@pytest.mark.parametrize(
    "kind", ["independent", "duplicates", "blank", "more rows than inputs", "all blank"]
)
@pytest.mark.parametrize("groups", [1, 4])
def test_some_b_makes_the_whitened_projections_of_any_batch(kind, groups):
    rows = degenerate_rows(kind)
    group = torch.arange(16) % groups
    drawn = draw_projections("whitened", rows, group, 6, 1, generator())
    for g in range(groups):
        own, u = rows[group == g], drawn.u[:, 0, group == g].T
        b = torch.linalg.pinv(own.double(), rtol=1e-4) @ u.double()
        torch.testing.assert_close((own.double() @ b).float(), u, rtol=1e-3, atol=1e-3)
    if kind == "independent":
        assert torch.allclose(drawn.u.abs(), rows.square().sum(1).mean().sqrt())


# ---- the members ----


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_members_are_the_network_with_one_layer_perturbed(rank, bias, index):
    """The fast forward against W + sigma / sqrt(R) a^T b, formed in full, one member at a time."""
    network = MLP(12, 8, 5, bias=bias).double()
    inputs = data()[0].double()
    centre = Centre(network, inputs)
    rows, sigma, layer = centre.rows(index), 0.3, network.layers[index]
    a = draw_directions("gaussian", 1, 6, rank, layer.out_features, rows, generator())
    drawn = draw_projections("gaussian", rows, NO_GROUPS, 6, rank, generator())
    moves = sigma / math.sqrt(rank) * drawn.u
    with torch.no_grad():
        outputs = forward_of_members(
            network, centre.layers, centre.outputs, centre.calls, index, moves, a, inputs
        )
    for member in range(6):
        full = sigma / math.sqrt(rank) * a[0, member].T @ drawn.b[member]
        changed = {f"layers.{index}.weight": layer.weight + full[:, : layer.in_features]}
        if bias:
            changed[f"layers.{index}.bias"] = layer.bias + full[:, -1]
        torch.testing.assert_close(outputs[member], functional_call(network, changed, (inputs,)))


@pytest.mark.parametrize("groups", [1, 3, 16])
@pytest.mark.parametrize("positions", [1, 4])
def test_example_credit_equals_its_materialised_twin(groups, positions):
    examples, members, rank = 16, 6, 2
    rows = torch.randn(examples * positions, 7, generator=generator())
    group = (torch.arange(examples) % groups).repeat_interleave(positions)
    a = draw_directions("gaussian", groups, members, rank, 5, rows, generator())
    drawn = draw_projections("whitened", rows, group, members, rank, generator())
    slopes = torch.randn(members, examples, generator=generator())
    fast = example_credit(slopes, a, drawn, rows)
    plain = materialised_credit(slopes, a, drawn, rows)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


# ---- the estimate ----

ESTIMATORS = {
    "defaults": {"population": 24, "sigma": 0.001},
    "groups": {"population": 120, "groups": 5, "sigma": 0.001},
    "an example each": {"population": 16 * 24, "groups": 16, "sigma": 0.001},
    "rank 2": {"population": 24, "rank": 2, "sigma": 0.001},
    "central": {"population": 48, "difference": "central", "sigma": 0.01},
    "gaussian": {"population": 600, "noise": "gaussian", "sampling": "gaussian", "sigma": 0.001},
    "subspace, rank 3": {
        "population": 600,
        "noise": "rademacher",
        "sampling": "batch-subspace",
        "rank": 3,
        "sigma": 0.001,
    },
    "activations": {"population": 24, "sampling": "activations", "sigma": 0.001},
}
PAPER = {"credit": "member", "difference": "central", "shaping": "none", "sigma": 0.01}
PAPER |= {"noise": "gaussian", "population": 1500}
ESTIMATORS["paper"] = PAPER | {"sampling": "gaussian"}
ESTIMATORS["paper, subspace, rank 2"] = PAPER | {"sampling": "batch-subspace", "rank": 2}
ESTIMATORS["paper, groups"] = PAPER | {"sampling": "gaussian", "groups": 5, "population": 3000}
ESTIMATORS["paper, forward"] = PAPER | {"sampling": "gaussian", "difference": "forward"}
ESTIMATORS["paper, whitened, groups"] = PAPER | {"sampling": "whitened", "groups": 5, "rank": 2}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("bias", [False, True])
def test_estimates_are_unbiased_and_converge_at_the_rate_of_averaging(name, bias):
    network = MLP(12, 8, 5, bias=bias, seed=0)
    inputs, labels = data()
    true = true_gradient(network, inputs, labels)
    few = mean_estimate(network, inputs, labels, draws=4, **ESTIMATORS[name])
    many = mean_estimate(network, inputs, labels, draws=256, **ESTIMATORS[name])
    error, error_of_few = (many - true).norm() / true.norm(), (few - true).norm() / true.norm()
    assert error < 0.12
    assert error < 0.01 or 4 < error_of_few / error < 16  # sqrt(256 / 4) = 8


def test_members_in_several_blocks_are_as_unbiased_as_in_one(monkeypatch):
    monkeypatch.setattr(layer_members, "DIRECTIONS_PER_BLOCK", 7)
    network = MLP(12, 8, 5, seed=0)
    inputs, labels = data()
    true = true_gradient(network, inputs, labels)
    for credit in ("example", "member"):
        options = {"population": 240, "groups": 4, "sigma": 0.001, "noise": "gaussian"}
        found = mean_estimate(network, inputs, labels, draws=300, credit=credit, **options)
        assert cosine(found, true) > 0.99
        assert abs(found.norm() / true.norm() - 1) < 0.06


def test_blocks_of_a_layer_s_members_are_drawn_alike_each_time_and_unlike_each_other(monkeypatch):
    monkeypatch.setattr(layer_members, "DIRECTIONS_PER_BLOCK", 7)
    network = MLP(12, 8, 5)
    evolution = LayerwiseEvolution(network, cross_entropy(), population=60, noise="gaussian")
    members = evolution._members(Centre(network, data()[0]), 0, 17)
    once, again = ([drawn.a for drawn in members.blocks()] for _ in range(2))
    assert [a.shape[1] for a in once] == [7, 7, 3]
    assert all(map(torch.equal, once, again))
    assert not torch.equal(once[0], once[1])


def mean_log_likelihood(logits, labels):
    """A fitness that cannot be asked about examples one by one, and is the mean over them."""
    return cross_entropy()(logits, labels).mean(1)


def test_each_group_of_members_is_scored_on_its_own_examples():
    found = []
    for fitness in (cross_entropy(), mean_log_likelihood):
        network = MLP(12, 8, 5, seed=0)
        options = {"population": 120, "groups": 5, "credit": "member"}
        LayerwiseEvolution(network, fitness, **options).estimate(*data())
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    torch.testing.assert_close(*found)


def test_with_a_group_for_each_example_one_score_per_member_is_per_example_credit():
    found = []
    for credit in ("member", "example"):
        network = MLP(12, 8, 5, seed=0)
        options = {"population": 16 * 24, "groups": 16, "credit": credit}
        LayerwiseEvolution(network, cross_entropy(), **options).estimate(*data())
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert cosine(*found) > 0.8  # not 1: a group's mean is taken off its members' scores


@pytest.mark.parametrize("members", [16, 64])
def test_orthogonal_directions_have_the_cosine_that_theory_says(members):
    """One set of M of O directions for all examples: cos = sqrt(M / O), and none of it is luck."""
    network = MLP(20, 256, 10, seed=0)
    inputs, labels = data(32, 20, 10)
    true = torch.autograd.grad(F.cross_entropy(network(inputs), labels), network.layers[0].weight)[
        0
    ].flatten()
    evolution = LayerwiseEvolution(
        network, cross_entropy(), population=2 * members + 16, sigma=1e-3, sampling="activations"
    )
    found = []
    for _ in range(20):
        evolution.estimate(inputs, labels)
        found.append(cosine(network.layers[0].weight.grad.flatten(), true))
    # the signs of the examples are the second half of the noise: E / (E + 1) of it averages out
    assert abs(sum(found) / len(found) / math.sqrt(members / 256) - 1) < 0.1


def test_duplicate_and_blank_examples_do_not_bias_the_estimate():
    network = MLP(12, 8, 5, bias=True, seed=0)
    inputs, labels = data()
    inputs, labels = (
        torch.cat([inputs, inputs[:5], torch.zeros(3, 12)]),
        torch.cat([labels, labels[:5], labels[:3]]),
    )
    true = true_gradient(network, inputs, labels)
    found = mean_estimate(network, inputs, labels, draws=300, population=24, sigma=0.001)
    assert cosine(found, true) > 0.99
    assert abs(found.norm() / true.norm() - 1) < 0.06


class Sequence(nn.Module):
    """Reads (B, T, 60): the first layer meets an example at several positions."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(60, 8), nn.Linear(8, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.1, generator=generator(len(parameter)))

    def forward(self, x, linear=plain_linear):
        return linear(self.head, torch.tanh(linear(self.first, x)).mean(-2))


@pytest.mark.parametrize("groups", [1, 4])
def test_examples_with_several_positions_are_credited_at_each(groups):
    network = Sequence()
    inputs = torch.randn(16, 3, 60, generator=generator())
    labels = data()[1]
    true = true_gradient(network, inputs, labels)
    options = {"population": 16 * groups, "groups": groups, "sigma": 0.001, "draws": 400}
    found = mean_estimate(network, inputs, labels, **options)
    assert cosine(found, true) > 0.98
    assert abs(found.norm() / true.norm() - 1) < 0.1


@pytest.mark.parametrize(
    "option", [{"chunk_size": 3}, {"chunk_size": 1000}, {"backend": "compile"}]
)
def test_neither_chunks_nor_the_backend_change_the_estimate(option):
    network, (inputs, labels) = MLP(12, 8, 5), data()
    options = {"population": 5 * 4 * 3, "groups": 4, "draws": 3}
    plain = mean_estimate(network, inputs, labels, **options)
    other = mean_estimate(network, inputs, labels, **options, **option)
    torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-4)


class SignNetwork(MLP):
    def __init__(self):
        super().__init__(8, 32, 3, seed=0)
        self.activation = torch.sign


@pytest.mark.parametrize("fitness", [cross_entropy(), accuracy])
def test_a_network_with_sign_activations_improves_where_autograd_has_no_gradient(fitness):
    centres = 2 * torch.randn(3, 8, generator=generator())
    labels = torch.randint(0, 3, (120,), generator=generator(1))
    inputs = centres[labels] + 0.5 * torch.randn(120, 8, generator=generator(2))
    network = SignNetwork()
    loss = F.cross_entropy(network(inputs), labels)
    assert not torch.autograd.grad(loss, network.layers[0].weight)[0].any()
    head = network.layers[2].weight.detach().clone()
    evolution = LayerwiseEvolution(
        network, fitness, population=4 * 48, groups=4, sigma=0.2, difference="central"
    )
    optimizer = torch.optim.Adam([layer.weight for layer in network.layers[:2]], lr=0.01)
    before = accuracy(network(inputs), labels).mean()
    for _ in range(60):
        evolution.estimate(inputs, labels)
        optimizer.step()
    assert torch.equal(network.layers[2].weight, head)  # the head, which has one, stays out of it
    assert accuracy(network(inputs), labels).mean() > max(0.9, before + 0.1)


# ---- what cannot be ----


def test_a_fitness_of_members_alone_is_for_the_population_estimator(small_network, batch):
    def one_per_member(logits, labels):
        return accuracy(logits, labels).mean(1)

    with pytest.raises(FitnessError, match="use the population estimator"):
        LayerwiseEvolution(small_network, one_per_member, population=24).estimate(*batch)
    evolution = LayerwiseEvolution(
        small_network,
        one_per_member,
        population=24,
        credit="member",
        noise="gaussian",
        sampling="gaussian",
        difference="central",
    )
    evolution.estimate(*batch)


def test_fitness_of_the_wrong_shape_is_refused(small_network, batch):
    with pytest.raises(FitnessError, match="return"):
        evolution = LayerwiseEvolution(small_network, lambda o, _: o, population=24)
        evolution.estimate(*batch)


class Twice(MLP):
    def forward(self, x, linear=plain_linear):
        first, _, head = self.layers
        return linear(head, linear(first, linear(first, x)))


class Forgets(MLP):
    def forward(self, x, linear=plain_linear):
        first, second, head = self.layers
        return linear(head, second(linear(first, x)))


@pytest.mark.parametrize(("network", "message"), [(Twice, "called twice"), (Forgets, "linear")])
def test_a_network_that_cannot_be_perturbed_layer_by_layer_is_refused(network, message):
    evolution = LayerwiseEvolution(network(8, 8, 8), cross_entropy(), population=24)
    with pytest.raises(PopulationError, match=message):
        evolution.estimate(torch.randn(4, 8), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 25, "groups": 2}, "try 24"),
        ({"population": 2}, "try 3"),
        ({"population": 24, "noise": "orthogonl"}, "try gaussian"),
        ({"population": 24, "shaping": "z-score"}, "population estimator"),
    ],
)
def test_what_cannot_be_says_what_to_type(small_network, options, message):
    with pytest.raises((PopulationError, ValueError), match=message):
        LayerwiseEvolution(small_network, cross_entropy(), **options)


def test_members_are_shared_equally_and_none_gets_more_than_it_can_use():
    assert share_equally(144, [256, 256, 16]) == [64, 64, 16]
    assert share_equally(1000, [256, 256, 16]) == [256, 256, 16]
    assert share_equally(7, [None] * 3) == [3, 2, 2]
