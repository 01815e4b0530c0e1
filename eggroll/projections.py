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
WITH_B = ("gaussian", "batch-subspace")  # those that form a B

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
    whitened        in that span, and so that u_e = +-|h_e| with independent signs: constant size
                    where a Gaussian has a heavy tail. Each group of examples has a B of its own
    activations     u_e = +-1 whatever the rows are: node perturbation, and not EGGROLL, since no B
                    need be able to make it. What whitened sampling is measured against
    Raises ValueError for another kind.
    """
    if kind == "gaussian":
        b = rows.new_empty(members, rank, rows.shape[1]).normal_(generator=generator)
        return _with_b(b, rows)
    if kind == "batch-subspace":
        basis = batch_basis(rows)
        z = rows.new_empty(members, rank, basis.shape[1]).normal_(generator=generator)
        return _with_b(z @ basis.T, rows)
    if kind == "whitened":
        return _whitened(rows, group, members, rank, generator)
    if kind == "activations":
        signs = random_signs((members, rank, len(rows)), rows, generator)
        return Projections(signs, rows.new_ones(len(rows)))
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


def _whitened(
    rows: Tensor, group: Tensor, members: int, rank: int, generator: torch.Generator
) -> Projections:
    """Independent signs, times the rows' norms, where the rows of each group are independent.

    B = pinv(rows) @ u then exists and is not needed. Else, with duplicate or blank examples or
    more rows than inputs, the signs are projected onto what a B can do.
    """
    norms = torch.linalg.vector_norm(rows, dim=1)
    signs = random_signs((members, rank, len(rows)), rows, generator)
    unit = rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)[:, None]
    correlation = (unit @ unit.T) * (group[:, None] == group)
    pivots, failed = torch.linalg.cholesky_ex(correlation)
    if not failed and pivots.diagonal().min() > INDEPENDENT:
        return Projections(signs * norms, norms.square())
    projector = _projector(correlation)
    return Projections((signs @ projector) * norms, projector.diagonal() * norms.square())


def _projector(correlation: Tensor) -> Tensor:
    """Onto the range of a symmetric matrix, (E, E)."""
    values, vectors = torch.linalg.eigh(correlation)
    kept = vectors[:, values > INDEPENDENT**2 * values.max()]
    return kept @ kept.T
