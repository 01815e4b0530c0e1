"""Fitness functions, and how scores are shaped before they weight the noise.

Higher is better, everywhere. Shapes: P members, B examples, C classes. The two signs of antithetic
pair k are members 2k and 2k+1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.noise import gaussian

# outputs (P, B, C), labels (B,) -> one score per member and example, (P, B), or per member, (P,)
Fitness = Callable[[Tensor, Tensor], Tensor]
Shaping = Callable[[Tensor], Tensor]

# Of smoothing, measured on the validation split (results/LOG.md)
LEAST_SHARE = 0.01  # added to the share of copies that reach a score: a rare hit counts 100 at most
FADING = 0.01  # part of the distance that the unit of scores falls in a step, where scores narrow
BATCH_GAIN = 0.5  # of a whole batch's score, whose examples are told apart by their noise alone
OUTPUT_DECAY = 0.04  # pulls outputs back to where noise of size tau can still change the answer


class FitnessError(ValueError):
    """A fitness function returned scores that cannot be used: wrong shape, or not finite."""


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Raw accuracy: 1 where the largest output is the label's, else 0. Shape (P, B)."""
    return (outputs.argmax(-1) == labels).to(outputs.dtype)


def cross_entropy(temperature: float = 1.0, label_smoothing: float = 0.0) -> Fitness:
    """Log-likelihood of the label, in nats, of softmax(outputs / temperature). Shape (P, B).

    label_smoothing  share of the target that is spread evenly over all classes
    """

    def log_likelihood(outputs: Tensor, labels: Tensor) -> Tensor:
        scaled = outputs / temperature if temperature != 1 else outputs
        right = labels.unsqueeze(-1) == torch.arange(outputs.shape[-1], device=labels.device)
        target = right * (1 - label_smoothing) + label_smoothing / outputs.shape[-1]
        # log_softmax and logsumexp would do, but are several times as slow over so few classes
        largest = scaled.amax(-1, keepdim=True)
        total = (scaled - largest).exp_().sum(-1).log_().add_(largest.squeeze(-1))
        return (scaled * target).sum(-1) - total

    return log_likelihood


class Smoothed:
    """Any fitness, smoothed in output space: a score of every example that small changes move.

    fitness  outputs (P, B, C), labels -> (P, B) or (P,). Called once a step, with samples + 1 rows,
             of which the first is the unperturbed network's
    tau      standard deviation of the noise on the outputs, in their own units
    samples  noisy copies of the unperturbed outputs that are scored in each step, antithetic pairs

    Evolution strategies on the outputs: what each noisy copy scored weights its noise, which gives
    the direction in which an example's outputs should move. A member's score on an example is how
    far its outputs move that way. Raises FitnessError for values that cannot be.
    Source: docs/method.md.
    """

    def __init__(self, fitness: Fitness, tau: float = 2.0, samples: int = 256):
        check_smoothing(tau, samples)
        self.fitness, self.tau, self.samples = fitness, tau, samples
        self.spread = torch.zeros(())  # what scores are measured in, from the steps so far

    def prepare(
        self, outputs: Tensor, labels: Any, generator: torch.Generator
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """What `__call__` reads in place of labels: unperturbed outputs (B, ..., C), and directions
        of the same shape; and the unperturbed network's own scores, (B,) or 0-d."""
        noise = gaussian((self.samples // 2, *outputs.shape), generator, outputs)
        moved = self.tau * noise
        noisy = torch.cat([outputs.unsqueeze(0), outputs + moved, outputs - moved])
        scores = self.fitness(noisy, labels)
        check_scores(scores, len(noisy), len(outputs), by_example=False)
        scores = scores.to(outputs.device, torch.float32)
        self.spread = self.spread.to(scores)
        if scores.dim() == 2:
            plus, minus = self._of_examples(scores[1:]).chunk(2)
        else:
            plus, minus = self._of_the_batch(scores[1:], len(outputs)).chunk(2)
        weights = (plus - minus) / self.samples
        weights = weights.view(len(weights), -1, *[1] * (outputs.dim() - 1))
        direction = (weights * noise).sum(0) - OUTPUT_DECAY / self.tau * outputs
        return (outputs, direction), scores[0]

    def _of_examples(self, scores: Tensor) -> Tensor:
        """Advantages of the noisy copies, (K, B): the sum over all levels of score of how far a
        copy that reaches one raises the log of the share that do, times the root of the gap below
        it (a price of 50 must not move outputs 50 times as far); of hits (F - mean) / mean."""
        ordered, order = scores.t().contiguous().sort(1)  # (B, K)
        spread = ordered[:, -1] - ordered[:, 0]
        typical = torch.where(spread > 0, spread, torch.nan).nanmedian().nan_to_num(0.0)
        faded = torch.lerp(self.spread, typical, FADING)
        self.spread = torch.where(typical > 0, torch.maximum(faded, typical), self.spread)
        reached = torch.arange(len(scores) - 1, 0, -1, device=scores.device) / len(scores)
        levels = (ordered.diff(dim=1) / _not_zero(self.spread)).sqrt() / (reached + LEAST_SHARE)
        utility = F.pad(levels.cumsum(1), (1, 0))
        utility -= utility.mean(1, keepdim=True)
        return torch.empty_like(utility).scatter_(1, order, utility).t()

    def _of_the_batch(self, scores: Tensor, examples: int) -> Tensor:
        """Advantages, (K,), of scores of the whole batch, of which each example has a share. In
        units of the widest spread so far, so that they fade as the scores agree."""
        self.spread = torch.maximum(self.spread, scores.std() * examples**0.5)
        return BATCH_GAIN * examples * (scores - scores.mean()) / _not_zero(self.spread)

    def __call__(self, outputs: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """How far each member's outputs (P, B, ..., C) moved in the right direction, (P, B)."""
        unperturbed, direction = prepared
        moved = (outputs - unperturbed) * direction
        return moved.reshape(*outputs.shape[:2], -1).sum(-1)

    def state_dict(self) -> dict[str, Any]:
        return {"spread": self.spread}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spread = state["spread"]


def _not_zero(spread: Tensor) -> Tensor:
    """To divide by: where scores have never differed, there is nothing to divide."""
    return spread.clamp_min(torch.finfo(spread.dtype).tiny)


smoothed = Smoothed  # as it reads where it wraps a fitness


def check_smoothing(tau: float, samples: int) -> None:
    """Raises FitnessError for what cannot be."""
    if samples < 2 or samples % 2:
        raise FitnessError(
            f"{samples} smoothing samples are no antithetic pairs (try {max(2, samples + 1)})"
        )
    if not tau > 0:
        raise FitnessError(f"smoothing {tau} is not above 0 (try 2)")


def check_scores(scores: Tensor, members: int, examples: int, *, by_example: bool) -> None:
    """Raises FitnessError for scores that are not (P, B), or (P,) unless `by_example`."""
    wanted = f"({members}, {examples})" + ("" if by_example else f" or ({members},)")
    if by_example and scores.shape == (members,):
        raise FitnessError(
            "the fitness gives one score per member, and example members need one per member and "
            f"example, {wanted} (for a fitness of the whole batch use smoothed, or batch members)"
        )
    if scores.shape != (members, examples) and (by_example or scores.shape != (members,)):
        raise FitnessError(
            f"the fitness returned scores of shape {tuple(scores.shape)} for {members} members and "
            f"{examples} examples; return {wanted}"
        )


def check_finite(scores: Tensor, step: int) -> None:
    """Raises FitnessError where a member's score, (P,) or (P, B), is not finite."""
    # one pass for the usual case; a sum can overflow though each score is finite
    if not scores.sum().isfinite() and not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).reshape(len(scores), -1).any(1).sum())
        raise FitnessError(
            f"the fitness of {bad} of {len(scores)} members is not finite at step {step:,}: "
            "training has diverged (try a smaller lr or sigma), or the fitness divides by zero"
        )


def z_score(scores: Tensor) -> Tensor:
    """Zero mean and unit variance over the population, (P,). A constant fitness gives zeros."""
    centred = scores - scores.mean()
    spread = centred.square().mean().sqrt()
    # relative to the scores: rounding alone must not be blown up to a signal
    floor = 1e-7 * scores.abs().max() + torch.finfo(scores.dtype).tiny
    return torch.where(spread > floor, centred / spread.clamp_min(floor), 0.0)


def centered_rank(scores: Tensor) -> Tensor:
    """Ranks scaled to [-0.5, 0.5], (P,). Tied scores share the mean of their ranks.

    Ties are the rule with accuracy, which takes only B + 1 values: broken by position they would
    favour the later members (Salimans et al. 2017, arXiv 1703.03864, section 2.1, for the ranks).
    """
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    mean_rank = last - (counts - 1) / 2
    return (mean_rank[place] / max(len(scores) - 1, 1) - 0.5).to(scores.dtype)


def unshaped(scores: Tensor) -> Tensor:
    """The scores as they are: the estimate is then the gradient of the fitness."""
    return scores


# sign is of differences, +1 for the better member of a pair, and has no function of single scores
SHAPINGS: dict[str, Shaping] = {
    "z-score": z_score,
    "centered-rank": centered_rank,
    "sign": unshaped,
    "none": unshaped,
}
