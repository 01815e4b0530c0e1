"""Digits that are only ever judged together: is the sum of four images right, or is it wrong?

python mnist_eggroll.py --fitness examples/sum_of_a_row.py:sum_is_right

What comes out after six epochs, a minute on one core: 97.7 % of the test digits, one by one.

No image is ever told its digit. Each row of four is read, the four answers are added up, and a till
says whether the sum is right: one bit for four images. The sum of four largest outputs has no
gradient, so backprop has nothing to follow.
"""

import torch
from torch import Tensor

ROW = 4  # images that are added up


def sum_is_right(outputs: Tensor, labels: Tensor) -> Tensor:
    """Outputs (P, B, 10) and labels (B,) to 1 for every image of a row whose sum is right, (P, B).

    The images that are left over at the end of a batch are a shorter row.
    """
    row = torch.arange(len(labels), device=labels.device) // ROW
    right = row_sums(outputs.argmax(-1), row) == row_sums(labels.unsqueeze(0), row)
    return right[:, row].to(outputs.dtype)


def row_sums(digits: Tensor, row: Tensor) -> Tensor:
    """Digits (P, B), and the row (B,) that each belongs to, to sums (P, rows)."""
    rows = int(row[-1]) + 1
    return digits.new_zeros(len(digits), rows).index_add_(1, row, digits)
