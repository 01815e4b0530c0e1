"""Layers whose weights are signs: what is computed with is sign(W), and what is trained is W.

Low-rank members perturb the matrix that is computed with, so they are a matrix of signs plus
sigma A^T B: to perturb W before its sign is taken needs all of the member's matrix. The estimate
is then that of the signs' matrix, and moves W as it is: W collects what its sign ought to be. That
is the straight-through rule (Bengio et al. 2013, arXiv 1308.3432; BinaryConnect, arXiv 1511.00363),
which backprop could be given too; plain autograd has none, and its gradient is zero. Members of
full rank (`eggroll.full_rank`) do perturb W itself, and every one of them is binary.

Letters: O/I a layer's outputs/inputs.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BinaryLinear(nn.Linear):
    """y = x sign(W)^T sqrt(2 / I) + bias; `weight` is W, (O, I)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, binarised(self.weight), self.bias)


def binarised(weight: Tensor) -> Tensor:
    """Signs of (..., O, I), of the size that keeps a signal's scale through a rectifier (He)."""
    return torch.sign(weight) * math.sqrt(2 / weight.shape[-1])


def effective_weight(layer: nn.Linear, weight: Tensor | None = None) -> Tensor:
    """What a layer multiplies by, (..., O, I), where `weight`, or else its own, are its weights."""
    weight = layer.weight if weight is None else weight
    return binarised(weight) if isinstance(layer, BinaryLinear) else weight
