"""The experiment's network in int8. Shapes: B examples, I/O a layer's inputs/outputs."""

import math

import torch
from torch import Tensor, nn

from eggroll import seam
from eggroll.int8.arithmetic import (
    INT8_MAX,
    clipped,
    int_matmul,
    rounded_division,
    rounded_shift,
)
from eggroll.model import MLP

INT8_SCALE = 16  # the int8 value of a real 1
FRACTION_BITS = 12  # products are in units of 2^-FRACTION_BITS
COARSE_SHIFT = FRACTION_BITS - (INT8_SCALE.bit_length() - 1)  # from there to int8


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
        total = int_matmul(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])
        common = math.gcd(16, self.divisor)
        return rounded_division(total * (16 // common), self.divisor // common)


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

    Shift, clip and product are one loop when compiled; a table of 256 entries is a gather, which
    vector units do badly.
    """
    x = clipped(rounded_shift(x, COARSE_SHIFT))
    gate = (x + 2 * INT8_SCALE).clamp(0, 4 * INT8_SCALE)
    return rounded_shift(x * gate, (4 * INT8_SCALE).bit_length() - 1).to(torch.int8)
