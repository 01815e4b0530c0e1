"""Units in three states stand for the members' tensor, whatever is done with them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll import BatchMembers, Evolution, ExampleMembers, cross_entropy, noise, reference
from eggroll.moved import MovedUnits, spread

MEMBERS, EXAMPLES = 5, 3


def moved(units=40, positions=()):
    """MovedUnits and the tensor that they stand for."""
    generator = torch.Generator().manual_seed(units)
    rows, blocks = noise.orthogonal_rows(
        units, noise.row_units(units, MEMBERS), generator, torch.float64
    )
    rows, blocks = rows[:MEMBERS], blocks[:MEMBERS]
    rows = rows.view(MEMBERS, *[1] * len(positions), -1)
    rows = rows * noise.signs((MEMBERS, *positions, 1), generator, torch.float64)
    y = torch.randn(1, EXAMPLES, *positions, units, generator=generator, dtype=torch.float64)
    move = 0.5 * torch.ones_like(y)
    whole = y + 0.5 * spread(rows, blocks, units).unsqueeze(1)
    return MovedUnits(torch.cat([y, y + move, y - move]), rows.unsqueeze(1), blocks), whole


@pytest.mark.parametrize(
    "function",
    [
        F.gelu,
        torch.sign,
        lambda x: (x > 0).to(x.dtype) * 2 - 1,
        lambda x: x * torch.sigmoid(x),
        lambda x: F.relu_(x),
        lambda x: x + torch.arange(40),
        lambda x: F.softmax(x, -1),
        lambda x: F.layer_norm(x, (40,)),
        lambda x: x.mul_(2).clamp_(-1, 1),
        lambda x: x.add_(torch.ones(MEMBERS, EXAMPLES, 40)) * x,
        lambda x: x.unflatten(-1, (8, 5)).transpose(-1, -2).flatten(-2),
        lambda x: torch.cat([x, x.exp()], -1),
        lambda x: x + torch.randn(MEMBERS, 1, 1, generator=torch.Generator().manual_seed(0)),
    ],
)
@torch.no_grad()
def test_a_function_of_moved_units_is_that_of_the_tensor(function):
    held, whole = moved()
    wanted = function(whole)
    found = function(held)
    found = found.formed() if isinstance(found, MovedUnits) else found
    assert found.shape == wanted.shape and torch.allclose(found, wanted.to(found.dtype))


@torch.no_grad()
def test_units_stay_in_three_states_through_what_works_on_each():
    held, _ = moved()
    assert isinstance(nn.GELU()(held), MovedUnits)
    assert isinstance((held > 0).to(torch.int8), MovedUnits)
    assert not isinstance(held.sum(-1), MovedUnits)
    assert not isinstance(F.dropout(held), MovedUnits)  # masks of their own for all members


@pytest.mark.parametrize("units", [5, 16, 40, 64])
@pytest.mark.parametrize("positions", [(), (4,)])
@torch.no_grad()
def test_the_next_layer_multiplies_what_has_moved(units, positions):
    held, whole = moved(units, positions)
    layer = nn.Linear(units, 7).double()
    wanted = layer(F.gelu(whole))
    assert torch.allclose(F.gelu(held).linear(layer.weight, layer.bias), wanted)
    held.add_(whole)  # no longer what members alone have moved
    assert torch.allclose(held.linear(layer.weight, None), (2 * whole) @ layer.weight.T)


def test_members_that_moved_few_units_score_as_their_formed_networks_do():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 33), nn.ReLU(inplace=True))
    network.append(nn.Linear(33, 4)).double()
    batch = torch.randn(9, 6, dtype=torch.float64), torch.randint(0, 4, (9,))
    evolution = Evolution(network, cross_entropy(), ExampleMembers((48, 7, 4), 0.1))
    scores = evolution.evaluate(*batch)
    assert torch.allclose(scores, reference.example_scores(evolution, *batch))


@pytest.mark.parametrize("population", [2, 5, 40])
def test_few_members_are_right_on_average(population):
    """Even where some units are moved by more members than others."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 4)).double()
    inputs, labels = torch.randn(5, 6, dtype=torch.float64), torch.randint(0, 4, (5,))
    fitness = cross_entropy()(network(inputs)[None], labels).mean()
    (true,) = torch.autograd.grad(fitness, network[0].weight)
    evolution = Evolution(network, cross_entropy(), ExampleMembers((population, 4), 1e-4))
    total = torch.zeros_like(true)
    for _ in range(steps := 1_500):
        evolution.backward(evolution.evaluate(inputs, labels))
        total -= network[0].weight.grad / steps
    assert (total - true).norm() < 0.25 * true.norm()
    assert F.cosine_similarity(total.flatten(), true.flatten(), 0) > 0.97


def test_batch_members_are_never_held_in_states():
    network = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    scores = Evolution(network, cross_entropy(), BatchMembers(4)).evaluate(
        torch.randn(3, 6), torch.tensor([0, 1, 2])
    )
    assert scores.shape == (4,)
