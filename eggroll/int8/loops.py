"""Scores of an Int8MLP's members by C++ loops on a CPU: torch's bits, and no activation in memory.

Shapes: B examples, I / O inputs / outputs of a layer, C classes.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from eggroll.blocks import Call, Layer, pad
from eggroll.compiled import Loops
from eggroll.fitness import Fitness
from eggroll.int8.arithmetic import int_matmul, kernels
from eggroll.int8.fitness import Int8CrossEntropy, logarithms
from eggroll.int8.network import Int8Linear
from eggroll.mlp_loops import MlpLoops, Score


class Int8Loops(MlpLoops):
    """MlpLoops of int8 layers. The target is 1 at the label and 0 elsewhere, or a direction."""

    loops: ClassVar[Loops] = kernels

    def __init__(self, layers: list[Layer], fitness: Fitness):
        self.layers, self.bits = layers, torch.tensor([layer.module.bits for layer in layers])
        self.smoothing = fitness.smoothing if isinstance(fitness, Int8CrossEntropy) else 0

    def begin(self, calls: list[Call], score: Score) -> None:
        """Lay out a step's weights, and unperturbed outputs and sums, (O, padded examples)."""
        self.kind, self.target = score.kind, self._padded(score.target.T)
        nothing, start = torch.zeros_like(self.target), score.unperturbed
        self.unperturbed = nothing if start is None else self._padded(start.T)
        self.logarithms = logarithms(len(self.target), self.target.device)
        outputs = [self._padded(call.y[0].T) for call in calls]
        self.still = [*outputs[:-1], nothing]
        self.weights = [_pairs(layer.module.weight) for layer in self.layers[1:]]
        both = zip(self.layers[1:], calls[1:], outputs[1:], strict=True)
        self.sums = [self._sums(layer.module, call.x[0], y) for layer, call, y in both]
        self.biases = [torch.zeros_like(sums) for sums in self.sums]

    def _sums(self, linear: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        """Return the sums that were rescaled to outputs y, (O, padded examples)."""
        assert isinstance(linear, Int8Linear)
        if linear.bits > 0:  # they were rounded
            return self._padded(int_matmul(linear.weight, x.T))
        return y >> -linear.bits

    def _arithmetic(self, first: int) -> tuple[Tensor | int, ...]:
        score = (self.kind, self.target, self.unperturbed, self.smoothing, self.logarithms)
        return self.bits[first + 1 :], *score


def _pairs(weight: Tensor) -> Tensor:
    """Return weights (I / 2, O), int32: the int16 of two inputs, one after the other."""
    return pad(weight, 2).short().view(torch.int32).T.contiguous()
