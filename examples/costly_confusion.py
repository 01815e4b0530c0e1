"""Accuracy with a price: answering 4 for a 9 costs as much as fifty other mistakes.

python mnist_eggroll.py node-perturbation --fitness examples/costly_confusion.py:minus_cost
python evaluate.py results/runs/FOLDER --fitness examples/costly_confusion.py:minus_cost
"""

from torch import Tensor

COSTLY = 50.0


def minus_cost(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return minus the cost of each answer, (P, B), from outputs (P, B, 10) and labels (B,)."""
    answers = outputs.argmax(-1)
    cost = (answers != labels).to(outputs.dtype)
    cost[(answers == 4) & (labels == 9)] = COSTLY
    return -cost
