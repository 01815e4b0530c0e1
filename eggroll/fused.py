"""Three layers of batch members in one Triton kernel: activations never leave the chip.

What is done outside of it, by torch: the noise (drawn by BatchMembers), the first layer's
unperturbed product (once a batch), and what the first layer's factors B read of the inputs, u. A
program then takes a tile of one antithetic pair's examples from the first layer to the outputs.

Shapes: N pairs, P = 2 N members, B examples, R rank, H1/H2 hidden, C outputs.
"""

# ruff: noqa: N803 - what a kernel is compiled for is upper case, as is Triton's custom
from __future__ import annotations  # the kernels' name Triton, which may not be there

import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.compiled import BackendError
from eggroll.members import GPU_BLOCK, BatchMembers, ExampleMembers
from eggroll.model import MLP

try:
    import triton
    import triton.language as tl
except ImportError:  # some platforms have none; `fits` is of use there too
    triton = None

MAX_HIDDEN = 256  # of the second hidden layer: a program holds all its outputs in registers
MAX_OUTPUTS = 64
MAX_RANK = 64  # all ranks of a tile enter one product, and lie in shared memory


class Tile(NamedTuple):
    """Sizes of one program; fixed, so that no number hangs on a tuner's timing."""

    rows: int  # examples of one pair, both signs
    depth: int  # outputs of the first layer that are held at a time
    warps: int
    stages: int  # steps along the first layer's outputs whose loads are in flight


# A program holds 256 outputs of the second layer for each row: these are the sizes that stay in
# registers (float32 splits what it multiplies into TF32 numbers, and has room for fewer). Shared
# memory stays below 99 KB, the least that a card with bfloat16 offers to a program.
TILES = {
    torch.bfloat16: Tile(rows=64, depth=32, warps=8, stages=2),
    torch.float32: Tile(rows=32, depth=16, warps=8, stages=2),
}


def fits(network: torch.nn.Module, members: BatchMembers | ExampleMembers) -> bool:
    """Whether the kernel evaluates these members of this network.

    The network is an MLP with GELU in one of TILES' dtypes, all of it evolving, with at most
    MAX_HIDDEN units in its second hidden layer; the members are antithetic BatchMembers that
    perturb all layers. Says nothing of whether Triton is installed.
    """
    if type(network) is not MLP or network.activation is not F.gelu or len(network.layers) != 3:
        return False
    dtypes = {parameter.dtype for parameter in network.parameters()}
    return (
        isinstance(members, BatchMembers)
        and members.antithetic
        and members.perturb == "all"
        and network.layers[1].out_features <= MAX_HIDDEN
        and network.layers[2].out_features <= MAX_OUTPUTS
        and members.rank <= MAX_RANK
        and all(parameter.requires_grad for parameter in network.parameters())
        and len(dtypes) == 1
        and dtypes <= set(TILES)
    )


@torch.no_grad()
def mlp_forward(
    network: MLP,
    noise: dict[str, Tensor],  # of N pairs, as BatchMembers.draw returns it
    product: Tensor,  # (1, B, H1): the first layer's, unperturbed, with its bias
    inputs: Tensor,  # (B, I)
) -> Tensor:
    """Outputs (P, B, C); members 2k and 2k + 1 are the signs + and - of pair k.

    For what `fits`. Raises BackendError where Triton is not installed.
    """
    if triton is None:
        raise BackendError("backend fused needs Triton (pip install triton, or try compile)")
    _, layer2, layer3 = network.layers
    pairs, rank, hidden1 = noise["a0"].shape
    examples, outputs = len(inputs), layer3.out_features
    tile = TILES[product.dtype]
    found = product.new_empty(2 * pairs, examples, outputs)
    b2, b3 = noise["b1"].flatten(0, 1), noise["b2"].flatten(0, 1)  # views into what was drawn
    mlp_kernel[(pairs * triton.cdiv(2 * examples, tile.rows),)](
        product.contiguous(),
        _first_u(noise["b0"], inputs),
        layer2.weight,
        layer3.weight,
        layer2.bias,
        layer3.bias,
        *(noise[f"a{i}"].contiguous() for i in range(3)),
        b2,
        b3,
        *(noise.get(f"e{i}") for i in range(3)),
        found,
        b2.stride(0),
        b3.stride(0),
        examples,
        hidden1,
        layer2.out_features,
        outputs,
        RANK=rank,
        RANK_PAD=_padded(rank),
        ROWS=tile.rows,
        DEPTH=tile.depth,
        HIDDEN2=_padded(layer2.out_features),
        OUTPUTS=_padded(outputs),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return found


def _first_u(b: Tensor, inputs: Tensor) -> Tensor:
    """x b^T of the first layer, (N, R, B). One product for each block, whatever the chunk: a
    product's rounding may depend on its shape."""
    u = [block.flatten(0, 1) @ inputs.T for block in b.split(GPU_BLOCK // 2)]
    return (u[0] if len(u) == 1 else torch.cat(u)).view(*b.shape[:2], -1)


def _padded(size: int) -> int:
    """What tl.dot takes: a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(size))


def _jit(function):
    return function if triton is None else triton.jit(function)


if triton is not None:
    # the interpreter's numpy has no bfloat16, and would multiply the bits
    _INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@_jit
def dot(a, b, total):
    """total + a b, summed in float32. Three products of TF32 keep float32's precision."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.dtype == tl.float32:
        total = tl.dot(a, b, total, input_precision="tf32x3")
    else:
        total = tl.dot(a, b, total)
    return total


@_jit
def gelu(x):
    """x Phi(x), with the error function and not its tanh approximation: as F.gelu."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@_jit
def load_row(ptr, columns, size):
    return tl.load(ptr + columns, columns < size, 0.0).to(tl.float32)


@_jit
def load_tile(ptr, rows, stride, columns, n_rows, n_columns):
    """(rows, columns) of a matrix whose rows are `stride` apart, with 0 beyond its edges."""
    mask = (rows < n_rows) & (columns < n_columns)
    return tl.load(ptr + rows * stride + columns, mask, 0.0)


@_jit
def few_outputs(h, ptr, stride, n_rows, n_columns, PAD: tl.constexpr):
    """h W^T transposed, (PAD, ROWS), of W (n_rows, n_columns): its few rows are then the rows of
    the product, and each warp holds its own examples' h instead of a copy of all."""
    rows, columns = tl.arange(0, PAD), tl.arange(0, h.shape[1])
    y = tl.zeros((PAD, h.shape[0]), tl.float32)
    if h.dtype == tl.float32:  # three products of TF32 would not fit into registers
        for row in range(n_rows):
            own = tl.sum(h * load_row(ptr + row * stride, columns, n_columns)[None, :], 1)
            y += tl.where((rows == row)[:, None], own[None, :], 0.0)
    else:
        w = load_tile(ptr, rows[:, None], stride, columns[None, :], n_rows, n_columns)
        y = dot(w, tl.trans(h), y)
    return y


@_jit
def mlp_kernel(
    product_ptr,  # (B, H1): x W1^T, and the bias
    u_ptr,  # (N, R, B)
    weight2_ptr,  # (H2, H1)
    weight3_ptr,  # (C, H2)
    bias2_ptr,  # (H2,) or None
    bias3_ptr,  # (C,) or None
    a1_ptr,  # (N, R, H1)
    a2_ptr,  # (N, R, H2)
    a3_ptr,  # (N, R, C)
    b2_ptr,  # (N, R, H1), rows b2_stride apart
    b3_ptr,  # (N, R, H2), rows b3_stride apart
    e1_ptr,  # (N, H1) or None: the biases' noise
    e2_ptr,  # (N, H2) or None
    e3_ptr,  # (N, C) or None
    outputs_ptr,  # (N, 2, B, C)
    b2_stride,
    b3_stride,
    examples,  # B
    hidden1,
    hidden2,
    outputs,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,  # the following are padded to what tl.dot takes
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    HIDDEN2: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    tiles = tl.cdiv(2 * examples, ROWS)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)  # first all of +, then all of -
    inside = rows < 2 * examples
    sign = tl.where(rows < examples, 1.0, -1.0)
    example = rows % examples
    ranks = tl.arange(0, RANK_PAD)
    columns2 = tl.arange(0, HIDDEN2)
    columns3 = tl.arange(0, OUTPUTS)
    dtype: tl.constexpr = outputs_ptr.dtype.element_ty
    u_ptr += pair * RANK * examples
    a1_ptr += pair * RANK * hidden1
    a2_ptr += pair * RANK * hidden2
    a3_ptr += pair * RANK * outputs
    b2_ptr += pair * RANK * b2_stride
    b3_ptr += pair * RANK * b3_stride

    u1 = load_tile(u_ptr, ranks[None, :], examples, example[:, None], RANK, examples)
    u1 = (u1 * sign[:, None]).to(dtype)
    # the first layer's outputs, DEPTH at a time, go straight into the second layer's products
    total = tl.zeros((ROWS, HIDDEN2), tl.float32)
    u2 = tl.zeros((ROWS, RANK_PAD), tl.float32)
    for first in range(0, hidden1, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        h = load_tile(product_ptr, example[:, None], hidden1, depth[None, :], examples, hidden1)
        h = h.to(tl.float32)
        a = load_tile(a1_ptr, ranks[:, None], hidden1, depth[None, :], RANK, hidden1)
        h = dot(u1, a, h)
        if e1_ptr is not None:
            h += sign[:, None] * load_row(e1_ptr + pair * hidden1, depth, hidden1)[None, :]
        h = gelu(h).to(dtype)  # 0 beyond the last unit
        b = load_tile(b2_ptr, ranks[None, :], b2_stride, depth[:, None], RANK, hidden1)
        u2 = dot(h, b, u2)
        w = load_tile(weight2_ptr, columns2[None, :], hidden1, depth[:, None], hidden2, hidden1)
        total = dot(h, w, total)

    # the second layer's outputs, all of them; a register tile cannot be indexed, hence the sum
    u2 *= sign[:, None]
    for r in range(RANK):
        u = tl.sum(tl.where((ranks == r)[None, :], u2, 0.0), 1)
        total += u[:, None] * load_row(a2_ptr + r * hidden2, columns2, hidden2)[None, :]
    if bias2_ptr is not None:
        total += load_row(bias2_ptr, columns2, hidden2)[None, :]
        total += sign[:, None] * load_row(e2_ptr + pair * hidden2, columns2, hidden2)[None, :]
    h2 = gelu(total).to(dtype)

    # the head, transposed
    y = few_outputs(h2, weight3_ptr, hidden2, outputs, hidden2, OUTPUTS)
    u3 = few_outputs(h2, b3_ptr, b3_stride, RANK, hidden2, RANK_PAD) * sign[None, :]
    for r in range(RANK):
        u = tl.sum(tl.where((ranks == r)[:, None], u3, 0.0), 0)
        y += load_row(a3_ptr + r * outputs, columns3, outputs)[:, None] * u[None, :]
    if bias3_ptr is not None:
        y += load_row(bias3_ptr, columns3, outputs)[:, None]
        y += load_row(e3_ptr + pair * outputs, columns3, outputs)[:, None] * sign[None, :]
    outputs_ptr += pair * 2 * examples * outputs
    offsets = rows[None, :] * outputs + columns3[:, None]
    tl.store(outputs_ptr + offsets, y.to(dtype), inside[None, :] & (columns3 < outputs)[:, None])
