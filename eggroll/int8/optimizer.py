"""How int8 weights follow an integer ascent direction: with error feedback, or by votes.

A weight moves by whole units of int8. One step asks for less than that of nearly every weight, and
the two rules differ in what becomes of it.

error-feedback  an int32 residual beside each weight adds up lr times the direction, in units of
                2^-RESIDUAL_BITS of a weight's unit; the weight moves by what is whole in it, and
                the residual keeps the rest. Cf. QES, arXiv 2602.03120
votes           weights move by +-1 where the direction is largest, the fraction of them that lr
                says (top-k); the rest is lost. Source: the paper's int8 update (arXiv 2511.16652)
"""

from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from eggroll.int8 import kernels
from eggroll.int8.arithmetic import INT8_MAX, rounded_shift
from eggroll.int8.gradient import DELTA_BITS
from eggroll.int8.network import Int8Linear, Int8MLP

UPDATES = ("error-feedback", "votes")
RESIDUAL_BITS = 16
RATE_BITS = 16  # the rate is a whole number of 2^-RATE_BITS
MOMENTUM_BITS = 8  # and the momentum of 2^-MOMENTUM_BITS
INT32_MAX = 2**31 - 1


class Int8SGD(torch.optim.Optimizer):
    """Moves the weights of an Int8MLP by whole units along `weight.ascent`.

    lr        of error-feedback: as SGD's, in real weights. Of votes: the fraction of the weights
              that are updated in a step. A host number, made an integer once per layer and step
    momentum  share of the earlier directions that is kept, in 256ths
    update    one of UPDATES
    examples  of a batch, over which the fitness is averaged

    An optimizer of torch's: schedules and checkpoints work as for any other, and its state is
    int32. `state[weight]["updated"]` counts updated weights, for `statistics`.
    Raises ValueError for a rule that is not known, or votes with an lr of 1 or more.
    """

    def __init__(
        self,
        network: Int8MLP,
        lr: float,
        momentum: float = 0.9,
        update: str = "error-feedback",
        examples: int = 128,
    ):
        if update not in UPDATES:
            raise ValueError(f"update {update!r} is not known (try {' or '.join(UPDATES)})")
        if update == "votes" and lr >= 1:
            raise ValueError(f"lr {lr:g} with votes is the fraction of weights updated: below 1")
        self.layers, self.update = list(network.layers), update
        weights = [layer.weight for layer in self.layers]
        super().__init__(weights, {"lr": lr, "momentum": momentum, "examples": examples})
        for weight in weights:
            wide = {"dtype": torch.int32, "device": weight.device}
            self.state[weight] = {
                "residual": torch.zeros(weight.shape, **wide),
                "momentum": torch.zeros(weight.shape, **wide),
                "updated": torch.zeros((), dtype=torch.int64, device=weight.device),
            }
        self.param_groups[0]["steps"] = 0

    @torch.no_grad()
    def step(self) -> None:
        """Follow the ascent directions of one batch."""
        group = self.param_groups[0]
        for layer in self.layers:
            state = self.state[layer.weight]
            if self.update == "error-feedback" and kernels.available(layer.weight):
                state["updated"] += follow(layer, state, group)
                continue
            direction = averaged(state["momentum"], layer.weight.ascent, group["momentum"])
            if self.update == "votes":
                step = top_signs(direction, group["lr"])
            else:
                rate = feedback_rate(layer, group["lr"], group["examples"])
                step = whole_part(state["residual"], direction, rate)
            moved = (layer.weight + step).clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
            state["updated"] += (moved != layer.weight).sum()
            layer.weight.copy_(moved)
        group["steps"] += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        for layer in self.layers:
            layer.weight.ascent = None

    def statistics(self) -> dict[str, float]:
        """Fractions for the log: weights at either end of int8, and weights updated in a step,
        the mean over the steps since this was last asked for."""
        states = [self.state[layer.weight] for layer in self.layers]
        weights = sum(layer.weight.numel() for layer in self.layers)
        full = sum((layer.weight.abs() == INT8_MAX).sum().item() for layer in self.layers)
        updated = sum(state["updated"].item() for state in states)
        for state in states:
            state["updated"].zero_()
        steps, self.param_groups[0]["steps"] = self.param_groups[0]["steps"], 0
        return {
            "saturated_weights": round(full / weights, 6),
            "weights_updated": round(updated / weights / max(steps, 1), 6),
        }


def follow(layer: Int8Linear, state: dict[str, Tensor], group: dict[str, Any]) -> int:
    """A step with error feedback in one pass; how many weights it updated."""
    weight = layer.weight
    momentum = round(group["momentum"] * (1 << MOMENTUM_BITS)), MOMENTUM_BITS
    rate = feedback_rate(layer, group["lr"], group["examples"]), RATE_BITS, RESIDUAL_BITS
    memory, residual = state["momentum"], state["residual"]
    sizes = (weight.numel(), *momentum, *rate)
    return kernels.call("follow", weight.ascent.contiguous(), *sizes, memory, residual, weight)


def averaged(memory: Tensor, direction: Tensor, momentum: float) -> Tensor:
    """memory <- momentum * memory + direction, in int32; int64 on the way."""
    kept = rounded_shift(memory.long() * round(momentum * (1 << MOMENTUM_BITS)), MOMENTUM_BITS)
    return memory.copy_((kept + direction).clamp(-INT32_MAX, INT32_MAX))


def feedback_rate(layer: Int8Linear, lr: float, examples: int) -> int:
    """What a direction is multiplied by, in 2^-RATE_BITS units of the residual.

    A stored weight is INT8_SCALE * divisor times the real one, and a direction
    INT8_SCALE * 2^DELTA_BITS times the gradient's sum over the batch: lr * divisor /
    (2^DELTA_BITS * examples) stored units.
    """
    return round(lr * layer.divisor / examples * 2 ** (RESIDUAL_BITS + RATE_BITS - DELTA_BITS))


def whole_part(residual: Tensor, direction: Tensor, rate: int) -> Tensor:
    """Add to the residual, and take from it the whole steps that are in it, to nearest."""
    total = residual + rounded_shift(direction.long() * rate, RATE_BITS)
    step = rounded_shift(total, RESIDUAL_BITS)
    residual.copy_(total - (step << RESIDUAL_BITS))
    return step


def top_signs(direction: Tensor, fraction: float) -> Tensor:
    """The sign of the `fraction` of the entries (O, I) that is largest, 0 for the others.

    The threshold is the normal distribution's quantile for the entries' own mean size; an entry of
    exactly 0 never passes it.
    """
    if fraction <= 0:
        return torch.zeros_like(direction)
    normal = NormalDist()
    quantile = normal.inv_cdf(1 - fraction / 2) / (normal.pdf(0) * 2)  # over the mean size
    total = direction.abs().sum(dtype=torch.int64)
    threshold = rounded_shift(total * round(quantile * 256), 8) // direction.numel()
    return direction.sign() * (direction.abs() > threshold)
