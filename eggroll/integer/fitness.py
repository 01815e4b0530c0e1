"""What members are scored by, in integers: (M, B, C) logits in units of 2^-FINE to (M, B) scores.

Scores are int32 in units of 2^-FINE bits; higher is better. Letters: M members, B examples, C
classes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from eggroll.integer.network import FINE

IntegerFitness = Callable[[Tensor, Tensor], Tensor]

UNIT = 1 << FINE
POWER_BITS = 15  # of the powers of two that are summed
SMOOTHING_PARTS = 256


def integer_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the largest logit is the label's, else 0, in units of 2^-FINE. (M, B), int32."""
    return (logits.argmax(-1) == labels).int() << FINE


def integer_log_likelihood(
    temperature: float = 1,
    label_smoothing: float = 0.0,
    device: torch.device | str = "cpu",
    classes: int = 10,
) -> IntegerFitness:
    """log2 of the label's share of 2^(logits / temperature): minus the cross-entropy, in bits.

    Powers and logarithms come from two tables, exact to one unit: 2^x for the fraction of x, and
    log2 of a sum of powers of which the largest is 1. To base 2 the softmax of the
    same logits is a little softer, as if the temperature were 1.44 times as high.
    temperature      1, 2, 4, ...: a shift
    label_smoothing  share of the target that is spread over all classes, in 256ths
    Raises ValueError for a temperature that is no power of two.
    """
    bits = int(temperature).bit_length() - 1
    if temperature != 1 << max(bits, 0):
        raise ValueError(f"temperature {temperature:g} is no power of two (try 1 or 2)")
    smoothing = round(SMOOTHING_PARTS * label_smoothing)
    powers, logarithms = _tables(device, classes)

    def fitness(logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits >> bits
        top = logits.amax(-1, keepdim=True)
        below = logits - top  # 0 or less: whole part below the point, fraction above
        terms = powers[below & (UNIT - 1)] >> (-(below >> FINE)).clamp(max=31)
        excess = terms.sum(-1, dtype=torch.int32) - (1 << POWER_BITS)
        total = logarithms[excess >> (POWER_BITS - FINE)] + top.squeeze(-1)
        index = labels.expand(logits.shape[:-1]).unsqueeze(-1)
        chosen = logits.gather(-1, index).squeeze(-1)
        if smoothing:
            others = logits.sum(-1, dtype=torch.int32) - classes * chosen
            chosen = chosen + smoothing * others // (SMOOTHING_PARTS * classes)
        return chosen - total

    return fitness


def _tables(device: torch.device | str, classes: int) -> tuple[Tensor, Tensor]:
    """2^(i / UNIT) in 2^-POWER_BITS, and log2(1 + i / UNIT) in 1 / UNIT up to log2(classes)."""
    powers = [round(2 ** (i / UNIT + POWER_BITS)) for i in range(UNIT)]
    logarithms = [round(math.log2(1 + i / UNIT) * UNIT) for i in range((classes - 1) * UNIT + 2)]
    powers = torch.tensor(powers, dtype=torch.int32, device=device)
    return powers, torch.tensor(logarithms, dtype=torch.int32, device=device)
