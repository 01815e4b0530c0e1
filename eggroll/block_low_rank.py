"""EGGROLL with low-rank perturbations of a few units: one direction serves many members.

A member perturbs the W of one layer by sigma E, E = A B^T / sqrt(R), where A is zero but for one
block of units, and has one score for the whole batch. A has random signs, B is Gaussian.
Source: arXiv 2511.16652, Algorithm 1; docs/method.md says what differs.

Shapes: n directions, K blocks, B examples, R rank, I / O inputs / outputs of the layer.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eggroll.blocks import Blocks, Draw, Layer, PopulationError
from eggroll.factors import Factors, add_low_rank, weighted_sum
from eggroll.fitness import Shaping, z_score
from eggroll.noise import gaussian, signs


@dataclass(frozen=True)
class BlockLowRank(Blocks):
    """W + sigma A B^T / sqrt(R) with A on one block of units, one score per member.

    Raises PopulationError for invalid values.
    """

    population: int | tuple[int, ...] = 6000
    """Members in all, or a count for each layer; rounded to whole directions."""
    sigma: float = 0.02
    """Scale of a perturbation, in the weights' units."""
    rank: int = 1
    """Rank R of a perturbation."""
    units: int = 8
    """Units of a layer that a member perturbs."""
    shaping: Shaping = z_score
    """Function of the scores of a layer's members; `identity` gives the gradient itself."""

    per_example: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 1:
            raise PopulationError(f"rank must be at least 1, got {self.rank}")

    def sample(self, layer: Layer, draw: Draw, rng: torch.Generator) -> Factors:
        """Draw A and B of all directions."""
        weight, shape = layer.module.weight, (draw.directions, self.rank)
        a = signs((*shape, layer.outputs), weight.dtype, rng) / self.rank**0.5
        return Factors(a, gaussian((*shape, layer.inputs), weight, rng))

    def perturb(self, noise: Factors, layer: Layer, position: int, x: Tensor, y: Tensor) -> Tensor:
        """Return y + x (sigma E)^T for each direction, (n, B, ..., O)."""
        return add_low_rank(y, layer.with_one(x), self.sigma * noise.a, noise.b)

    def weights(self, scores: Tensor, baseline: Tensor) -> Tensor:
        """Shape the slopes along each member's E, (P,)."""
        return self.shaping((scores - baseline) / self.sigma)

    def gradient(self, noise: Factors, weights: Tensor, layer: Layer) -> Tensor:
        """Ascent direction of [W, bias], (O, I): a row is the mean over the unit's n members."""
        per_unit = weights.repeat_interleave(self.block_units(layer), 1)[:, : layer.outputs]
        return weighted_sum(noise, per_unit / len(per_unit))
