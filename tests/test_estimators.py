"""Estimators: their members are those of the oracle, and their estimates are the gradient."""

from functools import partial

import pytest
import torch
from networks import NETWORKS, SMOOTH, batch, make
from oracle import Member, ascent, perturbation, scores
from torch import nn
from torch.nn.functional import cosine_similarity

from eggroll import (
    BlockLowRank,
    Evolution,
    LowRank,
    NodePerturbation,
    centered_rank,
    cross_entropy,
    identity,
    z_score,
)
from eggroll import evolution as evolution_module

pytestmark = pytest.mark.filterwarnings("ignore:not evolved")

ESTIMATORS = {
    "block low rank": BlockLowRank(40, sigma=0.05, units=4, shaping=identity),
    "rank 3": BlockLowRank(40, sigma=0.05, rank=3, units=5, shaping=identity),
    "all units": BlockLowRank(9, sigma=0.05, units=1000, shaping=identity),
    "low rank": LowRank(36, sigma=0.05, rank=2, shaping=identity),
    "node perturbation": NodePerturbation(60, sigma=0.05, units=4),
    "antithetic": NodePerturbation(40, sigma=0.05, units=8, antithetic=True),
}
EVERY_NETWORK = pytest.mark.parametrize("network", NETWORKS)
EVERY_ESTIMATOR = pytest.mark.parametrize("estimator", ESTIMATORS)


def gradients(network):
    """Minus the .grad of each layer's [W, bias], (O, I)."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    parts = [
        [m.weight.grad, m.bias.grad[:, None]] if m.bias is not None else [m.weight.grad]
        for m in layers
    ]
    return [-torch.cat(columns, 1) for columns in parts]


@EVERY_NETWORK
@EVERY_ESTIMATOR
def test_scores_are_those_of_materialised_members(network, estimator):
    evolution = Evolution(make(network), cross_entropy, ESTIMATORS[estimator], seed=3)
    found = evolution.evaluate(*batch())
    expected = scores(evolution, *batch())
    assert found.shape == expected.shape and (found - evolution.baseline).abs().max() > 1e-3
    agree = (found - expected).abs() < 2e-5
    assert agree.all() if network != "step units" else agree.float().mean() > 0.99


@EVERY_NETWORK
@EVERY_ESTIMATOR
def test_the_estimate_is_the_explicit_sum_over_members(network, estimator):
    evolution = Evolution(make(network), cross_entropy, ESTIMATORS[estimator], seed=3)
    member_scores = evolution.evaluate(*batch())
    expected = ascent(evolution, member_scores)
    evolution.backward(member_scores)
    if network == "tied":  # one Parameter, whose .grad is the sum
        first, second = (total[:, :-1] for total in expected[:2])
        torch.testing.assert_close(
            -evolution.network.first.weight.grad, first + second, rtol=1e-4, atol=1e-5
        )
        return
    for own, total in zip(gradients(evolution.network), expected, strict=True):
        torch.testing.assert_close(own, total, rtol=1e-4, atol=1e-5)


def estimate_and_gradient(network, estimator, steps=1):
    """The mean estimate over some steps, and autograd's gradient, as one vector each."""
    model = make(network)
    evolution = Evolution(model, cross_entropy, estimator, seed=1)
    parameters = [p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()]
    parameters = list(dict.fromkeys(parameters))
    total = 0
    for _ in range(steps):
        evolution.backward(evolution.evaluate(*batch()))
        total = total - torch.cat([p.grad.flatten() for p in parameters]) / steps
    model.zero_grad()
    inputs, labels = batch()
    cross_entropy(model(inputs)[None], labels).mean().backward()
    return total, torch.cat([p.grad.flatten() for p in parameters])


CASES = {  # with all rows, or as many members as theory asks for
    "block low rank": BlockLowRank(60_000, sigma=1e-2, units=4, shaping=identity),
    "rank 2, all units": BlockLowRank(30_000, sigma=1e-2, rank=2, units=99, shaping=identity),
    "low rank": LowRank(30_000, sigma=3e-3, shaping=identity),
    "node perturbation": NodePerturbation(10_000, sigma=1e-3, units=4),
    "antithetic": NodePerturbation(10_000, sigma=1e-2, units=4, antithetic=True),
}


@pytest.mark.parametrize("network", SMOOTH)
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_the_gradient_in_angle_and_norm(network, case):
    # one score speaks for all positions and calls: noise is left even with all rows
    noisy = "node" in case or case == "antithetic"
    steps = 300 if noisy and network in ("twice", "positions") else 1
    found, true = estimate_and_gradient(network, CASES[case], steps)
    assert cosine_similarity(found, true, 0) > 0.98
    assert found.norm() / true.norm() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("shaping", [z_score, centered_rank])
@pytest.mark.parametrize("kind", [partial(BlockLowRank, units=16), LowRank])
def test_shaping_changes_the_length_of_an_estimate_and_hardly_its_angle(kind, shaping):
    found, true = estimate_and_gradient("mlp", kind(20_000, sigma=0.01, shaping=shaping))
    assert cosine_similarity(found, true, 0) > 0.9
    scaled = kind(2_000, sigma=0.01, shaping=shaping)
    plain, _ = estimate_and_gradient("mlp", scaled)
    model = make("mlp")
    evolution = Evolution(model, lambda o, y: 100 * cross_entropy(o, y) + 7, scaled, seed=1)
    evolution.backward(evolution.evaluate(*batch()))
    again = -torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(again, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())


def test_the_noise_of_an_estimate_falls_with_the_population():
    """Cosine about 1 / sqrt(1 + d / N) for d weights of one layer and N members."""
    model, (inputs, labels) = nn.Sequential(nn.Linear(7, 3, bias=False)), batch()
    cross_entropy(model(inputs)[None], labels).mean().backward()
    true = model[0].weight.grad.flatten().clone()
    for members, expected in ((21, 0.71), (210, 0.95)):
        evolution = Evolution(model, cross_entropy, BlockLowRank(members, 1e-3, shaping=identity))
        cosines = []
        for _ in range(100):
            evolution.backward(evolution.evaluate(inputs, labels))
            cosines.append(cosine_similarity(-model[0].weight.grad.flatten(), true, 0))
        assert torch.stack(cosines).mean() == pytest.approx(expected, abs=0.05)


def test_members_of_one_direction_differ_in_their_block_alone():
    evolution = Evolution(make("mlp"), cross_entropy, BlockLowRank((12, 3, 1), units=4), seed=3)
    evolution.evaluate(*batch())
    draw = evolution.draws[0]
    assert (draw.directions, draw.blocks) == (4, 3)
    parts = [perturbation(evolution, Member(draw, 0, block), 0) for block in range(3)]
    parts = [part.abs().sum(1) > 0 for part in parts]
    assert torch.stack(parts).sum(0).tolist() == [1] * 12
    assert parts[1].tolist() == [False] * 4 + [True] * 4 + [False] * 4


@pytest.mark.parametrize("kind", [BlockLowRank, LowRank])
@pytest.mark.parametrize("rank", [1, 4])
def test_perturbations_of_any_rank_have_the_same_second_moment(kind, rank):
    evolution = Evolution(make("mlp"), cross_entropy, kind(30_000, rank=rank))
    evolution.inspect(batch()[0])
    total, directions = 0, 0
    for draw in evolution.draws:
        if 0 in draw.layers:
            noise = evolution._noise(draw)[0]
            e = torch.einsum("nro,nri->noi", noise.a, noise.b)
            total, directions = total + e.square().sum(0), directions + len(e)
    torch.testing.assert_close(total / directions, torch.ones(12, 8), rtol=0.15, atol=0)


def test_rows_of_node_perturbation_are_orthogonal_within_each_block():
    for units, outputs in ((4, 12), (8, 10), (16, 3)):
        network = nn.Sequential(nn.Linear(7, outputs), nn.Tanh(), nn.Linear(outputs, 3))
        evolution = Evolution(network, cross_entropy, NodePerturbation(10_000, units=units))
        evolution.evaluate(*batch())
        noise = evolution._noise(evolution.draws[0])[0]
        for block in noise.rows[0].split(units, 1):
            gram = block.T @ block
            torch.testing.assert_close(gram, len(block) * torch.eye(block.shape[1]))


def test_rows_are_drawn_anew_at_every_step_and_all_of_them_in_time():
    evolution = Evolution(make("without bias"), cross_entropy, NodePerturbation(12, units=4))
    drawn = set()
    for _ in range(40):
        evolution.backward(evolution.evaluate(*batch()))
        evolution._record(batch()[0])
        drawn |= {tuple(row.tolist()) for row in evolution._noise(evolution.draws[0])[0].rows[0]}
    assert len(drawn) == 4


@pytest.mark.parametrize("network", ["positions", "twice"])
def test_positions_and_calls_have_signs_of_their_own_for_each_direction(network):
    evolution = Evolution(make(network), cross_entropy, NodePerturbation((64, 4), units=64))
    evolution.evaluate(*batch())
    rows = evolution._noise(evolution.draws[0])[0].rows
    parts = rows[0].unbind(1) if network == "positions" else list(rows.values())
    turned = (parts[0] * parts[1]).mean(-1)  # 1 or -1 for each direction
    assert set(turned.tolist()) == {1.0, -1.0}


@EVERY_ESTIMATOR
def test_scores_do_not_depend_on_how_members_are_chunked(estimator, monkeypatch):
    found = []
    for numbers in (1, 1 << 30):
        monkeypatch.setattr(evolution_module, "CHUNK", {"cpu": numbers})
        evolution = Evolution(make("mlp"), cross_entropy, ESTIMATORS[estimator], seed=3)
        found.append(evolution.evaluate(*batch()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_batch_of_blanks_has_a_gradient_of_zero():
    network = nn.Sequential(nn.Linear(7, 12, bias=False), nn.GELU(), nn.Linear(12, 3, bias=False))
    evolution = Evolution(network, cross_entropy, NodePerturbation(32))
    evolution.backward(evolution.evaluate(torch.zeros(5, 7), torch.zeros(5, dtype=torch.long)))
    assert all(not p.grad.any() and p.grad.isfinite().all() for p in network.parameters())
