"""Scores of an Int8MLP's members by C++ loops on a CPU: torch's bits, and no activation in memory.

Shapes: n directions, P members, B examples, I / O inputs / outputs, C classes.
"""

import torch
from torch import Tensor, nn

from eggroll.blocks import Call, Draw, Layer, pad
from eggroll.fitness import Fitness
from eggroll.int8.arithmetic import int_matmul, kernels
from eggroll.int8.fitness import Int8Accuracy, Int8CrossEntropy, Int8Smoothing, logarithms
from eggroll.int8.network import Int8MLP
from eggroll.mlp_loops import MlpLoops, Score
from eggroll.smoothing import Smoothing


class Int8Loops(MlpLoops):
    """MlpLoops of int8 layers. `begin` takes the label's place, 1 and zeros, as target."""

    def __init__(self, layers: list[Layer], fitness: Fitness):
        self.layers, self.tile = layers, kernels.library.tile() if kernels.library else 1
        self.bits = torch.tensor([layer.module.bits for layer in layers])
        self.smoothing = fitness.smoothing if isinstance(fitness, Int8CrossEntropy) else 0

    def begin(self, calls: list[Call], score: Score) -> None:
        """Lay out a step's weights, and unperturbed outputs and sums, (O, padded examples)."""
        weights = [layer.module.weight for layer in self.layers[1:]]
        self.weights = [_pairs(weight) for weight in weights]
        inputs = [call.x[0].T for call in calls[1:]]
        self.sums = [self._padded(int_matmul(*both)) for both in zip(weights, inputs, strict=True)]
        self.zeros = [torch.zeros_like(sums) for sums in self.sums]
        self.kind, self.target = score.kind, self._padded(score.target.T)
        nothing = torch.zeros_like(self.target)
        self.still = [*(self._padded(call.y[0].T) for call in calls[:-1]), nothing]
        moves_from = score.unperturbed
        self.unperturbed = nothing if moves_from is None else self._padded(moves_from.T)
        self.logarithms = logarithms(len(self.target), self.target.device)

    def scores(self, draw: Draw, moved: Tensor) -> Tensor:
        """Return scores (P, B), by direction, of what the perturbed layer wrote, (n, B, O)."""
        first, (n, examples, units) = draw.first_call, moved.shape
        weights, still = self.weights[first:], self.still[first]
        starts = self.sums[first : first + 1] + self.zeros[first + 1 :]
        out = moved.new_empty(n, draw.blocks, examples)
        sizes = (n, examples, still.shape[1], units, draw.units, len(weights))
        layers = ([x.data_ptr() for x in weights], [x.data_ptr() for x in starts])
        outputs = [x.shape[1] for x in weights]
        parts = (*map(torch.tensor, (*layers, outputs)), self.bits[first + 1 :])
        score = (self.kind, self.target, self.unperturbed, self.smoothing, self.logarithms)
        kernels.call("members", moved, still, *sizes, *parts, *score, out)
        return out.flatten(0, 1)


def find(
    network: nn.Module,
    layers: list[Layer],
    calls: list[Call],
    fitness: Fitness,
    smoothing: Smoothing | None,
    units: int,
) -> Int8Loops | None:
    """Return the loops where they cover the network, the fitness and the units of a block.

    That is an Int8MLP with inputs (B, I), Int8CrossEntropy, Int8Accuracy or Int8Smoothing, and
    blocks of more than one unit.
    """
    scores = fitness if smoothing is None else smoothing
    covered = type(scores) in (Int8CrossEntropy, Int8Accuracy, Int8Smoothing) and units > 1
    in_order = [call.layer for call in calls] == list(range(len(layers)))
    if covered and type(network) is Int8MLP and in_order and calls[0].y.dim() == 3:
        return Int8Loops(layers, fitness) if kernels.available(calls[0].y) else None
    return None


def _pairs(weight: Tensor) -> Tensor:
    """Return weights (I / 2, O), int32: the int16 of two inputs, one after the other."""
    return pad(weight, 2).short().view(torch.int32).T.contiguous()
