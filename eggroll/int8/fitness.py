"""Fitness in integers: logits (P, B, C), int32 in units of 2^-FRACTION_BITS, to scores (P, B).

Scores are int32; `fitness_per_unit` says how many nats, or hits, one of their units is. Higher is
better.
"""

import math

import torch
from torch import Tensor

from eggroll.fitness import LEAST_SHARE, check_smoothing
from eggroll.int8 import kernels
from eggroll.int8.arithmetic import INT8_MAX, rounded_division, rounded_shift
from eggroll.int8.network import FRACTION_BITS

UNIT = 1 << FRACTION_BITS
POWER_BITS = 15  # of the powers of two that are summed
CUBIC = (22_810, 7_358, 2_600)  # of 2^x for x from 0 to 1, in 2^-POWER_BITS
SMOOTHING_PARTS = 256
NOISE_BITS = 6  # 64 is about the standard deviation of uniform noise in -127..127
DECAY_SHIFT = 1  # of logits in units of the noise: OUTPUT_DECAY in units of a direction
DIRECTION_BITS = 4  # of a fraction: directions are seldom above 2


class Int8Accuracy:
    """1 where the largest logit is the label's, else 0, in units of 2^-FRACTION_BITS."""

    fitness_per_unit = 1 / UNIT

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(-1) == labels).int() << FRACTION_BITS


class Int8SmoothedAccuracy:
    """Int8Accuracy smoothed in output space: eggroll.fitness.Smoothed in integers.

    tau      standard deviation of the noise on the logits, in nats; the noise is uniform, and a
             power of two of its units makes the one nearest to tau
    samples  noisy copies of the logits that are scored in each step, antithetic pairs

    Raises FitnessError for values that cannot be.
    """

    fitness_per_unit = 1 / UNIT

    def __init__(self, tau: float, samples: int):
        check_smoothing(tau, samples)
        one = INT8_MAX / math.sqrt(3)  # standard deviation of the noise before it is shifted
        self.shift = max(round(math.log2(tau / Int8CrossEntropy.fitness_per_unit / one)), 0)
        self.samples, self.least = samples, round(samples * LEAST_SHARE)

    def prepare(
        self, logits: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Unperturbed logits (B, C) and directions of the same shape, int32; and hits (B,)."""
        noise = torch.empty(
            self.samples // 2, *logits.shape, dtype=torch.int8, device=logits.device
        )
        noise.random_(-INT8_MAX, INT8_MAX + 1, generator=generator)
        moved = noise.int() << self.shift
        hits = torch.cat([logits.unsqueeze(0), logits + moved, logits - moved]).argmax(-1) == labels
        plus, minus = hits[1:].int().chunk(2)
        total = ((plus - minus).unsqueeze(-1) * noise).sum(0, dtype=torch.int32)
        scale = (plus + minus).sum(0, dtype=torch.int32) + self.least
        direction = rounded_division(total << DIRECTION_BITS, scale.clamp_min(1).unsqueeze(-1))
        direction -= rounded_shift(logits, DECAY_SHIFT + self.shift)
        return (logits, direction), hits[0].int() << FRACTION_BITS

    def __call__(self, logits: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """How far each member's logits (P, B, C) moved in the right direction, (P, B)."""
        unperturbed, direction = prepared
        moved = (logits - unperturbed) * direction
        return rounded_shift(moved.sum(-1, dtype=torch.int32), DIRECTION_BITS + NOISE_BITS)


class Int8CrossEntropy:
    """log2 of the label's share of 2^(logits / temperature): minus the cross-entropy, in bits.

    Powers come from a cubic and the logarithm of their sum from a table, each exact to about one
    unit. To base 2 the softmax of the same logits is a little softer, as if the temperature were
    1.44 times as high.
    temperature      1, 2, 4, ...: a shift
    label_smoothing  share of the target that is spread over all classes, in 256ths
    Raises ValueError for a temperature that is no power of two.
    """

    fitness_per_unit = math.log(2) / UNIT

    def __init__(
        self,
        temperature: float = 1,
        label_smoothing: float = 0.0,
        device: torch.device | str = "cpu",
        classes: int = 10,
    ):
        self.shift = max(int(temperature).bit_length() - 1, 0)
        if temperature != 1 << self.shift:
            raise ValueError(f"temperature {temperature:g} is no power of two (try 1 or 2)")
        self.smoothing = round(SMOOTHING_PARTS * label_smoothing)
        self.classes, self.logarithms = classes, _logarithms(device, classes)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if kernels.available(logits):
            return self._compiled(logits, labels)
        # classes first: vector units then work along examples, of which there are many
        logits = logits.movedim(-1, 0).contiguous() >> self.shift
        top = logits.amax(0)
        below = logits - top  # 0 or less: whole part below the point, fraction above
        whole = (-(below >> FRACTION_BITS)).clamp(max=31)
        terms = power_of_two(below & (UNIT - 1)) >> whole
        excess = terms.sum(0, dtype=torch.int32) - (1 << POWER_BITS)
        total = self.logarithms[excess >> (POWER_BITS - FRACTION_BITS)] + top
        chosen = logits.gather(0, labels.expand(top.shape).unsqueeze(0)).squeeze(0)
        if self.smoothing:
            others = logits.sum(0, dtype=torch.int32) - self.classes * chosen
            chosen = chosen + self.smoothing * others // (SMOOTHING_PARTS * self.classes)
        return chosen - total

    def _compiled(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The same in one pass."""
        logits, out = logits.contiguous(), logits.new_empty(logits.shape[:-1])
        constants = (self.shift, FRACTION_BITS, POWER_BITS, self.smoothing, SMOOTHING_PARTS)
        tables = (self.logarithms, torch.tensor(CUBIC, dtype=torch.int32))
        kernels.call(
            "log_likelihood", logits, labels.contiguous(), *tables, *logits.shape, *constants, out
        )
        return out


def power_of_two(x: Tensor) -> Tensor:
    """2^(x / UNIT) in 2^-POWER_BITS, for x from 0 to UNIT - 1: a cubic, to 6 units of 32,768.

    A table would be exact, and takes several times as long: vector units multiply, not look up.
    """
    x = x.int()
    inner = ((CUBIC[2] * x >> FRACTION_BITS) + CUBIC[1]) * x >> FRACTION_BITS
    return ((inner + CUBIC[0]) * x >> FRACTION_BITS) + (1 << POWER_BITS)


def _logarithms(device: torch.device | str, classes: int) -> Tensor:
    """log2(1 + i / UNIT) in 1 / UNIT, up to log2(classes)."""
    table = [round(math.log2(1 + i / UNIT) * UNIT) for i in range((classes - 1) * UNIT + 2)]
    return torch.tensor(table, dtype=torch.int32, device=device)
