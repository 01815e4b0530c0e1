"""SGD of int8 weights with error feedback.

A weight moves by whole units of int8, and a step asks for less than one of nearly every weight. An
int32 residual beside each weight adds up what is asked for, in 2^-RESIDUAL_BITS of a unit; the
weight moves by the whole units in it, and the residual keeps the rest. Cf. QES, arXiv 2602.03120.
"""

import torch
from torch import Tensor

from eggroll.int8.arithmetic import clip, kernels, rounded_shift
from eggroll.int8.network import Int8Linear, Int8MLP
from eggroll.int8.node_perturbation import DELTA_BITS

RESIDUAL_BITS = 16
RATE_BITS = 16  # the rate is a multiple of 2^-RATE_BITS
MOMENTUM_BITS = 8  # the momentum is a multiple of 2^-MOMENTUM_BITS
INT32_MAX = 2**31 - 1


class Int8SGD(torch.optim.Optimizer):
    """Move the weights of an Int8MLP along `weight.ascent`.

    lr        as SGD's, in real weights; rounded to an integer for each layer and step. In a
              captured step it is a float64 tensor
    momentum  share of the earlier directions that is kept, in 256ths
    examples  of a batch, over which the fitness is averaged

    A torch optimizer: schedules and checkpoints work as usual. Its state is int32.
    """

    def __init__(self, network: Int8MLP, lr: float, momentum: float = 0.9, examples: int = 128):
        self.layers = [m for m in network.modules() if isinstance(m, Int8Linear)]
        weights = [layer.weight for layer in self.layers]
        super().__init__(weights, {"lr": lr, "momentum": momentum, "examples": examples})
        for weight in weights:
            self.state[weight] = {
                name: torch.zeros_like(weight, dtype=torch.int32)
                for name in ("residual", "momentum")
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Follow the ascent directions of one batch."""
        group = self.param_groups[0]
        momentum = round(group["momentum"] * (1 << MOMENTUM_BITS))
        for layer in self.layers:
            # a stored weight is INT8_SCALE * divisor times the real one, and an ascent direction
            # INT8_SCALE * 2^DELTA_BITS times the gradient's sum over the batch
            bits = layer.divisor_bits - DELTA_BITS + RESIDUAL_BITS + RATE_BITS
            rate = group["lr"] / group["examples"] * 2**bits
            rate = rate.round().long() if isinstance(rate, Tensor) else round(rate)
            state, ascent = self.state[layer.weight], layer.weight.ascent  # type: ignore
            follow(layer.weight, ascent, momentum, rate, state["momentum"], state["residual"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for layer in self.layers:
            layer.weight.ascent = None  # type: ignore


def follow(
    weight: Tensor,
    direction: Tensor,
    momentum: int,
    rate: int | Tensor,
    memory: Tensor,
    residual: Tensor,
) -> None:
    """Update memory to momentum * memory + direction, and move weights by rate * memory.

    The residual keeps what is less than a unit. Works in place; all but the weights are int32.
    """
    if kernels.available(weight):
        rates = (momentum, MOMENTUM_BITS, int(rate), RATE_BITS, RESIDUAL_BITS)
        given = (direction.contiguous(), weight.numel(), *rates)
        kernels.call("follow", *given, memory, residual, weight)
        return
    kept = rounded_shift(memory.long() * momentum, MOMENTUM_BITS)
    memory.copy_(clip(kept + direction, INT32_MAX))
    total = residual + rounded_shift(memory.long() * rate, RATE_BITS)
    step = rounded_shift(total, RESIDUAL_BITS)
    residual.copy_(total - (step << RESIDUAL_BITS))
    weight.copy_(clip(weight + step))
