"""Macro-F1 as the fitness: one score for a whole batch, with no loss that stands in for it.

python mnist_eggroll.py node-perturbation --fitness examples/macro_f1.py:macro_f1

F1 of a class is the harmonic mean of precision and recall. It is made of counts, so it has no
gradient, and the mean over classes is not a mean over examples.
"""

from torch import Tensor
from torch.nn import functional as F


def macro_f1(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean F1 of the classes, (P,), from outputs (P, B, C) and labels (B,)."""
    classes = outputs.shape[-1]
    answers = F.one_hot(outputs.argmax(-1), classes)  # (P, B, C)
    truth = F.one_hot(labels, classes)  # (B, C)
    correct = (answers * truth).sum(1)  # (P, C)
    total = answers.sum(1) + truth.sum(0)  # 0 for a class that is neither answered nor there
    return (2 * correct / total.clamp_min(1)).mean(-1)
