"""The B of a low-rank perturbation, seen through what it does: u = h . B, one number per row.

A member moves the pre-activations of row h_e by sigma / sqrt(R) * u_e A. B matters to it through
these projections alone, so B need not be formed where u can be chosen. A row is what a layer
reads: an example, or one position of it. Layers with a bias see rows with a 1 appended, so that
the bias is one more column of the weight matrix.

Letters: M members, R rank, E rows of a batch, I a layer's inputs, G groups of examples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eggroll.directions import random_signs

SAMPLINGS = ("gaussian", "batch-subspace", "whitened", "activations")

# The smallest pivot of the rows' correlation matrix that still counts as independent: rows that
# are closer than this to the span of the others are treated as lying in it.
INDEPENDENT = 1e-3


@dataclass(frozen=True)
class Projections:
    """What B does to the rows of one batch, for M members."""

    u: Tensor  # (M, R, E)
    moment: Tensor  # (E,), the mean of u^2 over draws
    b: Tensor | None = None  # (M, R, I); None where it is not formed

    def __len__(self) -> int:
        return len(self.u)


def draw_projections(
    kind: str,
    rows: Tensor,  # (E, I)
    group: Tensor,  # (E,), which group of examples a row belongs to
    members: int,
    rank: int,
    generator: torch.Generator,
) -> Projections:
    """B for every member, through the rows that will meet it.

    gaussian        B ~ N(0, 1), as the paper has it
    batch-subspace  B ~ N(0, 1) in the span of the batch's rows, where the layer's gradient lies.
                    Cf. guided ES, arXiv 1806.10230, and ASEBO, arXiv 1903.04268
    whitened        in that span, and so that u_e = +-s with independent signs: constant size, where
                    a Gaussian has a heavy tail. s^2 is the mean of |h_e|^2, which is also what the
                    other kinds have, so sigma means the same. Each group has a B of its own
    activations     u_e = +-s whatever the rows are: node perturbation, and not EGGROLL, since no B
                    need be able to make it. The same as whitened where the rows are independent
    Raises ValueError for another kind.
    """
    if kind == "gaussian":
        b = rows.new_empty(members, rank, rows.shape[1]).normal_(generator=generator)
        return _with_b(b, rows)
    if kind == "batch-subspace":
        basis = batch_basis(rows)
        z = rows.new_empty(members, rank, basis.shape[1]).normal_(generator=generator)
        return _with_b(z @ basis.T, rows)
    signs = random_signs((members, rank, len(rows)), rows, generator)
    size = rows.square().sum(1).mean().sqrt()
    if kind == "activations" or (kind == "whitened" and _independent(rows, group)):
        return Projections(signs * size, size.square().expand(len(rows)))
    if kind == "whitened":
        projector = _projector(rows, group)
        return Projections(signs @ projector * size, projector.diagonal() * size.square())
    raise ValueError(f"sampling {kind!r} is not known (try {', '.join(SAMPLINGS)})")


def batch_basis(rows: Tensor) -> Tensor:
    """Orthonormal columns, (I, min(E, I)), whose span holds every row.

    From a QR decomposition, which needs no decision about the rank: of rows that depend on each
    other it completes the basis with arbitrary directions.
    """
    return torch.linalg.qr(rows.T).Q


def _with_b(b: Tensor, rows: Tensor) -> Projections:
    u = (b.flatten(0, 1) @ rows.T).unflatten(0, b.shape[:2])
    return Projections(u, rows.square().sum(1), b)


def _independent(rows: Tensor, group: Tensor) -> bool:
    """Whether some B makes any u: no row lies in the span of the others of its group."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)
    pivots, failed = torch.linalg.cholesky_ex(_products(unit, group))
    return not failed and bool(pivots.diagonal().min() > INDEPENDENT)


def _projector(rows: Tensor, group: Tensor) -> Tensor:
    """Onto what some B can make of the rows of each group, (E, E)."""
    values, vectors = torch.linalg.eigh(_products(rows, group))
    kept = vectors[:, values > INDEPENDENT**2 * values.max()]
    return kept @ kept.T


def _products(rows: Tensor, group: Tensor) -> Tensor:
    """Inner products of the rows of each group, (E, E); rows of different groups have none."""
    return (rows @ rows.T) * (group[:, None] == group)
