"""EGGROLL as printed: members perturb all layers at once by low-rank Gaussian matrices.

Source: arXiv 2511.16652, Algorithm 1, with antithetic pairs.
Shapes: n pairs, P = 2 n members, B examples, R rank, I / O inputs / outputs of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eggroll.blocks import Draw, Layer, PopulationError
from eggroll.factors import Factors, add_low_rank, weighted_sum
from eggroll.fitness import Shaping, z_score
from eggroll.noise import gaussian

# Of a draw: noise grows with the population, so it is never all in memory, but for a GPU, where a
# captured step draws from each key once
PAIRS = 128


@dataclass(frozen=True)
class LowRank:
    """W + sigma A B^T / sqrt(R) in every layer at once, in antithetic pairs, one score per member.

    Raises PopulationError for invalid values.
    """

    population: int = 832
    """Members in all; rounded to pairs."""
    sigma: float = 0.02
    """Scale of a perturbation, in the weights' units."""
    rank: int = 1
    """Rank R of a perturbation."""
    shaping: Shaping = z_score
    """Function of all members' scores; `identity` gives the gradient itself."""

    per_example: ClassVar[bool] = False

    def __post_init__(self):
        if self.population < 1 or self.rank < 1:
            raise PopulationError(
                f"population and rank must be at least 1, got {self.population} and {self.rank}"
            )
        if not self.sigma > 0:
            raise PopulationError(f"sigma must be > 0, got {self.sigma}")

    def draws(self, layers: Mapping[int, Layer]) -> list[Draw]:
        """Plan draws of PAIRS pairs each; on a GPU one draw of all pairs."""
        pairs = max(self.population // 2, 1)
        cuda = any(layer.module.weight.is_cuda for layer in layers.values())
        size = pairs if cuda else PAIRS
        first = min(position for layer in layers.values() for position in layer.calls)
        return [
            Draw(tuple(layers), number, min(size, pairs - start), 2, 2 * start, first)
            for number, start in enumerate(range(0, pairs, size))
        ]

    def sample(self, layer: Layer, draw: Draw, rng: torch.Generator) -> Factors:
        """Draw A and B of the pairs; draws are whole, whatever the population."""
        weight, sizes = layer.module.weight, [layer.outputs, layer.inputs]
        shape = (max(PAIRS, draw.directions), self.rank, sum(sizes))
        a, b = gaussian(shape, weight, rng).split(sizes, -1)
        return Factors(a / self.rank**0.5, b).part(slice(draw.directions))

    def perturb(self, noise: Factors, layer: Layer, position: int, x: Tensor, y: Tensor) -> Tensor:
        """Return y + x (sigma E)^T, (2 n, B, ..., O): members with sign +, then those with -."""
        a, b = self.sigma * noise.a, noise.b
        if len(x) > 1:  # members read their own x
            b = torch.cat([b, b])
        return add_low_rank(y, layer.with_one(x), torch.cat([a, -a]), b)

    def weights(self, scores: Tensor, baseline: Tensor) -> Tensor:
        """Shape the slopes along each member's E, (P,)."""
        return self.shaping((scores - baseline) / self.sigma) / len(scores)

    def gradient(self, noise: Factors, weights: Tensor, layer: Layer) -> Tensor:
        """Ascent direction of [W, bias], (O, I): the sum of weights (n, 2) times +-E."""
        return weighted_sum(noise, (weights[:, 0] - weights[:, 1])[:, None])
