"""Macro-F1 as the fitness: a score that only a whole batch has, and that no loss stands in for.

python mnist_eggroll.py --fitness examples/macro_f1.py:macro_f1

What comes out after six epochs, two minutes on one core: 97.4 % of the test images right.

F1 of a class is the harmonic mean of how many of its answers are right and how many of its digits
are found. It is made of counts, so it has no gradient, and the mean over the classes is no mean
over examples: one score for each network that is tried.
"""

from torch import Tensor
from torch.nn import functional as F


def macro_f1(outputs: Tensor, labels: Tensor) -> Tensor:
    """Outputs (P, B, 10) and labels (B,) to the mean F1 of the ten classes, (P,)."""
    classes = outputs.shape[-1]
    answers = F.one_hot(outputs.argmax(-1), classes)  # (P, B, 10)
    truth = F.one_hot(labels, classes)  # (B, 10)
    hits = (answers * truth).sum(1)  # (P, 10)
    mentioned = answers.sum(1) + truth.sum(0)  # of a class that nobody mentions F1 is 0
    return (2 * hits / mentioned.clamp_min(1)).mean(-1)
