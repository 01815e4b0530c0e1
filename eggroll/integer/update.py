"""How int8 weights follow an integer estimate: by votes, or with error feedback.

A weight moves by whole units of int8. What an estimate says in one step is less than that for
nearly every weight, and the two rules differ in what becomes of it.

votes           weights move by +-1 where the estimate is largest, a fraction of them that the lr
                says; the rest is lost. Source: the paper's int8 update (arXiv 2511.16652)
error-feedback  an int32 residual beside each weight adds up lr times the estimate, in units of
                2^-RESIDUAL of a weight's unit; the weight moves by what is whole in it, and the
                residual keeps the rest. Cf. QES, arXiv 2602.03120
"""

from statistics import NormalDist

import torch
from torch import Tensor

from eggroll.integer.arithmetic import MOST, rounded_shift
from eggroll.integer.credit import CREDIT
from eggroll.integer.network import IntegerLinear, IntegerMLP

UPDATES = ("error-feedback", "votes")
RESIDUAL = 16
RATE = 16  # the rate is a whole number of 2^-RATE
MOMENTUM = 8  # and the momentum of 2^-MOMENTUM
INT32 = 2**31 - 1


class IntegerOptimizer(torch.optim.Optimizer):
    """Moves the weights of an IntegerMLP by +-1, ascending its layers' `estimate`.

    lr        of error-feedback: as SGD's, in real weights. Of votes: the fraction of the weights
              that moves in a step. A host number, made an integer once per layer and step
    momentum  share of the earlier estimates that is kept, in 256ths
    update    one of UPDATES

    A torch optimizer in name: schedules and checkpoints work as for any other, and its state is
    int32. `state[weight]["moved"]` counts the weights that moved since `count_anew`.
    Raises ValueError for a rule that is not known, or votes with an lr of 1 or more.
    """

    def __init__(
        self,
        network: IntegerMLP,
        lr: float,
        momentum: float = 0.9,
        update: str = "error-feedback",
    ):
        if update not in UPDATES:
            raise ValueError(f"update {update!r} is not known (try {' or '.join(UPDATES)})")
        if update == "votes" and lr >= 1:
            raise ValueError(f"lr {lr:g} with votes is the fraction of weights that moves: below 1")
        self.layers, self.update = list(network.layers), update
        weights = [layer.weight for layer in self.layers]
        super().__init__(weights, {"lr": lr, "momentum": momentum, "initial_lr": lr})
        for weight in weights:
            wide = {"dtype": torch.int32, "device": weight.device}
            self.state[weight] = {
                "residual": torch.zeros(weight.shape, **wide),
                "momentum": torch.zeros(weight.shape, **wide),
                "moved": torch.zeros((), dtype=torch.int64, device=weight.device),
            }
        self.param_groups[0]["steps"] = 0

    @torch.no_grad()
    def step(self, examples: int) -> None:
        """Follow the estimates of a batch of so many examples."""
        group = self.param_groups[0]
        for layer in self.layers:
            state = self.state[layer.weight]
            direction = smoothed(state["momentum"], layer.estimate, group["momentum"])
            if self.update == "votes":
                step = elected(direction, group["lr"])
            else:
                rate = feedback_rate(layer, group["lr"], examples)
                step = whole_part(state["residual"], direction, rate)
            moved = (layer.weight + step).clamp(-MOST, MOST).to(torch.int8)
            state["moved"] += (moved != layer.weight).sum()
            layer.weight.copy_(moved)
        group["steps"] += 1

    def count_anew(self) -> None:
        """Forget how many weights have moved so far."""
        self.param_groups[0]["steps"] = 0
        for layer in self.layers:
            self.state[layer.weight]["moved"].zero_()

    def weights_moved(self) -> float:
        """Fraction of the weights that moved in a step, mean over the steps since `count_anew`."""
        moved = sum(self.state[layer.weight]["moved"].item() for layer in self.layers)
        weights = sum(layer.weight.numel() for layer in self.layers)
        return moved / weights / max(self.param_groups[0]["steps"], 1)

    def saturated_weights(self) -> float:
        """Fraction of the weights that are at either end of int8."""
        full = sum((layer.weight.abs() == MOST).sum().item() for layer in self.layers)
        return full / sum(layer.weight.numel() for layer in self.layers)


def smoothed(memory: Tensor, estimate: Tensor, momentum: float) -> Tensor:
    """memory <- momentum * memory + estimate, in int32; int64 on the way."""
    kept = rounded_shift(memory.long() * round(momentum * (1 << MOMENTUM)), MOMENTUM)
    return memory.copy_((kept + estimate).clamp(-INT32, INT32))


def feedback_rate(layer: IntegerLinear, lr: float, examples: int) -> int:
    """What an estimate is multiplied by, in 2^-RATE units of the residual.

    A stored weight is ONE * divisor times the real one, and an estimate ONE * 2^CREDIT times the
    sum over the batch of the gradient: lr * divisor / (2^CREDIT * examples) stored units.
    """
    return round(lr * layer.divisor / examples * 2 ** (RESIDUAL + RATE - CREDIT))


def whole_part(residual: Tensor, direction: Tensor, rate: int) -> Tensor:
    """Add to the residual, and take from it the whole steps that are in it, to nearest."""
    total = residual + rounded_shift(direction.long() * rate, RATE)
    step = rounded_shift(total, RESIDUAL)
    residual.copy_(total - (step << RESIDUAL))
    return step


def elected(direction: Tensor, fraction: float) -> Tensor:
    """The sign of the `fraction` of the votes (O, I) that is largest, 0 for the others.

    The threshold is the normal distribution's quantile, for the votes' own mean size: exactly 0
    votes never pass it.
    """
    if fraction <= 0:
        return torch.zeros_like(direction)
    normal = NormalDist()
    quantile = normal.inv_cdf(1 - fraction / 2) / (normal.pdf(0) * 2)  # over the mean size
    total = direction.abs().sum(dtype=torch.int64)
    threshold = rounded_shift(total * round(quantile * 256), 8) // direction.numel()
    return direction.sign() * (direction.abs() > threshold)
