"""Node perturbation: members move a layer's outputs by orthogonal signs, one score per example.

EGGROLL with one example per member, Rao-Blackwellised: docs/method.md derives it. It coincides with
node perturbation (Werfel, Xie, Seung 2003).

Shapes: n directions, K blocks, G units of a block, B examples, I / O inputs / outputs of the layer.
"""

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from eggroll.blocks import Blocks, Draw, Layer, PopulationError, pad
from eggroll.noise import hadamard, power_of_two, signs


class Moves(NamedTuple):
    """Moves of an output: size * signs * rows, for each direction."""

    rows: dict[int, Tensor]  # (n, O), orthogonal within each block, or (n, ..., O); by call
    signs: dict[int, Tensor]  # of each example's units, (B, ..., O), by call
    size: dict[int, Tensor]  # 0-d, by call

    def part(self, directions: slice) -> "Moves":
        return self._replace(rows={p: rows[directions] for p, rows in self.rows.items()})


@dataclass(frozen=True)
class NodePerturbation(Blocks):
    """Move one block of a layer's outputs by signs, with a score for each example."""

    population: int | tuple[int, ...] = (96, 128, 16)
    """Members that see each example, in all or for each layer; at most all orthogonal rows."""
    sigma: float = 0.004
    """Scale of a perturbation, in the weights' units: outputs move by sigma times |input|."""
    units: int = 16
    """Units of a layer that a member moves, a power of two."""
    antithetic: bool = False
    """Perturb in pairs with signs + and -."""

    per_example: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.units & (self.units - 1):
            raise PopulationError(
                f"units must be a power of two, got {self.units} (try {power_of_two(self.units)})"
            )

    def rounded(self, directions: float, layer: Layer) -> int:
        """Return a number of directions: at most a full set of rows, in pairs where antithetic."""
        signs, rows = 1 + self.antithetic, power_of_two(self.block_units(layer))
        return min(max(round(directions / signs), 1), rows) * signs

    def sample(self, layer: Layer, draw: Draw, rng: torch.Generator) -> Moves:
        """Draw rows of a Hadamard matrix, the same for all blocks, and the examples' signs."""
        dtype, order = next(iter(layer.calls.values())).y.dtype, power_of_two(draw.units)
        chosen = torch.randperm(order, generator=rng, device=rng.device)
        chosen = chosen[: draw.directions // (1 + self.antithetic)]
        rows = hadamard(order, dtype, rng.device)[chosen, : draw.units]
        rows = rows.repeat(1, draw.blocks)[:, : layer.outputs]
        moves = Moves({}, {}, {})
        for p, call in layer.calls.items():
            own, shape = rows, call.y.shape[2:-1]
            if shape or len(layer.calls) > 1:  # one score speaks for all of them: tell them apart
                own = rows.view(len(rows), *[1] * len(shape), -1)
                own = own * signs((len(rows), *shape, 1), dtype, rng)
            moves.rows[p] = torch.stack([own, -own], 1).flatten(0, 1) if self.antithetic else own
            moves.signs[p] = signs(call.y.shape[1:], dtype, rng)
            moves.size[p] = self.size(call.x, layer)
        return moves

    def size(self, x: Tensor, layer: Layer) -> Tensor:
        """Return how far units move, 0-d: sigma times the root mean square norm of x."""
        return self.sigma * (x.square().sum(-1).mean() + layer.has_bias).sqrt()

    def perturb(self, noise: Moves, layer: Layer, position: int, x: Tensor, y: Tensor) -> Tensor:
        """Return y + the move of each direction, (n, B, ..., O)."""
        move = noise.signs[position] * noise.size[position]
        return torch.addcmul(y, move, noise.rows[position].unsqueeze(1))

    def weights(self, scores: Tensor, baseline: Tensor) -> Tensor:
        """Return how much each member changes each example's score, (P, B)."""
        return scores - baseline

    def gradient(self, noise: Moves, weights: Tensor, layer: Layer) -> Tensor:
        """Ascent direction of [W, bias], (O, I): the sum over examples of delta x^T, over B."""
        parts = []
        for position, call in layer.calls.items():
            delta = self.delta(noise, weights, layer, position) / weights.shape[-1]
            parts.append(delta.flatten(0, -2).T @ layer.with_one(call.x[0]).flatten(0, -2))
        return reduce(torch.add, parts)

    def delta(self, noise: Moves, weights: Tensor, layer: Layer, position: int) -> Tensor:
        """Return on average the derivative of each example's score in the output, (B, ..., O)."""
        rows = pad(noise.rows[position], self.block_units(layer))
        rows = rows.unflatten(-1, (weights.shape[1], -1)) / len(weights)
        delta = torch.einsum("nkb,n...kg->b...kg", weights, rows).flatten(-2)
        # a batch of blanks has size 0 and delta 0
        size = noise.size[position].clamp_min(torch.finfo(delta.dtype).tiny)
        return delta[..., : layer.outputs] * noise.signs[position] / size
