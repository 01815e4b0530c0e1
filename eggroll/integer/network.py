"""The experiment's network in int8. Letters: B examples, O/I a layer's outputs/inputs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eggroll.integer.arithmetic import MOST, clipped, int_matmul, rounded_division, rounded_shift
from eggroll.model import MLP

ONE = 16  # the int8 value of a real 1
FINE = 12  # products are in units of 2^-FINE
COARSE = FINE - (ONE.bit_length() - 1)  # shift from there to int8


class IntegerLinear(nn.Module):
    """int8 weights (O, I) of a layer without bias; `scale` times them are the real weights.

    `estimate` is where an IntegerEvolution leaves what an IntegerOptimizer follows: int32 (O, I).
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        fan_in = weight.shape[1]
        self.divisor = round(math.sqrt(fan_in))
        stored = (weight.detach() * (ONE * self.divisor)).round().clamp(-MOST, MOST)
        self.weight = nn.Parameter(stored.to(torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.tensor(1 / (ONE * self.divisor)))
        self.estimate: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """int8 (N, I) to int32 (N, O), in units of 2^-FINE."""
        return fine_product(x, self.weight, self.divisor)


class IntegerMLP(nn.Module):
    """The int8 twin of a float MLP without biases: int8 inputs (B, I) to int32 logits (B, 10)."""

    # what one unit of a logit is worth in nats: the fitness's softmax has base 2
    nats_per_logit = math.log(2) / (1 << FINE)

    def __init__(self, network: MLP):
        super().__init__()
        if any(layer.bias is not None for layer in network.layers):
            raise ValueError("int8 layers have no bias")
        self.layers = nn.ModuleList(IntegerLinear(layer.weight) for layer in network.layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.all_outputs(x)[1][-1]

    def all_outputs(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What each layer read, int8, and wrote, int32 in units of 2^-FINE."""
        inputs, outputs = [], []
        for layer in self.layers:
            inputs.append(activation(outputs[-1]) if outputs else x)
            outputs.append(layer(inputs[-1]))
        return inputs, outputs


def fine_product(x: Tensor, weight: Tensor, divisor: int) -> Tensor:
    """x W^T / (ONE divisor) in units of 2^-FINE, int32.

    The sum is in units of 1 / (ONE ONE divisor), which 2^FINE / ONE^2 = 16 makes fine. Nothing
    overflows below 8,000 inputs.
    """
    common = math.gcd(16, divisor)
    return rounded_division(int_matmul(x, weight.t()) * (16 // common), divisor // common)


def activation(fine: Tensor) -> Tensor:
    """Rounded to int8 and passed through an integer GELU: x * clip(x + 2, 0, 4) / 4.

    A parabola between -2 and 2, 0 below and x above. Shift, clip and product are one loop when
    compiled; a table of 256 entries is a gather, which vector units do badly.
    """
    x = clipped(rounded_shift(fine, COARSE))
    gate = (x + 2 * ONE).clamp(0, 4 * ONE)
    return rounded_shift(x * gate, (4 * ONE).bit_length() - 1).to(torch.int8)


def follow(fine: Tensor, weights: Sequence[Tensor], divisors: Sequence[int]) -> Tensor:
    """The layers after one that wrote `fine` (M, B, O): logits (M, B, 10)."""
    shape = fine.shape[:-1]
    for weight, divisor in zip(weights, divisors, strict=True):
        fine = fine_product(activation(fine).flatten(0, 1), weight, divisor).unflatten(0, shape)
    return fine
