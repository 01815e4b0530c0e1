"""Node perturbation in integers. Shapes: n directions, K blocks, G units of a block, B examples."""

import math
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor

from eggroll.blocks import Draw, Layer, Product, pad
from eggroll.int8.arithmetic import (
    WIDE_MAX,
    clip,
    int_matmul,
    kernels,
    rounded_shift,
    wide_matmul,
)
from eggroll.int8.network import FRACTION_BITS, INT8_SCALE, Int8Linear
from eggroll.node_perturbation import Moves, NodePerturbation

# An ascent direction is the gradient (by real weights, of the fitness summed over the batch) times
# INT8_SCALE 2^DELTA_BITS. An example's delta is at most WIDE_MAX, about 4, but for noise.
DELTA_BITS = 12
FACTOR_BITS = 24  # a division is a product with a multiple of 2^-FACTOR_BITS
MOST_BITS = 24  # of the size of a move


@dataclass(frozen=True)
class Int8NodePerturbation(NodePerturbation):
    """NodePerturbation of int8 layers: outputs move by a power of two, so dividing by it is exact.

    sigma  is rounded to what gives the nearest power of two, for each layer
    """

    sigma: float = 0.01

    def size(self, x: Tensor, layer: Layer) -> Tensor:
        """Return how far units move, 0-d int32, at least 1, in units of 2^-FRACTION_BITS."""
        x = x.short()
        squares = (x * x).sum(-1, dtype=torch.int32)
        steps = thresholds(self.sigma, squares.numel(), x.device)
        return 1 << (squares.sum() >= steps).sum(dtype=torch.int32)

    def split(self, layer: Layer, x: Tensor, draw: Draw, _: Product) -> Tensor:
        """Output (K n, B, ..., O) for each block of each direction, from x (1 + n, B, ..., I)."""
        linear, shape = layer.module, x.shape[1:-1]
        assert isinstance(linear, Int8Linear)
        x = x.flatten(1, -2)
        sums = int_matmul(x[0], linear.weight.T)
        out = sums.new_empty(draw.blocks, len(x) - 1, *sums.shape)
        blocks = pad(x, draw.units).unflatten(-1, (draw.blocks, draw.units)).movedim(-2, 0)
        columns = pad(linear.weight, draw.units).T.split(draw.units)
        for block, column, members in zip(blocks, columns, out, strict=True):
            products = int_matmul(block.flatten(0, 1), column).view(len(x), *sums.shape)
            torch.add(sums - products[0], products[1:], out=members)
        return linear.rescale(out).view(-1, *shape, layer.outputs)

    def gradient(self, noise: Moves, weights: Tensor, layer: Layer) -> Tensor:
        """Ascent direction (O, I), int32, from weights (n, K, B)."""
        gradients, units = [], self.block_units(layer)
        for position, call in layer.calls.items():
            parts = (noise.rows[position], noise.signs[position], call.x[0], noise.size[position])
            gradients.append(call_gradient(weights, *parts, units))
        return reduce(torch.add, gradients)


@lru_cache(maxsize=32)
def thresholds(sigma: float, examples: int, device: torch.device) -> Tensor:
    """Return the sums of squares, over all examples, from which on the size is 2, 4, 8, ...

    The size is sigma 2^FRACTION_BITS times the root mean square norm, to the nearest power of two.
    """
    one = examples * (INT8_SCALE / sigma / 2**FRACTION_BITS) ** 2  # sum for a size of 1
    sums = [math.ceil(one * 2.0 ** (2 * bits + 1)) for bits in range(MOST_BITS)]
    return torch.tensor([min(total, 2**62) for total in sums], device=device)


def call_gradient(
    weights: Tensor, rows: Tensor, signs: Tensor, x: Tensor, size: Tensor, units: int
) -> Tensor:
    """Return a call's share of the ascent direction, (O, I).

    That is x (B, ..., I) times the derivatives of scores in the outputs, within +-WIDE_MAX.
    weights (n, K, B), rows (n, ..., O) and signs (B, ..., O) are int32; size of a move, units G.
    """
    in_loops = kernels.available(weights) and rows.dim() == 2
    divisor = len(rows) * (int(size) if in_loops else size.long())
    factor = ((1 << DELTA_BITS + FACTOR_BITS) + divisor // 2) // divisor
    if in_loops:
        sizes = (*weights.shape, signs.shape[-1], x.shape[-1], units)
        out = weights.new_empty(signs.shape[-1], x.shape[-1])
        parts = (weights.contiguous(), rows.contiguous(), signs, x.contiguous())
        kernels.call("gradient", *parts, *sizes, factor, FACTOR_BITS, WIDE_MAX, out)
        return out
    rows = pad(rows, units).unflatten(-1, (-1, units)).unsqueeze(-1)  # (n, ..., K, G, 1)
    sums = weights.new_zeros(*rows.shape[1:-1], len(signs))
    for change, row in zip(clip(weights, WIDE_MAX).unsqueeze(2), rows, strict=True):
        sums.addcmul_(change, row)
    sums = sums.movedim(-1, 0).flatten(-2)[..., : signs.shape[-1]] * signs
    delta = clip(rounded_shift(sums.long() * factor, FACTOR_BITS), WIDE_MAX).int()
    return wide_matmul(delta.flatten(0, -2).T, x.flatten(0, -2))
