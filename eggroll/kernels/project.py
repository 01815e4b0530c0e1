"""x b^T for every pair, with b drawn inside: each pair's reading of a layer's input.

Letters: N antithetic pairs, B examples, M = 2 B examples of both signs, R rank, I inputs.
"""

# ruff: noqa: N803 - what a kernel is compiled for is upper case, as is Triton's custom

import torch
import triton
import triton.language as tl
from torch import Tensor

from eggroll.kernels import tiles
from eggroll.kernels.dot import dot
from eggroll.kernels.philox import _B, normal_row, normal_tile


@triton.jit(do_not_specialize=["layer", "start", "n_rows"])
def project_shared_kernel(
    key_ptr,  # int64 (2,): seed, step
    x_ptr,  # (B, I)
    u_ptr,  # (N, R, B)
    layer,
    start,
    n_rows,  # N * R
    examples,
    features,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, features, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        # features beyond the last are drawn too, and meet an input of 0
        b = normal_tile(key_ptr, layer, _B, start * RANK + rows, first, RANK, ROWS, DEPTH, dtype)
        mask = (depth < features)[:, None] & (columns < examples)[None, :]
        x = tl.load(x_ptr + columns[None, :] * features + depth[:, None], mask, 0.0)
        total = dot(b, x, total)
    mask = (rows < n_rows)[:, None] & (columns < examples)[None, :]
    tl.store(u_ptr + rows.to(tl.int64)[:, None] * examples + columns[None, :], total, mask)


@triton.jit(do_not_specialize=["layer", "start"])
def project_own_kernel(
    key_ptr,  # int64 (2,): seed, step
    x_ptr,  # (N, M, I)
    u_ptr,  # (N, R, M)
    layer,
    start,
    examples,  # M
    features,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program for each pair, rank and tile of examples; rank 1 reads x once."""
    row = tl.program_id(0)
    pair, r = row // RANK, row % RANK
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_ptr += pair.to(tl.int64) * examples * features
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, features, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        b = normal_row(key_ptr, layer, _B, start + pair, r, first, DEPTH, dtype).to(tl.float32)
        mask = (rows < examples)[:, None] & (depth < features)[None, :]
        x = tl.load(x_ptr + rows[:, None] * features + depth[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(x * b[None, :], 1)
    tl.store(u_ptr + row.to(tl.int64) * examples + rows, total, rows < examples)


def project_shared(
    x: Tensor,  # (B, I)
    *,
    key: Tensor,  # int64 (2,): seed, step
    layer_index: int,
    start: int,
    stop: int,
    rank: int,
) -> Tensor:
    """u, (N, R, B) in float32, of an input that all members share."""
    examples, features = x.shape
    u = torch.empty(stop - start, rank, examples, device=x.device)
    tile = tiles.PROJECT_SHARED[x.dtype]
    n_rows = (stop - start) * rank
    project_shared_kernel[(triton.cdiv(n_rows, tile.rows), triton.cdiv(examples, tile.columns))](
        key,
        x,
        u,
        layer_index,
        start,
        n_rows,
        examples,
        features,
        RANK=rank,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        **tile.options,
    )
    return u


def project_own(
    x: Tensor,  # (N, M, I)
    *,
    key: Tensor,  # int64 (2,): seed, step
    layer_index: int,
    start: int,
    rank: int,
) -> Tensor:
    """u, (N, R, M) in float32, of an input that each member has for itself."""
    pairs, examples, features = x.shape
    u = torch.empty(pairs, rank, examples, device=x.device)
    tile = tiles.PROJECT_OWN
    project_own_kernel[(pairs * rank, triton.cdiv(examples, tile.rows))](
        key,
        x,
        u,
        layer_index,
        start,
        examples,
        features,
        RANK=rank,
        ROWS=tile.rows,
        DEPTH=tile.depth,
        **tile.options,
    )
    return u
