"""Accuracy with a price: to answer 4 where the digit is a 9 costs as much as fifty others.

python mnist_eggroll.py --fitness examples/costly_confusion.py:minus_cost
python evaluate.py results/runs/FOLDER --fitness examples/costly_confusion.py:minus_cost

docs/results.md has what comes out, beside networks that were trained on hits and by backprop.
"""

from torch import Tensor

COSTLY = 50.0


def minus_cost(outputs: Tensor, labels: Tensor) -> Tensor:
    """Outputs (P, B, 10) and labels (B,) to minus what each answer costs, (P, B)."""
    answers = outputs.argmax(-1)
    cost = (answers != labels).to(outputs.dtype)
    cost[(answers == 4) & (labels == 9)] = COSTLY
    return -cost
