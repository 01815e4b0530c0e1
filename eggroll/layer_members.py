"""The members that perturb one layer, on one batch: known by their keys, drawn in blocks.

Letters: M directions, B examples, E rows (examples times positions), R rank, O/I a layer's
outputs/inputs, G groups of examples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eggroll.centre import Centre
from eggroll.directions import draw_directions
from eggroll.fitness import FitnessError
from eggroll.noise import generator_seed
from eggroll.projections import Projections, draw_projections

# Directions that share a generator. The first block is kept from evaluation to estimate, the others
# are drawn twice: memory does not grow with the population.
DIRECTIONS_PER_BLOCK = 2048


@dataclass(frozen=True)
class Drawn:
    """One block of perturbations."""

    a: Tensor  # (G, M, R, O)
    projections: Projections


@dataclass(frozen=True)
class LayerMembers:
    """The directions in which layer `index` is perturbed.

    count             directions, in each group
    noise, sampling   kinds of A and B: eggroll.directions.KINDS, eggroll.projections.SAMPLINGS
    share_a           whether all groups have the same A
    """

    centre: Centre
    index: int
    count: int
    noise: str
    sampling: str
    rank: int
    groups: int
    share_a: bool
    seed: int
    step: int

    @cached_property
    def rows(self) -> Tensor:
        """What the layer reads, (E, I)."""
        return self.centre.rows(self.index)

    def blocks(self) -> Iterator[Drawn]:
        """All perturbations, a block at a time, the same ones whenever they are asked for.

        Raises FitnessError where the layer's input has no span.
        """
        yield self._first
        for block in range(1, -(-self.count // DIRECTIONS_PER_BLOCK)):
            yield self._draw(block)

    @cached_property
    def _first(self) -> Drawn:
        return self._draw(0)

    def _draw(self, block: int) -> Drawn:
        rows, count = (
            self.rows,
            min(DIRECTIONS_PER_BLOCK, self.count - block * DIRECTIONS_PER_BLOCK),
        )
        generator = torch.Generator(rows.device)
        generator.manual_seed(generator_seed(self.seed, self.step, self.index, block))
        different, outputs = (
            1 if self.share_a else self.groups,
            self.centre.out_features(self.index),
        )
        a = draw_directions(self.noise, different, count, self.rank, outputs, rows, generator)
        a = a.expand(self.groups, -1, -1, -1)
        try:
            u = draw_projections(self.sampling, rows, self._group, count, self.rank, generator)
        except torch.linalg.LinAlgError as error:
            raise FitnessError(
                f"what layer {self.index + 1} reads has no span at step {self.step:,}: training "
                "has diverged (try a smaller lr or sigma)"
            ) from error
        return Drawn(a, u)

    @cached_property
    def _group(self) -> Tensor:
        """Which group of examples a row belongs to, (E,)."""
        examples = self.centre.result.shape[1]
        group = torch.arange(examples, device=self.rows.device) % self.groups
        return group.repeat_interleave(len(self.rows) // examples)
