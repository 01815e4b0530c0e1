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
CUBIC = (22_810, 7_358, 2_600)  # of 2^x for x from 0 to 1, in 2^-POWER_BITS
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

    Powers come from a cubic and the logarithm of their sum from a table, each exact to about one
    unit. To base 2 the softmax of the same logits is a little softer, as if the temperature were
    1.44 times as high.
    temperature      1, 2, 4, ...: a shift
    label_smoothing  share of the target that is spread over all classes, in 256ths
    Raises ValueError for a temperature that is no power of two.
    """
    bits = int(temperature).bit_length() - 1
    if temperature != 1 << max(bits, 0):
        raise ValueError(f"temperature {temperature:g} is no power of two (try 1 or 2)")
    smoothing = round(SMOOTHING_PARTS * label_smoothing)
    logarithms = _logarithms(device, classes)

    def fitness(logits: Tensor, labels: Tensor) -> Tensor:
        # classes first: vector units then work along examples, of which there are many
        logits = logits.movedim(-1, 0).contiguous() >> bits
        top = logits.amax(0)
        below = logits - top  # 0 or less: whole part below the point, fraction above
        terms = power_of_two(below & (UNIT - 1)) >> (-(below >> FINE)).clamp(max=31)
        excess = terms.sum(0, dtype=torch.int32) - (1 << POWER_BITS)
        total = logarithms[excess >> (POWER_BITS - FINE)] + top
        chosen = logits.gather(0, labels.expand(top.shape).unsqueeze(0)).squeeze(0)
        if smoothing:
            others = logits.sum(0, dtype=torch.int32) - classes * chosen
            chosen = chosen + smoothing * others // (SMOOTHING_PARTS * classes)
        return chosen - total

    return fitness


def power_of_two(x: Tensor) -> Tensor:
    """2^(x / UNIT) in 2^-POWER_BITS, for x from 0 to UNIT - 1: a cubic, to 6 units of 32,768.

    A table would be exact, and takes several times as long: vector units multiply, not look up.
    """
    x = x.int()
    inner = ((CUBIC[2] * x >> FINE) + CUBIC[1]) * x >> FINE
    return ((inner + CUBIC[0]) * x >> FINE) + (1 << POWER_BITS)


def _logarithms(device: torch.device | str, classes: int) -> Tensor:
    """log2(1 + i / UNIT) in 1 / UNIT, up to log2(classes)."""
    table = [round(math.log2(1 + i / UNIT) * UNIT) for i in range((classes - 1) * UNIT + 2)]
    return torch.tensor(table, dtype=torch.int32, device=device)
