"""The experiment's network in int8. Shapes: B examples, I/O a layer's inputs/outputs."""

import math

import torch
from torch import Tensor, nn

from eggroll import seam
from eggroll.int8 import kernels
from eggroll.int8.arithmetic import (
    INT8_MAX,
    clipped,
    int_matmul,
    rounded_division,
    rounded_shift,
)
from eggroll.model import MLP
from eggroll.moved import MovedUnits

INT8_SCALE = 16  # the int8 value of a real 1
FRACTION_BITS = 12  # products are in units of 2^-FRACTION_BITS
COARSE_SHIFT = FRACTION_BITS - (INT8_SCALE.bit_length() - 1)  # from there to int8
GATE_SHIFT = (4 * INT8_SCALE).bit_length() - 1


class Int8Linear(nn.Linear):
    """int8 weights (O, I) of a layer without bias; `scale` times them are the real weights.

    `weight.ascent` is where Evolution leaves what Int8SGD follows: int32 (O, I).
    Raises ValueError for a layer with a bias.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        if layer.bias is not None:
            raise ValueError("int8 layers have no bias")
        self.divisor = round(math.sqrt(layer.in_features))
        common = math.gcd(16, self.divisor)
        self.factor, self.quotient = 16 // common, self.divisor // common
        stored = (layer.weight.detach() * (INT8_SCALE * self.divisor)).round()
        stored = stored.clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.register_buffer("scale", torch.tensor(1 / (INT8_SCALE * self.divisor)))

    def forward(self, x: Tensor) -> Tensor:
        """int8 (..., I) to int32 (..., O), in units of 2^-FRACTION_BITS."""
        return seam.linear(x, self.weight, computes=self.product)

    def product(self, x: Tensor, weight: Tensor, _: None) -> Tensor:
        """x W^T / (INT8_SCALE divisor), rounded to nearest.

        The sum is in units of 1 / (INT8_SCALE^2 divisor), which 2^FRACTION_BITS / INT8_SCALE^2 = 16
        makes fine. Nothing overflows below 8,000 inputs.
        """
        if isinstance(x, MovedUnits) and x.whole is None and kernels.available(weight):
            return self._product_of_moved(x, weight)
        total = int_matmul(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])
        if kernels.available(total):
            kernels.call("scale", total, total.numel(), self.factor, self.quotient)
            return total
        return rounded_division(total * self.factor, self.quotient)

    def _product_of_moved(self, x: MovedUnits, weight: Tensor) -> Tensor:
        """The same, multiplying only what has moved."""
        signs = x.signs.squeeze(1).contiguous()
        unmoved = int_matmul(x.states[0], weight.t())
        out = unmoved.new_empty(len(x), *unmoved.shape)
        parts = (x.states, signs, x.blocks, weight, unmoved)
        sizes = (*x.shape, signs.shape[1], len(weight))
        kernels.call("moved_product", *parts, *sizes, self.factor, self.quotient, out)
        return out


class Int8MLP(nn.Module):
    """The int8 form of a float MLP without biases: int8 inputs (..., I) to int32 logits (..., 10).

    One unit of a logit is 2^-FRACTION_BITS bits: the fitness's softmax has base 2.
    """

    nats_per_logit = math.log(2) / (1 << FRACTION_BITS)

    def __init__(self, network: MLP):
        super().__init__()
        self.layers = nn.ModuleList(Int8Linear(layer) for layer in network.layers)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, head = self.layers
        for layer in hidden:
            x = activation(layer(x))
        return head(x)


def activation(x: Tensor) -> Tensor:
    """int32 in units of 2^-FRACTION_BITS, rounded to int8 and passed through an integer GELU:
    x * clip(x + 2, 0, 4) / 4, a parabola between -2 and 2, 0 below and x above.

    A table of 256 entries would be a gather, which vector units do badly.
    """
    if isinstance(x, MovedUnits):
        return x.mapped(activation)
    if kernels.available(x):
        x = x.contiguous()
        out = torch.empty_like(x, dtype=torch.int8)
        kernels.call("activate", x, x.numel(), COARSE_SHIFT, INT8_SCALE, GATE_SHIFT, out)
        return out
    x = clipped(rounded_shift(x, COARSE_SHIFT))
    gate = (x + 2 * INT8_SCALE).clamp(0, 4 * INT8_SCALE)
    return rounded_shift(x * gate, GATE_SHIFT).to(torch.int8)
