"""All three layers of the MLP in one kernel: a member's activations never leave the chip.

What is left outside is done once per batch or once per pair: the first layer's base product, by
torch, and its u, by `project_shared`. A program then takes a tile of one pair's examples from the
first layer's outputs to the logits.

Letters: P members, N antithetic pairs, B examples, M = 2 B, R rank; H1/H2 hidden, C outputs.
"""

# ruff: noqa: N803 - what a kernel is compiled for is upper case, as is Triton's custom

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from eggroll.kernels import tiles
from eggroll.kernels.dot import dot
from eggroll.kernels.hidden import gelu, load_u, low_rank_term
from eggroll.kernels.philox import _B, normal_row
from eggroll.kernels.project import project_shared
from eggroll.model import MLP

MAX_HIDDEN = 256  # of the second hidden layer: a program holds all its outputs in registers
MAX_OUTPUTS = 64


@triton.jit
def add_projection(
    key_ptr,  # int64 (2,): seed, step
    u,  # (ROWS, RANK_PAD)
    x,  # (ROWS, COLUMNS), float32
    layer,
    pair,
    first,  # first input
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    dtype: tl.constexpr,
):
    """u + x b^T over the inputs first .. first + COLUMNS: `project` on what is in registers."""
    for r in range(RANK):
        b = normal_row(key_ptr, layer, _B, pair, r, first, COLUMNS, dtype).to(tl.float32)
        column = tl.sum(x * b[None, :], 1)
        u += tl.where((tl.arange(0, RANK_PAD) == r)[None, :], column[:, None], 0.0)
    return u


@triton.jit
def load_bias(bias_ptr, columns, features):
    return tl.load(bias_ptr + columns, columns < features, 0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["start"])
def mlp_kernel(
    key_ptr,  # int64 (2,): seed, step
    sigma_ptr,  # float32 ()
    base_ptr,  # (B, H1): x W1^T
    u_ptr,  # (N, R, B)
    weight2_ptr,  # (H2, H1)
    weight3_ptr,  # (C, H2)
    bias1_ptr,  # (H1,) or None
    bias2_ptr,  # (H2,) or None
    bias3_ptr,  # (C,) or None
    logits_ptr,  # (N, M, C)
    start,
    examples,  # B
    hidden1,
    hidden2,
    outputs,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    HIDDEN2: tl.constexpr,  # hidden2 and outputs, padded to what tl.dot takes
    OUTPUTS: tl.constexpr,
):
    tiles_down = tl.cdiv(2 * examples, ROWS)
    pair = tl.program_id(0) // tiles_down
    rows = tl.program_id(0) % tiles_down * ROWS + tl.arange(0, ROWS)  # of M
    inside = rows < 2 * examples
    sign = tl.where(rows < examples, 1.0, -1.0)[:, None]
    example = rows % examples
    dtype: tl.constexpr = logits_ptr.dtype.element_ty

    # the first layer's outputs, DEPTH at a time, go straight into the second layer's product
    u1 = load_u(u_ptr, pair, example, examples, RANK, RANK_PAD)
    u2 = tl.zeros((ROWS, RANK_PAD), tl.float32)
    total = tl.zeros((ROWS, HIDDEN2), tl.float32)
    columns2 = tl.arange(0, HIDDEN2)
    for first in range(0, hidden1, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        mask = inside[:, None] & (depth < hidden1)[None, :]
        h = tl.load(base_ptr + example[:, None] * hidden1 + depth[None, :], mask, 0.0)
        h = h.to(tl.float32)
        if bias1_ptr is not None:
            h += load_bias(bias1_ptr, depth, hidden1)
        h += sign * low_rank_term(
            key_ptr,
            sigma_ptr,
            u1,
            0,
            start + pair,
            first,
            RANK,
            RANK_PAD,
            ROWS,
            DEPTH,
            bias1_ptr is not None,
            dtype,
        )
        h = tl.where(mask, gelu(h), 0.0).to(dtype)
        u2 = add_projection(
            key_ptr, u2, h.to(tl.float32), 1, start + pair, first, RANK, RANK_PAD, DEPTH, dtype
        )
        w_mask = (depth < hidden1)[:, None] & (columns2 < hidden2)[None, :]
        w = tl.load(weight2_ptr + columns2[None, :] * hidden1 + depth[:, None], w_mask, 0.0)
        total = dot(h, w, total)

    # the second layer's outputs, all of them
    if bias2_ptr is not None:
        total += load_bias(bias2_ptr, columns2, hidden2)
    total += sign * low_rank_term(
        key_ptr,
        sigma_ptr,
        u2,
        1,
        start + pair,
        0,
        RANK,
        RANK_PAD,
        ROWS,
        HIDDEN2,
        bias2_ptr is not None,
        dtype,
    )
    h2 = tl.where((columns2 < hidden2)[None, :], gelu(total), 0.0).to(dtype)

    # the head, transposed: its few outputs are then the rows of the product, and each warp holds
    # its own examples' activations instead of a copy of all
    columns3 = tl.arange(0, OUTPUTS)
    w_mask = (columns3 < outputs)[:, None] & (columns2 < hidden2)[None, :]
    w = tl.load(weight3_ptr + columns3[:, None] * hidden2 + columns2[None, :], w_mask, 0.0)
    logits = tl.trans(dot(w, tl.trans(h2), tl.zeros((OUTPUTS, ROWS), tl.float32)))
    u3 = add_projection(
        key_ptr,
        tl.zeros((ROWS, RANK_PAD), tl.float32),
        h2.to(tl.float32),
        2,
        start + pair,
        0,
        RANK,
        RANK_PAD,
        HIDDEN2,
        dtype,
    )
    if bias3_ptr is not None:
        logits += load_bias(bias3_ptr, columns3, outputs)
    logits += sign * low_rank_term(
        key_ptr,
        sigma_ptr,
        u3,
        2,
        start + pair,
        0,
        RANK,
        RANK_PAD,
        ROWS,
        OUTPUTS,
        bias3_ptr is not None,
        dtype,
    )
    mask = inside[:, None] & (columns3 < outputs)[None, :]
    offsets = rows[:, None] * outputs + columns3[None, :]
    logits_ptr += pair.to(tl.int64) * 2 * examples * outputs
    tl.store(logits_ptr + offsets, logits.to(dtype), mask)


def fits(network: MLP) -> bool:
    """Whether one kernel holds this network: three layers, GELU, at most 256 in the second."""
    return (
        len(network.layers) == 3
        and network.activation is F.gelu
        and network.layers[1].out_features <= MAX_HIDDEN
        and network.layers[2].out_features <= MAX_OUTPUTS
    )


def mlp(
    network: MLP,
    inputs: Tensor,  # (B, I)
    *,
    key: Tensor,  # int64 (2,): seed, step
    start: int,
    stop: int,
    rank: int,
    sigma: Tensor,  # float32 ()
) -> Tensor:
    """Logits (P, B, C) of the members of pairs start..stop."""
    layer1, layer2, layer3 = network.layers
    inputs = inputs.contiguous()
    base = inputs @ layer1.weight.T
    u = project_shared(inputs, key=key, layer_index=0, start=start, stop=stop, rank=rank)
    examples, pairs, outputs = len(inputs), stop - start, layer3.out_features
    logits = base.new_empty(2 * pairs, examples, outputs)
    tile = tiles.MLP[inputs.dtype]
    mlp_kernel[(pairs * triton.cdiv(2 * examples, tile.rows),)](
        key,
        sigma,
        base,
        u,
        layer2.weight,
        layer3.weight,
        layer1.bias,
        layer2.bias,
        layer3.bias,
        logits,
        start,
        examples,
        layer1.out_features,
        layer2.out_features,
        outputs,
        RANK=rank,
        RANK_PAD=triton.next_power_of_2(rank),
        ROWS=tile.rows,
        DEPTH=tile.depth,
        HIDDEN2=max(16, triton.next_power_of_2(layer2.out_features)),
        OUTPUTS=max(16, triton.next_power_of_2(outputs)),
        **tile.options,
    )
    return logits
