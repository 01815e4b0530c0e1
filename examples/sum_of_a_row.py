"""Digits that are only judged together: is the sum of four images right?

python mnist_eggroll.py node-perturbation --fitness examples/sum_of_a_row.py:sum_is_right

The four answers of a row are added up, and the score is one bit for all four; no label is seen
alone. The sum of four argmaxes has no gradient, so backprop has nothing to follow.
"""

import torch
from torch import Tensor

ROW = 4  # images that are added up


def sum_is_right(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return 1 for each image of a row whose sum is right, else 0, (P, B), from (P, B, 10).

    Images left over at the end of a batch form a shorter row.
    """
    row = torch.arange(len(labels), device=labels.device) // ROW
    right = row_sums(outputs.argmax(-1), row) == row_sums(labels.unsqueeze(0), row)
    return right[:, row].to(outputs.dtype)


def row_sums(digits: Tensor, row: Tensor) -> Tensor:
    """Return the sums, (P, rows), of digits (P, B); row (B,) is the row of each."""
    rows = int(row[-1]) + 1
    return digits.new_zeros(len(digits), rows).index_add_(1, row, digits)
