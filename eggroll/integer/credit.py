"""Two ways to read integer fitness differences; both give int32 estimates of the same unit.

Letters: M members, B examples, O/I a layer's outputs/inputs, G groups of examples.
"""

import torch
from torch import Tensor

from eggroll.integer.arithmetic import MOST, WIDE_MOST, int_matmul, rounded_division, wide_matmul
from eggroll.integer.network import FINE, ONE

# An estimate is the gradient (per real weight, of the fitness's sum over the batch, in its own
# units) times ONE 2^CREDIT. 2^-12 is a small part of one example's share of a gradient, and
# WIDE_MOST, about 4, is more than it ever is but for noise
CREDIT = 12


def weighed_signs(weights: Tensor, a: Tensor, group: Tensor) -> Tensor:
    """The sum over m of weights[m, b] * a[group[b], m], (B, O) int32, for (M, B) and (G, M, O)."""
    return (weights.unsqueeze(-1) * a[group].transpose(0, 1)).sum(0, dtype=torch.int32)


def credit_by_example(
    u: Tensor,  # (M, B) int32: rows B^T
    credit: Tensor,  # (B, O) int32: the sum over members of difference * sign(u) * A
    rows: Tensor,  # (B, I) int8
    shift: int,
) -> Tensor:
    """The estimate (O, I) of per-example credit, for members with sigma = 2^-shift.

    A member moved example b by sigma u A, so on average difference * sign(u) * A is the derivative
    of b's fitness in its pre-activations times sigma |u|, and the sum over members over sigma times
    the sum of |u| is that derivative. The sign in place of u (which eggroll.credit has) keeps a
    large u, which a product of integers cannot whiten, from counting twice.
    """
    size = u.abs().sum(0, dtype=torch.int64).clamp(min=1).unsqueeze(-1)
    bits = (ONE.bit_length() - 1) + shift + CREDIT - FINE
    slopes = rounded_division(credit.long() << bits, size).clamp(-WIDE_MOST, WIDE_MOST)
    return wide_matmul(slopes.int().t().contiguous(), rows)


def votes_of_members(
    difference: Tensor,  # (M, B) int32
    a: Tensor,  # (G, M, O) int8
    b: Tensor,  # (M, I) int8
    group: Tensor,  # (B,)
) -> Tensor:
    """The paper's votes as an estimate (O, I): the mean over members of sign(f) A B^T.

    f is one score per member: the sum of its fitness over all that its group sees, less that of
    the unperturbed network. Scaled as if the votes were a gradient of the mean over the batch.
    """
    scores = difference.new_zeros(len(difference), len(a), dtype=torch.int64)
    scores.index_add_(1, group, difference.long())
    ballots = (scores.sign().t().unsqueeze(-1) * a).sum(0)  # (M, O), at most G in size
    votes = int_matmul(ballots.clamp(-MOST, MOST).to(torch.int8).t().contiguous(), b)
    return rounded_division(votes.long() * (len(group) * ONE << CREDIT), scores.numel()).int()
