"""The oracle of the tests: members with their weights formed, one at a time, and explicit sums.

Nobody's fast path. Shapes: P members, B examples, O/I a layer's outputs/inputs, R rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from eggroll.evolution import Evolution
from eggroll.members import Block, ExampleMembers

Parameters = dict[str, Tensor]


def batch_perturbations(evolution: Evolution) -> list[Parameters]:
    """sigma E of every batch member by parameter name, for the step last evaluated."""
    members, step = evolution.members, evolution._last
    names = _names(evolution.evaluated)
    found = []
    for block in evolution.blocks:
        noise = members.draw(step, [block])
        for member in range(len(block)):
            sign = -1 if members.antithetic and member % 2 else 1
            draw = member // 2 if members.antithetic else member
            found.append(
                {
                    names[id(w)]: sign * noise[f"a{i}"][draw].T @ noise[f"b{i}"][draw]
                    for i, w in enumerate(step.weights)
                    if f"a{i}" in noise
                }
                | {
                    names[id(b)]: sign * noise[f"e{j}"][draw]
                    for j, b in enumerate(step.biases)
                    if f"e{j}" in noise
                }
            )
    return found


def batch_scores(evolution: Evolution, inputs: Tensor, labels: Tensor) -> Tensor:
    """One score per member, (P,): each network formed and evaluated by itself."""
    scores = []
    for perturbation in batch_perturbations(evolution):
        outputs = _outputs(evolution.evaluated, perturbation, inputs)
        scores.append(evolution.fitness(outputs.unsqueeze(0), labels).mean())
    return torch.stack(scores)


def batch_gradient(evolution: Evolution, scores: Tensor) -> Parameters:
    """Sum over members of score * sigma E / sigma^2 / P: Algorithm 1 without shaping."""
    total: Parameters = {}
    baseline = 0 if evolution.members.antithetic else evolution._last.baseline
    for score, perturbation in zip(scores, batch_perturbations(evolution), strict=True):
        for name, matrix in perturbation.items():
            term = (score - baseline) * matrix / evolution.members.sigma**2 / len(scores)
            total[name] = total.get(name, 0) + term
    return total


def example_perturbations(evolution: Evolution, block: Block) -> Callable[[int, int], Parameters]:
    """(member of the block, example) -> d a B^T with B = x / |x|^2, by parameter name; of a layer
    that is called once, and reads one row per example. With a bias x is followed by a 1."""
    step, names = evolution._last, _names(evolution.evaluated)
    noise = evolution.members.draw(step, [block])
    rows = evolution.members.rows(noise, 0)
    (call,) = [call for call in step.calls if call.index == block.layer]

    def perturbation(member: int, example: int) -> Parameters:
        moved, x = rows[member, 0] * noise["d0"][example], call.x[example]
        size = x.square().sum() + (call.bias is not None)
        found = {names[id(step.weights[block.layer])]: torch.outer(moved, x) / size}
        return found if call.bias is None else found | {names[id(call.bias)]: moved / size}

    return perturbation


def example_scores(evolution: Evolution, inputs: Tensor, labels: Tensor) -> Tensor:
    """Scores (P, B): each member's network formed for each example."""
    rows = []
    for block in evolution.blocks:
        perturbation = example_perturbations(evolution, block)
        for member in range(len(block)):
            row = []
            for e in range(len(inputs)):
                changed = perturbation(member, e)
                outputs = _outputs(evolution.evaluated, changed, inputs[e : e + 1])
                row.append(evolution.fitness(outputs.unsqueeze(0), labels[e : e + 1])[0, 0])
            rows.append(torch.stack(row))
    return torch.stack(rows)


def example_gradient(evolution: Evolution, scores: Tensor) -> Parameters:
    """Sum over members and examples of (s - s0) times the formed perturbation, divided by its
    covariance, sigma^2 c^2 / |x|^2 along x, and by how many members move the unit
    (docs/method.md)."""
    assert isinstance(evolution.members, ExampleMembers)
    step, total = evolution._last, {}
    for block in evolution.blocks:
        perturbation = example_perturbations(evolution, block)
        of_layer = [b for b in evolution.blocks if b.layer == block.layer]
        rows = evolution.members.rows(evolution.members.draw(step, of_layer), 0)
        moving = (rows[:, 0] != 0).sum(0)  # (O,)
        (call,) = [call for call in step.calls if call.index == block.layer]
        size = step.shared[block.layer]["c0"].square()
        for member in range(len(block)):
            for e, x in enumerate(call.x):
                weight = (x.square().sum() + (call.bias is not None)) / size
                change = scores[block.start + member, e] - step.baseline[e]
                for name, matrix in perturbation(member, e).items():
                    each = moving.view(-1, *[1] * (matrix.dim() - 1))
                    term = change * weight * matrix / each / scores.shape[1]
                    total[name] = total.get(name, 0) + term
    return total


def _outputs(network: nn.Module, perturbation: Parameters, inputs: Tensor) -> Tensor:
    own = dict(network.named_parameters())
    changed = {name: own[name] + matrix for name, matrix in perturbation.items()}
    return functional_call(network, changed, (inputs,), tie_weights=True)


def _names(network: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in network.named_parameters()}
