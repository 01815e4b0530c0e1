"""Materialised members: each by itself in a network of its own, with explicit sums. Slow.

It reads the noise that an estimator draws, and nothing else of how the estimator computes.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eggroll import Evolution, LowRank, NodePerturbation
from eggroll.blocks import Draw


class Member(NamedTuple):
    draw: Draw
    direction: int
    block: int


def members(evolution: Evolution) -> Iterator[Member]:
    """All members of a step, in the order of their scores."""
    for draw in evolution.draws:
        for direction in range(draw.directions):
            for block in range(draw.blocks):
                yield Member(draw, direction, block)


def scores(evolution: Evolution, inputs: Tensor, labels: Tensor) -> Tensor:
    """Scores (P,) or (P, B) of members that are evaluated one at a time."""
    found = []
    for member in members(evolution):
        with torch.no_grad():
            outputs = network_of(evolution, member)(inputs)
        score = evolution.fitness(outputs[None], labels)[0]
        found.append(score if evolution.estimator.per_example else score.mean())
    return torch.stack(found)


def network_of(evolution: Evolution, member: Member) -> nn.Module:
    """Return a copy of the network whose layers compute what the member's do."""
    network = copy.deepcopy(evolution.network)
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    for module in linears:  # tied weights are perturbed apart
        module.weight = nn.Parameter(module.weight.detach().clone())
    for index in member.draw.layers:
        if isinstance(evolution.estimator, NodePerturbation):
            moves = iter(output_moves(evolution, member, index))
            linears[index].register_forward_hook(lambda _, __, y, moves=moves: y + next(moves))
            continue
        change = evolution.estimator.sigma * perturbation(evolution, member, index)
        with torch.no_grad():
            linears[index].weight += change[:, : linears[index].in_features]
            if linears[index].bias is not None:
                linears[index].bias = nn.Parameter(linears[index].bias + change[:, -1])
    return network


def mask(member: Member, outputs: int) -> Tensor:
    """1 for the units that a member of a block perturbs, (O,)."""
    if not member.draw.splits:
        return torch.ones(outputs)
    return (torch.arange(outputs) // member.draw.units == member.block).float()


def perturbation(evolution: Evolution, member: Member, index: int) -> Tensor:
    """Return E of [W, bias], (O, I), of a low-rank member."""
    noise = evolution._noise(member.draw)[index]
    a, b = noise.a[member.direction], noise.b[member.direction]  # (R, O), (R, I)
    total = sum(torch.outer(a[r], b[r]) for r in range(len(a)))
    if isinstance(evolution.estimator, LowRank):
        return total * (1 - 2 * member.block)  # the pair's second member has sign -
    return total * mask(member, len(total))[:, None]


def output_moves(evolution: Evolution, member: Member, index: int) -> list[Tensor]:
    """Return what a member of node perturbation adds to each call of its layer, (B, ..., O)."""
    noise, layer = evolution._noise(member.draw)[index], evolution.layers[index]
    units = mask(member, layer.outputs)
    return [
        noise.size[p] * noise.signs[p] * noise.rows[p][member.direction] * units
        for p in layer.calls
    ]


def ascent(evolution: Evolution, scores: Tensor) -> list[Tensor]:
    """Ascent direction of each layer's [W, bias], (O, I), by sums over members and examples."""
    layers = evolution.layers
    totals = [torch.zeros(layer.outputs, layer.inputs) for layer in layers]
    slopes = scores - evolution.baseline
    for change, member in zip(slopes, members(evolution), strict=True):
        for index in member.draw.layers:
            layer = layers[index]
            if not isinstance(evolution.estimator, NodePerturbation):
                everyone = evolution.population if len(member.draw.layers) > 1 else None
                count = everyone or member.draw.directions  # that perturb a unit
                change_of_fitness = change / evolution.estimator.sigma
                totals[index] += change_of_fitness * perturbation(evolution, member, index) / count
                continue
            noise = evolution._noise(member.draw)[index]
            for (p, call), move in zip(
                layer.calls.items(), output_moves(evolution, member, index), strict=True
            ):
                reads = layer.with_one(call.x[0])
                for example in range(len(change)):
                    delta = change[example] * move[example] / noise.size[p] ** 2
                    outer = delta.reshape(-1, layer.outputs).T @ reads[example].reshape(
                        -1, layer.inputs
                    )
                    totals[index] += outer / member.draw.directions / len(change)
    return totals
