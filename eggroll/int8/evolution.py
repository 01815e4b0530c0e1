"""The trainer of an integer network."""

from typing import Any

import torch
from torch import Tensor

from eggroll.evolution import Evolution
from eggroll.int8.fitness import Int8Accuracy, Int8Fitness
from eggroll.int8.loops import Int8Loops, find
from eggroll.mlp_loops import ACCURACY, CROSS_ENTROPY, Score


class Int8Evolution(Evolution):
    """Evolution that leaves an int32 ascent direction in `weight.ascent`, where Int8SGD reads it.

    torch refuses an int32 `.grad` of an int8 Parameter. The fitness has to be an Int8Fitness.
    """

    def _store(self, parameter: Tensor, direction: Tensor) -> None:
        parameter.ascent = direction  # type: ignore

    def _find_loops(self) -> Int8Loops | None:
        units = min(draw.units for draw in self.draws)
        return find(self.network, self.layers, self.calls, self.fitness, self.smoothing, units)

    def _score(self, labels: Any) -> Score:
        if self.smoothing:
            return super()._score(labels)
        kind = ACCURACY if isinstance(self.fitness, Int8Accuracy) else CROSS_ENTROPY
        classes = torch.arange(self.layers[-1].outputs, device=labels.device)
        return Score(kind, (labels.unsqueeze(1) == classes).int())

    @property
    def mean_fitness(self) -> Tensor:
        """Fitness of the unperturbed network on the last batch, 0-d, in nats or as a fraction."""
        assert isinstance(self.fitness, Int8Fitness)
        return super().mean_fitness * self.fitness.unit
