"""Smoothing of any fitness in output space, where a noisy copy costs no forward pass.

Shapes: K noisy copies, B examples, C outputs of an example. Source: docs/method.md, "Smoothing".
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.fitness import Fitness, FitnessError, check_scores
from eggroll.noise import gaussian

# Tuned on the validation split (results/LOG.md)
EPSILON = 0.01  # added to the share of copies that reach a level: caps a weight at 100
SCALE_DECAY = 0.01  # per step, of the scale of scores where their range narrows
GAIN = 2 / 3  # step size, for the learning rate that cross-entropy has
BATCH_GAIN = 0.5  # step size for scores of the whole batch, relative to GAIN
OUTPUT_DECAY = 0.04  # pulls outputs to where noise of size tau still changes the score


class Smoothing:
    """Evolution strategies on the outputs: the direction g in which each example's should move.

    A member's score on an example becomes (its outputs - the unperturbed ones) . g, which is smooth
    whatever the fitness is, and the same for a F + b with any a > 0.

    tau      standard deviation of the noise on the outputs, in their units
    samples  noisy copies of the unperturbed outputs scored at each step, in antithetic pairs

    Raises FitnessError for an invalid tau or number of samples.
    """

    def __init__(self, tau: float = 2.0, samples: int = 256):
        if samples < 2 or samples % 2:
            raise FitnessError(
                f"smoothing samples {samples}: antithetic pairs need an even number (try "
                f"{max(2, samples + 1)})"
            )
        if not tau > 0:
            raise FitnessError(f"smoothing tau must be > 0, got {tau} (try 2)")
        self.tau, self.samples = tau, samples
        self.scale = torch.zeros(())  # of the scores so far

    def direction(
        self, fitness: Fitness, outputs: Tensor, labels: object, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return g, shaped as the outputs (B, ..., C), and the unperturbed score, (B,) or 0-d.

        The fitness is called once, with 1 + K rows; row 0 is the unperturbed network's.
        """
        noise = gaussian((self.samples // 2, *outputs.shape), outputs, rng)
        copies = torch.cat([outputs[None], outputs + self.tau * noise, outputs - self.tau * noise])
        scores = fitness(copies, labels)
        scores = check_scores(scores, len(copies), len(outputs), per_example=False)
        scores = scores.to(outputs.device, torch.float32)
        self.scale = self.scale.to(scores)  # the same tensor from then on: a captured step reads it
        advantages = self._per_example if scores.dim() == 2 else self._whole_batch
        plus, minus = advantages(scores[1:], len(outputs)).chunk(2)
        weights = (plus - minus).view(len(noise), -1, *[1] * (outputs.dim() - 1)) / self.samples
        ascent = (weights * noise).sum(0) - OUTPUT_DECAY / self.tau * outputs
        return GAIN * ascent, scores[0]

    def score(self, outputs: Tensor, unperturbed: Tensor, direction: Tensor) -> Tensor:
        """Return how far outputs (P, B, ..., C) moved along the direction, (P, B)."""
        return ((outputs - unperturbed) * direction).flatten(2).sum(-1)

    def _per_example(self, scores: Tensor, _: int) -> Tensor:
        """Advantages (K, B): each level of score weighs by log share of the copies that reach it.

        a = sum over levels of sqrt(gap / scale) (1[F >= level] - share) / (share + EPSILON). The
        root keeps steps stable where one mistake costs 50 times another.
        """
        ordered, order = scores.T.contiguous().sort(1)  # (B, K), ascending
        self._follow_ranges(ordered[:, -1] - ordered[:, 0])
        gaps = ordered.diff(dim=1) / _positive(self.scale)  # (B, K - 1)
        share = torch.arange(len(scores) - 1, 0, -1, device=scores.device) / len(scores)
        utility = F.pad((gaps.sqrt() / (share + EPSILON)).cumsum(1), (1, 0))
        utility -= utility.mean(1, keepdim=True)
        return torch.empty_like(utility).scatter_(1, order, utility).T

    def _follow_ranges(self, ranges: Tensor) -> None:
        """Set the scale to the median range of examples' scores: it rises at once, falls slowly."""
        ordered = torch.where(ranges > 0, ranges, torch.inf).sort().values
        middle = ((ranges > 0).sum() - 1).clamp_min(0) // 2  # torch.nanmedian would wait for a GPU
        typical = ordered.gather(0, middle.view(1))[0]
        decayed = torch.lerp(self.scale, typical, SCALE_DECAY)
        largest = torch.maximum(decayed, typical)
        self.scale.copy_(torch.where(typical.isfinite(), largest, self.scale))

    def _whole_batch(self, scores: Tensor, examples: int) -> Tensor:
        """Advantages (K,) relative to the widest spread so far, so they fade as scores agree."""
        self.scale.copy_(torch.maximum(self.scale, scores.std() * examples**0.5))
        return BATCH_GAIN * examples * (scores - scores.mean()) / _positive(self.scale)


def _positive(scale: Tensor) -> Tensor:
    """Avoid division by zero where scores have never differed."""
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)
