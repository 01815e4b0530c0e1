"""What example members say in integers. Shapes: P members, B examples, I/O inputs/outputs."""

import math

import torch
from torch import Tensor

from eggroll.int8 import kernels
from eggroll.int8.arithmetic import WIDE_MAX, rounded_division, wide_matmul
from eggroll.int8.network import FRACTION_BITS, INT8_SCALE
from eggroll.moved import spread

# An ascent direction is the gradient (per real weight, of the fitness summed over the batch, in its
# own units) times INT8_SCALE 2^DELTA_BITS. 2^-12 is a small part of one example's share of a
# gradient, and WIDE_MAX, about 4, is more than it ever is but for noise
DELTA_BITS = 12


def perturbation_size(x: Tensor, sigma: float) -> Tensor:
    """The power of two nearest to sigma times the root of the mean of |x|^2 for int8 x (B, I), in
    units of 2^-FRACTION_BITS: 0-d int32, at least 1.

    A power of two, so that dividing by it is a shift.
    """
    rows = x.numel() // x.shape[-1]
    if kernels.available(x):
        total = kernels.call("squares", x.contiguous(), x.numel())
    else:
        total = int(x.int().square().sum(dtype=torch.int64))
    mean = total / rows / INT8_SCALE**2
    size = max(sigma * math.sqrt(mean) * 2**FRACTION_BITS, 1)
    return torch.tensor(1 << round(math.log2(size)), dtype=torch.int32, device=x.device)


def layer_gradient(
    x: Tensor,  # (B, I) int8: what the layer reads
    change: Tensor,  # (P, B) int32: scores less the unperturbed network's
    signs: Tensor,  # (P, 1, G) int32, of the units of each member's block
    blocks: Tensor,  # (P,)
    d: Tensor,  # (B, O) int32 signs
    size: Tensor,  # 0-d: a power of two
    per_unit: Tensor,  # (O,): members that move each unit
) -> Tensor:
    """Ascent direction (O, I), int32, of one layer: as in ExampleMembers, every product exact."""
    delta = _units_gradient(change, signs, blocks, d, int(size), per_unit)
    return wide_matmul(delta.t().contiguous(), x)


def _units_gradient(
    change: Tensor, signs: Tensor, blocks: Tensor, d: Tensor, size: int, per_unit: Tensor
) -> Tensor:
    """Of each example's units, (B, O) int32 of at most WIDE_MAX."""
    if kernels.available(change):
        out, sizes = torch.empty_like(d), (*change.shape, signs.shape[-1], d.shape[-1])
        parts = (change, signs.contiguous(), blocks, d, per_unit, *sizes)
        kernels.call("units_gradient", *parts, size, DELTA_BITS, WIDE_MAX, out)
        return out
    change = change.clamp(-WIDE_MAX, WIDE_MAX).t().contiguous()
    rows = spread(signs.squeeze(1), blocks, d.shape[-1]).to(torch.int8)
    total = wide_matmul(change, rows) * d
    delta = rounded_division(total.long() << DELTA_BITS, per_unit * size)
    return delta.clamp(-WIDE_MAX, WIDE_MAX).int()
