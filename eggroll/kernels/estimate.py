"""The estimate of a layer: every pair's noise drawn once more, weighed and added up.

    dW = sum_k w_k a_k^T b_k / sqrt(R),    db = sum_k w_k bias_k

One product over all (pair, rank), neither of whose factors is ever stored. The sum is split among
programs by its size alone and their parts are added in order, without atomics: the same scores
give the same bits.

Letters: N antithetic pairs, R rank, O/I a layer's outputs/inputs; S parts of the sum.
"""

# ruff: noqa: N803 - what a kernel is compiled for is upper case, as is Triton's custom

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from eggroll.kernels import tiles
from eggroll.kernels.check import KernelError, check_key, check_layer
from eggroll.kernels.dot import dot
from eggroll.kernels.philox import _A, _B, _BIAS, normal_tile


@triton.jit(do_not_specialize=["layer", "n_rows", "part_rows"])
def estimate_kernel(
    key_ptr,  # int64 (2,): seed, step
    weights_ptr,  # float32 (N,)
    parts_ptr,  # float32 (S, O, I)
    layer,
    n_rows,  # N * R
    part_rows,  # rows of a part, a multiple of DEPTH
    out_features,
    in_features,
    dtype: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    first_out, first_in = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    part = tl.program_id(2)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(part * part_rows, tl.minimum((part + 1) * part_rows, n_rows), DEPTH):
        rows = first + tl.arange(0, DEPTH)
        # pairs beyond the last are drawn too, and weigh nothing
        share = tl.load(weights_ptr + rows // RANK, rows < n_rows, 0.0) * (RANK**-0.5)
        a = normal_tile(key_ptr, layer, _A, rows, first_out, RANK, DEPTH, ROWS, dtype)
        b = normal_tile(key_ptr, layer, _B, rows, first_in, RANK, DEPTH, COLUMNS, dtype)
        weighed = (a.to(tl.float32) * share[:, None]).to(dtype)
        total = dot(tl.trans(weighed), b, total)
    outs, ins = first_out + tl.arange(0, ROWS), first_in + tl.arange(0, COLUMNS)
    mask = (outs < out_features)[:, None] & (ins < in_features)[None, :]
    parts_ptr += part.to(tl.int64) * out_features * in_features
    tl.store(parts_ptr + outs[:, None] * in_features + ins[None, :], total, mask)


@triton.jit(do_not_specialize=["layer", "pairs", "part_rows"])
def estimate_bias_kernel(
    key_ptr,  # int64 (2,): seed, step
    weights_ptr,  # float32 (N,)
    parts_ptr,  # float32 (S, O)
    layer,
    pairs,
    part_rows,  # pairs of a part, a multiple of DEPTH
    out_features,
    dtype: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    first_out, part = tl.program_id(0) * COLUMNS, tl.program_id(1)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(part * part_rows, tl.minimum((part + 1) * part_rows, pairs), DEPTH):
        rows = first + tl.arange(0, DEPTH)
        share = tl.load(weights_ptr + rows, rows < pairs, 0.0)
        noise = normal_tile(key_ptr, layer, _BIAS, rows, first_out, 1, DEPTH, COLUMNS, dtype)
        total += tl.sum(noise.to(tl.float32) * share[:, None], 0)
    outs = first_out + tl.arange(0, COLUMNS)
    tl.store(parts_ptr + part * out_features + outs, total, outs < out_features)


def estimate_layer(
    layer: nn.Linear,
    *,
    key: Tensor,  # int64 (2,): seed, step
    layer_index: int,
    pairs: int,
    rank: int,
    weights: Tensor,  # float32 (N,)
) -> tuple[Tensor, Tensor | None]:
    """Estimated ascent direction of one layer: weight (O, I) and bias (O,) or None.

    As `eggroll.estimator.estimate_layer`, from keys alone. Summed in float32, in the weights'
    dtype at the end. Raises KernelError where there is not one weight for each pair.
    """
    check_layer(layer)
    check_key(key)
    if weights.shape != (pairs,):
        raise KernelError(f"weights of shape {tuple(weights.shape)} for {pairs} pairs")
    weights = weights.float().contiguous()
    weight = _estimate_weight(layer.weight, key, layer_index, rank, weights)
    if layer.bias is None:
        return weight, None
    return weight, _estimate_bias(layer.bias, key, layer_index, weights)


def _estimate_weight(
    weight: Tensor, key: Tensor, layer_index: int, rank: int, weights: Tensor
) -> Tensor:
    out_features, in_features = weight.shape
    tile, n_rows = tiles.ESTIMATE[weight.dtype], len(weights) * rank
    across = triton.cdiv(out_features, tile.rows), triton.cdiv(in_features, tile.columns)
    parts, part_rows = split(n_rows, tile.depth, across[0] * across[1])
    sums = torch.empty(parts, out_features, in_features, device=weight.device)
    estimate_kernel[(*across, parts)](
        key,
        weights,
        sums,
        layer_index,
        n_rows,
        part_rows,
        out_features,
        in_features,
        dtype=tiles.TRITON[weight.dtype],
        RANK=rank,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        **tile.options,
    )
    return sums.sum(0).to(weight.dtype)


def _estimate_bias(bias: Tensor, key: Tensor, layer_index: int, weights: Tensor) -> Tensor:
    (out_features,), pairs, tile = bias.shape, len(weights), tiles.ESTIMATE_BIAS
    across = triton.cdiv(out_features, tile.columns)
    parts, part_rows = split(pairs, tile.depth, across)
    sums = torch.empty(parts, out_features, device=bias.device)
    estimate_bias_kernel[(across, parts)](
        key,
        weights,
        sums,
        layer_index,
        pairs,
        part_rows,
        out_features,
        dtype=tiles.TRITON[bias.dtype],
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        **tile.options,
    )
    return sums.sum(0).to(bias.dtype)


def split(rows: int, depth: int, across: int) -> tuple[int, int]:
    """Parts of a sum over `rows`, and rows of each: whole tiles, decided by sizes alone."""
    steps = triton.cdiv(rows, depth)
    parts = max(1, min(steps, tiles.ESTIMATE_PROGRAMS // across))
    part_steps = triton.cdiv(steps, parts)
    return triton.cdiv(steps, part_steps), part_steps * depth
