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
    if kernels.available(change):
        out = torch.empty(d.shape[-1], x.shape[-1], dtype=torch.int32)
        parts = (change, signs.contiguous(), blocks, d, per_unit, x.contiguous())
        sizes = (*change.shape, signs.shape[-1], *out.shape)
        kernels.call("layer_gradient", *parts, *sizes, int(size), DELTA_BITS, WIDE_MAX, out)
        return out
    change = change.clamp(-WIDE_MAX, WIDE_MAX).t().contiguous()
    rows = spread(signs.squeeze(1), blocks, d.shape[-1]).to(torch.int8)
    total = wide_matmul(change, rows) * d
    delta = rounded_division(total.long() << DELTA_BITS, per_unit * int(size))
    delta = delta.clamp(-WIDE_MAX, WIDE_MAX).int()
    return wide_matmul(delta.t().contiguous(), x)
