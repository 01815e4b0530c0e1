"""Fitness functions, and how scores are shaped before they weight the noise.

Higher is better, everywhere. Shapes: P members, B examples, C classes. The two signs of antithetic
pair k are members 2k and 2k+1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# outputs (P, B, C), labels (B,) -> one score per member and example, (P, B), or per member, (P,)
Fitness = Callable[[Tensor, Tensor], Tensor]
Shaping = Callable[[Tensor], Tensor]


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
        target = scaled.gather(-1, labels.expand(outputs.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        if label_smoothing:
            target = (1 - label_smoothing) * target + label_smoothing * scaled.mean(-1)
        # log_softmax would do, but on a CPU it is 3 times as slow over as few classes as these
        return target - scaled.logsumexp(-1)

    return log_likelihood


def check_scores(scores: Tensor, members: int, examples: int, *, by_example: bool) -> None:
    """Raises FitnessError for scores that are not (P, B), or (P,) unless `by_example`."""
    wanted = f"({members}, {examples})" + ("" if by_example else f" or ({members},)")
    if by_example and scores.shape == (members,):
        raise FitnessError(
            "the fitness gives one score per member, and example members need one per member and "
            f"example, {wanted} (for a fitness of the whole batch use batch members)"
        )
    if scores.shape != (members, examples) and (by_example or scores.shape != (members,)):
        raise FitnessError(
            f"the fitness returned scores of shape {tuple(scores.shape)} for {members} members and "
            f"{examples} examples; return {wanted}"
        )


def check_finite(scores: Tensor, step: int) -> None:
    """Raises FitnessError where a member's score, (P,) or (P, B), is not finite."""
    if not torch.isfinite(scores).all():
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
