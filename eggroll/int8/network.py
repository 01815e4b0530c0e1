"""The experiment's network in int8. Shapes: B examples, I / O inputs / outputs of a layer."""

import math

import torch
from torch import Tensor, nn

from eggroll.int8.arithmetic import clip, int_matmul, kernels, rounded_shift

SCALE_BITS = 4
INT8_SCALE = 1 << SCALE_BITS  # the int8 value of a real 1
FRACTION_BITS = 12  # products are in units of 2^-FRACTION_BITS


class Int8Linear(nn.Linear):
    """A linear layer with int8 weights (O, I); `scale` times them are the real weights.

    Raises ValueError for a layer with a bias.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        if layer.bias is not None:
            raise ValueError("int8 layers have no bias: build the network with bias=False")
        self.divisor_bits = round(math.log2(layer.in_features) / 2)
        self.bits = self.divisor_bits + 2 * SCALE_BITS - FRACTION_BITS  # that sums have too many
        self.scale = 1 / (INT8_SCALE << self.divisor_bits)
        stored = clip((layer.weight.detach() / self.scale).round()).to(torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return int32 (..., O), in units of 2^-FRACTION_BITS, of int8 inputs (..., I)."""
        sums = int_matmul(input.flatten(0, -2), self.weight.T)
        return self.rescale(sums).view(*input.shape[:-1], self.out_features)

    def rescale(self, sums: Tensor) -> Tensor:
        """Return sums of products, int32, in units of 2^-FRACTION_BITS.

        They come in units of 1 / (INT8_SCALE^2 * divisor). Nothing overflows below 8,000 inputs.
        """
        return rounded_shift(sums, self.bits) if self.bits >= 0 else sums << -self.bits


class Int8MLP(nn.Module):
    """The int8 form of a float MLP without biases: int8 inputs (..., I) to int32 logits (..., 10).

    A logit is in units of 2^-FRACTION_BITS bits: the softmax of the fitness has base 2.
    """

    nats_per_logit = math.log(2) / (1 << FRACTION_BITS)

    def __init__(self, network: nn.Module):
        super().__init__()
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        self.layers = nn.ModuleList(map(Int8Linear, linear))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = activation(layer(x))
        return last(x)


def activation(x: Tensor) -> Tensor:
    """Return an integer GELU, int8, of int32 in units of 2^-FRACTION_BITS.

    x * clip(x + 2, 0, 4) / 4: a parabola between -2 and 2, 0 below and x above. Vector units look
    up a table of 256 entries more slowly.
    """
    if kernels.available(x):
        x = x.contiguous()
        out = torch.empty_like(x, dtype=torch.int8)
        kernels.call("activate", x, x.numel(), out)
        return out
    x = clip(rounded_shift(x, FRACTION_BITS - SCALE_BITS))
    gate = (x + 2 * INT8_SCALE).clamp(0, 4 * INT8_SCALE)
    return rounded_shift(x * gate, SCALE_BITS + 2).to(torch.int8)
