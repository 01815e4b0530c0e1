"""The trainer of an integer network."""

from torch import Tensor

from eggroll.evolution import Evolution
from eggroll.int8.fitness import Int8Fitness


class Int8Evolution(Evolution):
    """Evolution that leaves an int32 ascent direction in `weight.ascent`, where Int8SGD reads it.

    torch refuses an int32 `.grad` of an int8 Parameter. The fitness has to be an Int8Fitness.
    """

    def _store(self, parameter: Tensor, direction: Tensor) -> None:
        parameter.ascent = direction  # type: ignore

    @property
    def mean_fitness(self) -> Tensor:
        """Fitness of the unperturbed network on the last batch, 0-d, in nats or as a fraction."""
        assert isinstance(self.fitness, Int8Fitness)
        return super().mean_fitness * self.fitness.unit
