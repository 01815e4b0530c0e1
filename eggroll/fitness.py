"""What members are scored by, and how scores are shaped before they weigh the noise.

Higher is better, everywhere. Letters: P members, B examples, C classes. Members 2k and 2k+1 are
the two signs of antithetic pair k.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from eggroll.captured import capturing

# logits (P, B, C), labels (B,) -> (P, B), one score per member and example, or (P,), one per member
Fitness = Callable[[Tensor, Tensor], Tensor]
Shaping = Callable[[Tensor], Tensor]


class FitnessError(ValueError):
    """A fitness function gave scores that cannot be used: wrong shape, or not finite."""


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Raw accuracy: 1 where the largest logit is the label's, else 0. Shape (P, B)."""
    return (logits.argmax(-1) == labels).to(logits.dtype)


def cross_entropy(temperature: float = 1.0, label_smoothing: float = 0.0) -> Fitness:
    """Log-likelihood of the label, in nats, of softmax(logits / temperature). Shape (P, B).

    label_smoothing  share of the target that is spread evenly over all classes
    """

    def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
        scaled = logits / temperature
        target = scaled.gather(-1, labels.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        if label_smoothing:
            target = (1 - label_smoothing) * target + label_smoothing * scaled.mean(-1)
        # log_softmax would do, but on a CPU it is 3 times as slow over as few classes as these
        return target - scaled.logsumexp(-1)

    return log_likelihood


def member_scores(scores: Tensor, members: int) -> Tensor:
    """One number per member, (P,): the mean over examples where a fitness gave (P, B).

    Raises FitnessError where the shape is neither (P, B) nor (P,).
    """
    if scores.dim() not in (1, 2) or len(scores) != members:
        raise FitnessError(
            f"the fitness gave scores of shape {tuple(scores.shape)} for {members} members; "
            f"return ({members}, examples) or ({members},)"
        )
    scores = scores.float()
    return scores.mean(1) if scores.dim() == 2 else scores


def check_finite(scores: Tensor, step: int) -> None:
    """Raises FitnessError where a score of a member, (P,) or (P, B), is not finite."""
    # while a graph is captured nothing may be read; what is not finite then shows in the weights
    if not capturing() and not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).reshape(len(scores), -1).any(1).sum())
        raise FitnessError(
            f"the fitness of {bad} of {len(scores)} members is not finite at step {step:,}: "
            "training has diverged (try a smaller lr or sigma), or the fitness divides by zero"
        )


def example_scores(scores: Tensor, members: int, examples: int) -> Tensor:
    """Scores of every member on every example, (P, B), as per-example credit needs them.

    Raises FitnessError for a fitness of another shape.
    """
    if scores.dim() == 1:
        raise FitnessError(
            "the fitness gives one score per member, and per-example credit needs one per member "
            f"and example, ({members}, {examples}) (use the population estimator for this fitness)"
        )
    if scores.shape != (members, examples):
        raise FitnessError(
            f"the fitness gave scores of shape {tuple(scores.shape)} for {members} members and "
            f"{examples} examples; return ({members}, {examples})"
        )
    return scores.float()


def winsorized(scores: Tensor, share: float) -> Tensor:
    """Scores whose lowest and highest `share` (0 to 0.5) are pulled in to the share's edge."""
    if not share:
        return scores
    low, high = torch.quantile(scores.flatten(), scores.new_tensor([share, 1 - share]))
    return scores.clamp(low, high)


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


def antithetic_sign(scores: Tensor) -> Tensor:
    """+1 for the better member of each pair, -1 for the worse, 0 where they tie. Shape (P,)."""
    plus, minus = scores[0::2], scores[1::2]
    better = torch.sign(plus - minus)
    return torch.stack([better, -better], dim=1).flatten()


def unshaped(scores: Tensor) -> Tensor:
    """The scores as they are: the estimate is then the fitness's own gradient."""
    return scores


SHAPINGS: dict[str, Shaping] = {
    "z-score": z_score,
    "centered-rank": centered_rank,
    "sign": antithetic_sign,
    "none": unshaped,
}
