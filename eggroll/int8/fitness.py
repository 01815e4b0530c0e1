"""Fitness in integers: logits (P, B, C), in units of 2^-FRACTION_BITS, to scores (P, B), int32.

Higher is better. `unit`: a unit of the scores in nats, or as a fraction.
Shapes: P members, B examples, C classes, K noisy copies.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from eggroll.fitness import Fitness
from eggroll.int8.arithmetic import INT8_MAX, rounded_division, rounded_shift
from eggroll.int8.network import FRACTION_BITS, Int8MLP
from eggroll.smoothing import EPSILON, Smoothing

UNIT = 1 << FRACTION_BITS
POWER_BITS = 15  # of the powers of two that are summed
CUBIC = (22_810, 7_358, 2_600)  # of 2^x for x from 0 to 1, in 2^-POWER_BITS
SMOOTHING_PARTS = 256  # label smoothing is a multiple of 1 / 256
NOISE_BITS = 6  # 64 is about the standard deviation of uniform noise in -127..127
DECAY_SHIFT = 1  # of logits in units of the noise: OUTPUT_DECAY in units of a direction
DIRECTION_BITS = 4  # of a fraction: directions are seldom above 2


class Int8Accuracy:
    """2^FRACTION_BITS where the largest logit is the label's, else 0."""

    unit = 1 / UNIT

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(-1) == labels).int() << FRACTION_BITS


class Int8CrossEntropy:
    """Minus the cross-entropy, in 2^-FRACTION_BITS bits: log2 of the label's share of 2^logits.

    Powers come from a cubic, the logarithm of their sum from a table, each to about one unit.
    label_smoothing  share of the target that is spread evenly over all classes, in 256ths
    """

    unit = math.log(2) / UNIT

    def __init__(self, label_smoothing: float = 0.0):
        self.smoothing = round(SMOOTHING_PARTS * label_smoothing)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        classes, device = logits.shape[-1], logits.device
        # classes first: vector units then work along examples, of which there are many
        logits = logits.movedim(-1, 0).contiguous()
        top = logits.amax(0)
        below = logits - top  # 0 or less
        whole = (-(below >> FRACTION_BITS)).clamp(max=31)
        terms = power_of_two(below & (UNIT - 1)) >> whole
        excess = terms.sum(0, dtype=torch.int32) - (1 << POWER_BITS)
        total = logarithms(classes, device)[excess >> (POWER_BITS - FRACTION_BITS)] + top
        chosen = logits.gather(0, labels.expand(top.shape).unsqueeze(0)).squeeze(0)
        if self.smoothing:
            others = logits.sum(0, dtype=torch.int32) - classes * chosen
            chosen = chosen + self.smoothing * others // (SMOOTHING_PARTS * classes)
        return chosen - total


Int8Fitness = Int8Accuracy | Int8CrossEntropy


class Int8Smoothing(Smoothing):
    """Smoothing of Int8Accuracy in integers.

    tau      standard deviation of the noise on the logits, in nats; the noise is uniform, and
             rounded to what a shift gives
    samples  noisy copies of the unperturbed logits scored at each step, in antithetic pairs

    Raises FitnessError for an invalid tau or number of samples.
    """

    def __init__(self, tau: float = 2.0, samples: int = 256):
        super().__init__(tau, samples)
        deviation = INT8_MAX / math.sqrt(3) * Int8MLP.nats_per_logit  # without a shift
        self.shift = max(round(math.log2(tau / deviation)), 0)

    def direction(
        self, fitness: Fitness, outputs: Tensor, labels: Any, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the directions of logits (B, C), int32, and the unperturbed scores, (B,)."""
        noise = torch.empty(
            self.samples // 2, *outputs.shape, dtype=torch.int8, device=outputs.device
        )
        noise.random_(-INT8_MAX, INT8_MAX + 1, generator=rng)
        moves = noise.int() << self.shift
        scores = fitness(torch.cat([outputs[None], outputs + moves, outputs - moves]), labels)
        plus, minus = (scores[1:] >> FRACTION_BITS).chunk(2)  # 0 or 1
        total = ((plus - minus).unsqueeze(-1) * noise).sum(0, dtype=torch.int32)
        right = (plus + minus).sum(0, dtype=torch.int32) + round(EPSILON * self.samples)
        direction = rounded_division(total << DIRECTION_BITS, right.clamp_min(1).unsqueeze(-1))
        return direction - rounded_shift(outputs, DECAY_SHIFT + self.shift), scores[0]

    def score(self, outputs: Tensor, unperturbed: Tensor, direction: Tensor) -> Tensor:
        """Return how far logits (P, B, C) moved along the direction, (P, B)."""
        moved = ((outputs - unperturbed) * direction).sum(-1, dtype=torch.int32)
        return rounded_shift(moved, DIRECTION_BITS + NOISE_BITS)


def power_of_two(x: Tensor) -> Tensor:
    """Return 2^(x / UNIT) in 2^-POWER_BITS, for x from 0 to UNIT - 1, to 6 units of 32,768."""
    inner = ((CUBIC[2] * x >> FRACTION_BITS) + CUBIC[1]) * x >> FRACTION_BITS
    return ((inner + CUBIC[0]) * x >> FRACTION_BITS) + (1 << POWER_BITS)


@lru_cache(maxsize=8)
def logarithms(classes: int, device: torch.device) -> Tensor:
    """Return log2(1 + i / UNIT) in units of 1 / UNIT, up to log2(classes)."""
    table = [round(math.log2(1 + i / UNIT) * UNIT) for i in range((classes - 1) * UNIT + 2)]
    return torch.tensor(table, dtype=torch.int32, device=device)
