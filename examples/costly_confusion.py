"""Accuracy with a price: to answer 4 where the digit is a 9 costs as much as five other mistakes.

python mnist_eggroll.py --fitness examples/costly_confusion.py:minus_cost \
    --estimator population --population 416 --sigma 0.05 --lr 0.01 --epochs 1

What comes out: one epoch, about a minute on one core, 70 % of the test images right.

A price for each answer is a score for each example, so per-example credit takes it too (leave out
--estimator); of scores that are counts it makes less (see results/LOG.md).
"""

from torch import Tensor

COSTLY = 5.0


def minus_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (P, B, 10) and labels (B,) to minus what each answer costs, (P, B)."""
    answers = logits.argmax(-1)
    cost = (answers != labels).to(logits.dtype)
    cost[(answers == 4) & (labels == 9)] = COSTLY
    return -cost
