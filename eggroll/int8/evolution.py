"""The trainer of an integer network."""

from typing import Any

import torch
from torch import Tensor

from eggroll.evolution import Evolution
from eggroll.int8.arithmetic import kernels
from eggroll.int8.fitness import Int8Accuracy, Int8CrossEntropy, Int8Fitness, Int8Smoothing
from eggroll.int8.loops import Int8Loops
from eggroll.int8.network import Int8MLP
from eggroll.mlp_loops import ACCURACY, CROSS_ENTROPY, Score

SCORES = (Int8CrossEntropy, Int8Accuracy, Int8Smoothing)  # that the loops compute


class Int8Evolution(Evolution):
    """Evolution that leaves an int32 ascent direction in `weight.ascent`, where Int8SGD reads it.

    torch refuses an int32 `.grad` of an int8 Parameter. The fitness has to be an Int8Fitness.
    """

    def _store(self, parameter: Tensor, direction: Tensor) -> None:
        parameter.ascent = direction  # type: ignore

    def _find_loops(self) -> Int8Loops | None:
        """Return the loops for an Int8MLP with inputs (B, I), and blocks of two units or more."""
        covered = type(self.network) is Int8MLP and type(self.smoothing or self.fitness) in SCORES
        once = [call.layer for call in self.calls] == list(range(len(self.layers)))
        pairs = all(draw.units > 1 for draw in self.draws)
        y = self.calls[0].y
        if covered and once and pairs and y.dim() == 3 and kernels.available(y):
            return Int8Loops(self.layers, self.fitness)
        return None

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
