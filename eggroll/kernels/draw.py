"""A layer's noise, written out: for tests, figures and single members, never for training.

Letters: N antithetic pairs, R rank; F features, O or I.
"""

# ruff: noqa: N803 - what a kernel is compiled for is upper case, as is Triton's custom

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from eggroll.kernels import tiles
from eggroll.kernels.check import check_key, check_layer
from eggroll.kernels.philox import FACTOR_A, FACTOR_B, FACTOR_BIAS, normal_tile
from eggroll.noise import LayerNoise


@triton.jit(do_not_specialize=["layer", "start", "n_rows"])
def draw_kernel(
    key_ptr,  # int64 (2,): seed, step
    out_ptr,  # (N, R, F)
    layer,
    start,
    n_rows,  # N * R
    features,
    FACTOR: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    numbers = normal_tile(
        key_ptr, layer, FACTOR, start * RANK + rows, first, RANK, ROWS, COLUMNS, dtype
    )
    mask = (rows < n_rows)[:, None] & (columns < features)[None, :]
    offsets = rows.to(tl.int64)[:, None] * features + columns[None, :]
    tl.store(out_ptr + offsets, numbers, mask)


def draw_layer(
    layer: nn.Linear,
    rank: int,
    *,
    key: Tensor,  # int64 (2,): seed, step
    layer_index: int,
    start: int,
    stop: int,
) -> LayerNoise:
    """The noise of pairs start..stop, float32 normals rounded to the layer's dtype."""
    check_layer(layer)
    check_key(key)
    pairs, weight, tile = stop - start, layer.weight, tiles.DRAW

    def normal(factor: int, rank: int, features: int) -> Tensor:
        out = torch.empty(pairs, rank, features, device=weight.device, dtype=weight.dtype)
        grid = (triton.cdiv(pairs * rank, tile.rows), triton.cdiv(features, tile.columns))
        draw_kernel[grid](
            key,
            out,
            layer_index,
            start,
            pairs * rank,
            features,
            FACTOR=factor,
            RANK=rank,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            **tile.options,
        )
        return out

    out_features, in_features = weight.shape
    bias = normal(FACTOR_BIAS, 1, out_features)[:, 0] if layer.bias is not None else None
    return LayerNoise(
        normal(FACTOR_A, rank, out_features), normal(FACTOR_B, rank, in_features), bias
    )
