"""Fitness functions, their shaping, and checks of what they return.

A fitness takes outputs (P, B, ..., C) and labels and returns scores (P, B), or (P,) for the whole
batch; higher is better. Shapes: P members, B examples, C classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Fitness = Callable[[Tensor, Any], Tensor]
Shaping = Callable[[Tensor], Tensor]


class FitnessError(ValueError):
    """A fitness function returned scores that cannot be used: wrong shape, or not finite."""


class NotFiniteError(FitnessError, FloatingPointError):
    """Scores are not finite: training has diverged, or the fitness divides by zero."""


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return 1 where the largest output is the label's, else 0. Shape (P, B)."""
    return (outputs.argmax(-1) == labels).to(outputs.dtype)


def cross_entropy(
    outputs: Tensor, labels: Tensor, label_smoothing: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """Return minus the cross-entropy, in nats: the log-likelihood of the label. Shape (P, B).

    label_smoothing  share of the target that is spread evenly over all classes
    temperature      divides the outputs; above 1, examples that are right still count
    """
    if temperature != 1:
        outputs = outputs / temperature
    target = smoothed_targets(labels, outputs, label_smoothing)
    return torch.linalg.vecdot(outputs, target) - outputs.logsumexp(-1)


def smoothed_targets(labels: Tensor, outputs: Tensor, label_smoothing: float) -> Tensor:
    """Return the probabilities (B, ..., C) that outputs (P, B, ..., C) should have."""
    classes = outputs.shape[-1]
    target = outputs.new_full((*labels.shape, classes), label_smoothing / classes)
    return target.scatter_(
        -1, labels.unsqueeze(-1), 1 - label_smoothing + label_smoothing / classes
    )


def identity(scores: Tensor) -> Tensor:
    """Return the scores unchanged: the estimate is then the gradient, in the fitness's units."""
    return scores


def z_score(scores: Tensor) -> Tensor:
    """Scale to zero mean and unit variance. A constant fitness gives zeros."""
    centered = scores - scores.mean()
    spread = centered.square().mean().sqrt()
    # relative to the scores: rounding alone must not be amplified to a signal
    smallest = 1e-7 * scores.abs().max() + torch.finfo(scores.dtype).tiny
    return torch.where(spread > smallest, centered / spread.clamp_min(smallest), 0.0)


def centered_rank(scores: Tensor) -> Tensor:
    """Replace scores by their ranks, scaled to [-0.5, 0.5]. Tied scores share their mean rank.

    Ties are the rule with accuracy, which has only B + 1 values: broken by position they would
    favor later members. Source: Salimans et al. 2017, arXiv 1703.03864, section 2.1.
    """
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = counts.cumsum(0) - 1 - (counts - 1) / 2
    return (mean_rank[place] / max(scores.numel() - 1, 1) - 0.5).to(scores.dtype)


def check_scores(scores: Any, members: int, examples: int, *, per_example: bool) -> Tensor:
    """Return the scores. Raises FitnessError unless (P, B), or (P,) where not `per_example`."""
    expected = f"({members}, {examples})" + ("" if per_example else f" or ({members},)")
    if not isinstance(scores, Tensor):
        raise FitnessError(
            f"the fitness must return a tensor of shape {expected}, got {type(scores).__name__}"
        )
    if per_example and scores.shape == (members,):
        raise FitnessError(
            f"NodePerturbation needs one score per example, {expected}, got one per member, "
            f"({members},): add smoothing, or use BlockLowRank"
        )
    if scores.shape != (members, examples) and (per_example or scores.shape != (members,)):
        raise FitnessError(f"the fitness must return shape {expected}, got {tuple(scores.shape)}")
    return scores


def check_finite(scores: Tensor, step: int) -> None:
    """Raise FitnessError where a member's score, (P,) or (P, B), is not finite."""
    # one pass for the usual case; a sum can overflow though each score is finite
    if not scores.sum().isfinite() and not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).reshape(len(scores), -1).any(1).sum())
        raise diverged(f"{bad} of {len(scores)} members", step)


def diverged(members: str, step: int) -> FitnessError:
    """Return the error of members whose scores are not finite."""
    return NotFiniteError(
        f"the fitness of {members} is not finite at step {step:,}: training has diverged (try a "
        "smaller lr or sigma), or the fitness divides by zero"
    )
