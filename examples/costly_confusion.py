"""Accuracy with a price: to answer 4 where the digit is a 9 costs as much as five other mistakes.

python mnist_eggroll.py --fitness examples/costly_confusion.py:minus_cost
python evaluate.py results/runs/FOLDER --fitness examples/costly_confusion.py:minus_cost

What comes out after ten epochs: 98.0 % of the test images right, at a price of 221 for all 10,000;
trained on hits alone the same network costs 233.
"""

from torch import Tensor

COSTLY = 5.0


def minus_cost(outputs: Tensor, labels: Tensor) -> Tensor:
    """Outputs (P, B, 10) and labels (B,) to minus what each answer costs, (P, B)."""
    answers = outputs.argmax(-1)
    cost = (answers != labels).to(outputs.dtype)
    cost[(answers == 4) & (labels == 9)] = COSTLY
    return -cost
