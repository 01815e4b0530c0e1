"""The A of a low-rank perturbation: in which directions of a layer's outputs members differ.

Whatever the kind, entries have mean 0 and variance 1, and the mean of a.T @ a over members is the
identity, which is all that an unbiased estimate needs. The kinds differ in how far one draw is
from that mean, and so in the noise of the estimate.

Letters: M members, R rank, O a layer's outputs, G groups of examples.
"""

from functools import lru_cache

import torch
from torch import Tensor

KINDS = ("gaussian", "rademacher", "orthogonal")


def draw_directions(
    kind: str, groups: int, members: int, rank: int, outputs: int, like: Tensor, generator
) -> Tensor:
    """A for every member of each group of examples, (G, M, R, O), on `like`'s device and dtype.

    gaussian    N(0, 1), as the paper has it
    rademacher  signs: every direction is as long as any other
    orthogonal  signs whose rows are orthogonal, as many as there are outputs; then a new such set.
                With as many rows as outputs the estimate of a layer has no noise at all. Source:
                structured evolution strategies, Choromanski et al. 2018, arXiv 1804.02395
    Raises ValueError for another kind.
    """
    shape = (groups, members, rank, outputs)
    if kind == "gaussian":
        return like.new_empty(shape).normal_(generator=generator)
    if kind == "rademacher":
        return random_signs(shape, like, generator)
    if kind == "orthogonal":
        rows = members * rank
        sets = [
            _orthogonal_rows(groups, min(rows - start, full), outputs, like, generator)
            for full in [order_of(outputs)]
            for start in range(0, rows, full)
        ]
        return torch.cat(sets, dim=1).view(shape)
    raise ValueError(f"noise {kind!r} is not known (try {', '.join(KINDS)})")


def random_signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """+1 or -1 with equal chance."""
    bits = torch.empty(shape, dtype=torch.uint8, device=like.device)
    return bits.random_(0, 2, generator=generator).to(like.dtype).mul_(2).sub_(1)


def most_members(kind: str, rank: int, outputs: int) -> int | None:
    """Members of one layer beyond which its estimate gains nothing; None where it always does."""
    return -(-order_of(outputs) // rank) if kind == "orthogonal" else None


def _orthogonal_rows(
    groups: int, rows: int, outputs: int, like: Tensor, generator: torch.Generator
) -> Tensor:
    """Rows of a Hadamard matrix, chosen afresh for each group, with random signs of its columns.

    (G, rows, O). Where O is no power of two the columns are cut off: the rows are then not quite
    orthogonal, the mean of a.T @ a is still the identity, and the full set of rows still gives it.
    """
    matrix = hadamard(order_of(outputs)).to(like)[:, :outputs]
    keys = torch.rand(groups, len(matrix), generator=generator, device=like.device)
    chosen = matrix[keys.argsort(dim=1)[:, :rows]]
    return chosen * random_signs((groups, 1, outputs), like, generator)


def order_of(outputs: int) -> int:
    """The smallest power of two that is at least `outputs`."""
    return 1 << max(0, outputs - 1).bit_length()


@lru_cache(maxsize=8)
def hadamard(order: int) -> Tensor:
    """Sylvester's construction: (order, order) of signs, with orthogonal rows."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
