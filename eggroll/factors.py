"""Products with low-rank perturbations E = A B^T / sqrt(R), which are never formed.

Shapes: n directions, P members, B examples, R rank, I / O inputs / outputs of a layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """A perturbation E = a^T b for each direction: a (n, R, O) is A / sqrt(R), b (n, R, I) is B."""

    a: Tensor
    b: Tensor

    def part(self, directions: slice) -> "Factors":
        return Factors(self.a[directions], self.b[directions])


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return y + (x b^T) a, (P, B, ..., O), without forming a^T b.

    x (P or 1, B, ..., I), y (P or 1, B, ..., O), a (P, R, O), b (P, R, I); where x is shared, b may
    have fewer rows, which repeat.
    """
    with torch.autocast(y.device.type, enabled=False):
        if len(x) == 1:  # one product for all members
            u = (b.flatten(0, 1) @ x.flatten(0, -2).T).unflatten(0, b.shape[:2]).mT
            u = u.repeat(len(a) // len(b), 1, 1)
        else:
            u = torch.bmm(x.flatten(1, -2), b.mT.to(x.dtype))
        return torch.baddbmm(y.flatten(1, -2), u.to(y.dtype), a.to(y.dtype)).view(
            len(a), *y.shape[1:]
        )


def weighted_sum(noise: Factors, weights: Tensor) -> Tensor:
    """Sum of weights (n, O or 1) times E = a^T b over the directions, (O, I), in one product."""
    weighted = noise.a * weights.unsqueeze(1)
    return weighted.flatten(0, 1).T @ noise.b.flatten(0, 1)
