"""Two ways to read the fitness of members that perturb one layer each.

Per-example credit has a slope for each example, and the paper's estimator one for each member: how
much the mean fitness over all that it saw changed per sigma.

Letters: M directions, R rank, B examples, E rows, one or more of each example, O/I a
layer's outputs/inputs, G groups of examples: example e belongs to group e modulo G.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.estimator import pair_weights
from eggroll.projections import Projections


def example_credit(
    slopes: Tensor,  # (M, B), change of each example's fitness per sigma
    a: Tensor,  # (G, M, R, O)
    projections: Projections,
    rows: Tensor,  # (E, I)
) -> Tensor:
    """Ascent direction of the mean fitness over the examples, (O, I): per-example credit.

    A member changed the fitness of example e by about slope = u_e / sqrt(R) * (A . g_e), with g_e
    the derivative of its fitness in its pre-activations, which nobody computes. So the mean over
    members of slope * u_e * A, over the mean of u_e^2, is g_e on average, and the layer's gradient
    is the mean over examples of g_e h_e^T. The noise is that of O numbers for each example, where
    the paper's estimator has that of all of the layer's weights.
    Exact where an example is one row, or its rows have independent projections (whitened, and not
    more rows than inputs); rows that no B can tell apart share their credit.
    Kin: weight perturbation read as node perturbation; activity-perturbed forward gradients, Ren
    et al. 2022, arXiv 2210.03310.
    """
    members, rank, _ = projections.u.shape
    examples = slopes.shape[1]
    weights = _at_rows(slopes, rows)[:, None, :] * projections.u  # (M, R, E)
    # a row that no member moves has no credit, and no say in the product with it either
    scale = torch.where(projections.moment > 0, 1 / projections.moment, 0.0)
    scale = scale / (members * rank**0.5)
    credit = _weighed_directions(weights.flatten(0, 1), a.flatten(1, 2), examples) * scale[:, None]
    return credit.T @ (rows / examples)


def _at_rows(slopes: Tensor, rows: Tensor) -> Tensor:
    """(M, B) to (M, E): all rows of an example have its slope."""
    return slopes.repeat_interleave(len(rows) // slopes.shape[1], dim=1)


def _weighed_directions(weights: Tensor, a: Tensor, examples: int) -> Tensor:
    """The sum over k of weights[k, e] * a[group of e, k], (E, O), for (K, E) and (G, K, O).

    One product for each group, for which the rows of its examples are brought together.
    """
    groups = len(a)
    missing = -examples % groups  # examples that would make the groups equal
    whole = F.pad(weights.unflatten(1, (examples, -1)), (0, 0, 0, missing))
    by_group = whole.unflatten(1, (-1, groups)).permute(2, 1, 3, 0)  # (G, B / G, positions, K)
    credit = torch.bmm(by_group.flatten(1, 2), a).unflatten(1, by_group.shape[1:3])
    return credit.transpose(0, 1).flatten(0, 2)[: weights.shape[1]]


def materialised_credit(
    slopes: Tensor,
    a: Tensor,
    projections: Projections,
    rows: Tensor,
) -> Tensor:
    """The plain twin of `example_credit`: one example, member and rank after the other."""
    members, rank = projections.u.shape[:2]
    examples = slopes.shape[1]
    total = rows.new_zeros(a.shape[-1], rows.shape[1])
    for e in range(len(rows)):
        example = e * examples // len(rows)
        if projections.moment[e] == 0:
            continue
        for i in range(members):
            for r in range(rank):
                share = slopes[i, example] * projections.u[i, r, e] / projections.moment[e]
                total += (
                    share / (members * rank**0.5) * torch.outer(a[example % len(a), i, r], rows[e])
                )
    return total / examples


def member_slopes(
    scores: list[tuple[Tensor, Tensor]],  # of each layer's members, plus and minus, (M, G) each
    shaping: str,
    sigma: float,
) -> list[Tensor]:
    """What the paper's estimator weighs each perturbation by, (M, G) for each layer.

    (s+ - s-) / 2 for shaped scores s, over sigma where they are not shaped. Scores of all layers
    are shaped together, so that layers keep their proportions: shaped one by one, each would have
    an estimate of the same size. What the members of a layer and group have in common is taken
    off first: that its examples are easy is no merit of theirs.
    """
    pairs = [torch.stack(both, dim=-1) for both in scores]  # (M, G, 2)
    centred = torch.cat([(p - p.mean((0, 2), keepdim=True)).flatten() for p in pairs])
    weights = pair_weights(centred, shaping, sigma) * (len(centred) / 2)
    sizes = [p.shape[:2].numel() for p in pairs]
    return [w.view(p.shape[:2]) for w, p in zip(weights.split(sizes), pairs, strict=True)]


def member_credit(
    slopes: Tensor,  # (M, G), change of the mean fitness of what a member saw, per sigma
    a: Tensor,  # (G, M, R, O)
    projections: Projections,
    rows: Tensor,  # (E, I)
    examples: int,
) -> Tensor:
    """Ascent direction of the mean fitness, (O, I), from one score per member: the paper's.

    The mean over members of slope * A B^T / sqrt(R), and over groups by their size. Where B is
    not formed, it is known by what it does to its group's rows: this is then `example_credit` with
    one slope for all of them, which also divides by the covariance of what was drawn, as the
    search gradient of a Gaussian that is not isotropic does (Wierstra et al. 2014, arXiv
    1106.4487).
    """
    groups, members, rank, _ = a.shape
    group = torch.arange(examples, device=slopes.device) % groups
    slopes = slopes * group.bincount(minlength=groups)
    if projections.b is None:
        return example_credit(slopes[:, group], a, projections, rows)
    weighed = torch.einsum("mg,gmro->mro", slopes, a).flatten(0, 1)
    return weighed.T @ projections.b.flatten(0, 1) / (members * examples * rank**0.5)
