"""One layer of every member: W x, the low-rank term, the biases and GELU in one pass.

    y = act(x W^T + bias +- (sigma / sqrt(R) * sum_r u_r a_r + sigma * bias noise))

a is drawn where the product ends, so a member costs no memory beyond its activations. Both signs
of a pair stand one after the other, (N, M, ...) with M = 2 B, and share what is drawn.

Letters: N antithetic pairs, B examples, M = 2 B, R rank, O/I a layer's outputs/inputs.
"""

# ruff: noqa: N803 - what a kernel is compiled for is upper case, as is Triton's custom

import triton
import triton.language as tl
from torch import Tensor

from eggroll.kernels import tiles
from eggroll.kernels.dot import dot
from eggroll.kernels.philox import _A, _BIAS, normal_row


@triton.jit
def gelu(x):
    """x Phi(x), with the error function and not its tanh approximation: as F.gelu."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def rank_column(u, r, RANK_PAD: tl.constexpr):
    """Column r of u (ROWS, RANK_PAD), (ROWS,): a register tile cannot be indexed."""
    return tl.sum(tl.where((tl.arange(0, RANK_PAD) == r)[None, :], u, 0.0), 1)


@triton.jit
def low_rank_term(
    key_ptr,  # int64 (2,): seed, step
    sigma_ptr,  # float32 ()
    u,  # (ROWS, RANK_PAD)
    layer,
    pair,
    first,  # first output
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    dtype: tl.constexpr,
):
    """What a pair adds to the outputs first .. first + COLUMNS with sign +, (ROWS, COLUMNS)."""
    sigma = tl.load(sigma_ptr)
    scale = sigma * (RANK**-0.5)
    term = tl.zeros((ROWS, COLUMNS), tl.float32)
    for r in range(RANK):
        a = normal_row(key_ptr, layer, _A, pair, r, first, COLUMNS, dtype).to(tl.float32)
        term += rank_column(u, r, RANK_PAD)[:, None] * (scale * a)[None, :]
    if HAS_BIAS:
        noise = normal_row(key_ptr, layer, _BIAS, pair, 0, first, COLUMNS, dtype)
        term += (sigma * noise.to(tl.float32))[None, :]
    return term


@triton.jit
def load_u(u_ptr, pair, rows, examples, RANK: tl.constexpr, RANK_PAD: tl.constexpr):
    """One pair's u at the examples `rows`, (ROWS, RANK_PAD), of u (N, R, examples)."""
    r = tl.arange(0, RANK_PAD)
    offsets = (pair.to(tl.int64) * RANK + r)[None, :] * examples + rows[:, None]
    return tl.load(u_ptr + offsets, (r < RANK)[None, :] & (rows < examples)[:, None], 0.0)


@triton.jit(do_not_specialize=["layer", "start"])
def hidden_shared_kernel(
    key_ptr,  # int64 (2,): seed, step
    sigma_ptr,  # float32 ()
    base_ptr,  # (B, O): x W^T
    u_ptr,  # (N, R, B)
    bias_ptr,  # (O,) or None
    y_ptr,  # (N, 2, B, O)
    layer,
    start,
    examples,  # B
    features,  # O
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds to a product that all members share; nothing is left to multiply."""
    tiles_across = tl.cdiv(features, COLUMNS)
    tiles_down = tl.cdiv(examples, ROWS)
    program = tl.program_id(0)
    pair = program // (tiles_down * tiles_across)
    rows = program // tiles_across % tiles_down * ROWS + tl.arange(0, ROWS)
    first = program % tiles_across * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    mask = (rows < examples)[:, None] & (columns < features)[None, :]
    offsets = rows[:, None] * features + columns[None, :]

    base = tl.load(base_ptr + offsets, mask, 0.0).to(tl.float32)
    if bias_ptr is not None:
        base += tl.load(bias_ptr + columns, columns < features, 0.0).to(tl.float32)[None, :]
    term = low_rank_term(
        key_ptr,
        sigma_ptr,
        load_u(u_ptr, pair, rows, examples, RANK, RANK_PAD),
        layer,
        start + pair,
        first,
        RANK,
        RANK_PAD,
        ROWS,
        COLUMNS,
        bias_ptr is not None,
        dtype,
    )
    # both signs share the term: the negative member costs a subtraction
    plus, minus = base + term, base - term
    if GELU:
        plus, minus = gelu(plus), gelu(minus)
    size = examples * features
    y_ptr += pair.to(tl.int64) * 2 * size
    tl.store(y_ptr + offsets, plus.to(dtype), mask)
    tl.store(y_ptr + size + offsets, minus.to(dtype), mask)


@triton.jit(do_not_specialize=["layer", "start"])
def hidden_own_kernel(
    key_ptr,  # int64 (2,): seed, step
    sigma_ptr,  # float32 ()
    x_ptr,  # (N, M, I)
    weight_ptr,  # (O, I)
    u_ptr,  # (N, R, M)
    bias_ptr,  # (O,) or None
    y_ptr,  # (N, M, O)
    layer,
    start,
    examples,  # M
    in_features,
    out_features,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The product of each member's own input, and its term where the product ends."""
    tiles_across = tl.cdiv(out_features, COLUMNS)
    tiles_down = tl.cdiv(examples, ROWS)
    # neighbours differ in their outputs only, so they find x in the cache
    program = tl.program_id(0)
    pair = program // (tiles_down * tiles_across)
    rows = program // tiles_across % tiles_down * ROWS + tl.arange(0, ROWS)
    first = program % tiles_across * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = y_ptr.dtype.element_ty

    x_ptr += pair.to(tl.int64) * examples * in_features
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, in_features, DEPTH):
        depth = k + tl.arange(0, DEPTH)
        inside = depth < in_features
        x_mask = (rows < examples)[:, None] & inside[None, :]
        w_mask = inside[:, None] & (columns < out_features)[None, :]
        x = tl.load(x_ptr + rows[:, None] * in_features + depth[None, :], x_mask, 0.0)
        w = tl.load(weight_ptr + columns[None, :] * in_features + depth[:, None], w_mask, 0.0)
        total = dot(x, w, total)

    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, columns < out_features, 0.0).to(tl.float32)[None, :]
    term = low_rank_term(
        key_ptr,
        sigma_ptr,
        load_u(u_ptr, pair, rows, examples, RANK, RANK_PAD),
        layer,
        start + pair,
        first,
        RANK,
        RANK_PAD,
        ROWS,
        COLUMNS,
        bias_ptr is not None,
        dtype,
    )
    y = total + tl.where(rows * 2 < examples, 1.0, -1.0)[:, None] * term
    if GELU:
        y = gelu(y)
    mask = (rows < examples)[:, None] & (columns < out_features)[None, :]
    y_ptr += pair.to(tl.int64) * examples * out_features
    tl.store(y_ptr + rows[:, None] * out_features + columns[None, :], y.to(dtype), mask)


def hidden_shared(
    base: Tensor,  # (B, O): x W^T, without the bias
    u: Tensor,  # (N, R, B)
    bias: Tensor | None,  # (O,)
    *,
    key: Tensor,  # int64 (2,): seed, step
    sigma: Tensor,  # float32 ()
    layer_index: int,
    start: int,
    gelu: bool,
) -> Tensor:
    """y, (P, B, O), of an input that all members share."""
    pairs, rank, examples = u.shape
    features = base.shape[1]
    y = base.new_empty(2 * pairs, examples, features)
    tile = tiles.HIDDEN_SHARED
    programs = pairs * triton.cdiv(examples, tile.rows) * triton.cdiv(features, tile.columns)
    hidden_shared_kernel[(programs,)](
        key,
        sigma,
        base,
        u,
        bias,
        y,
        layer_index,
        start,
        examples,
        features,
        RANK=rank,
        RANK_PAD=triton.next_power_of_2(rank),
        GELU=gelu,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        **tile.options,
    )
    return y


def hidden_own(
    x: Tensor,  # (N, M, I)
    weight: Tensor,  # (O, I)
    u: Tensor,  # (N, R, M)
    bias: Tensor | None,  # (O,)
    *,
    key: Tensor,  # int64 (2,): seed, step
    sigma: Tensor,  # float32 ()
    layer_index: int,
    start: int,
    gelu: bool,
) -> Tensor:
    """y, (N, M, O), of an input that each member has for itself."""
    pairs, examples, in_features = x.shape
    out_features, rank = len(weight), u.shape[1]
    y = x.new_empty(pairs, examples, out_features)
    tile = tiles.HIDDEN_OWN[x.dtype]
    programs = pairs * triton.cdiv(examples, tile.rows) * triton.cdiv(out_features, tile.columns)
    hidden_own_kernel[(programs,)](
        key,
        sigma,
        x,
        weight,
        u,
        bias,
        y,
        layer_index,
        start,
        examples,
        in_features,
        out_features,
        RANK=rank,
        RANK_PAD=triton.next_power_of_2(rank),
        GELU=gelu,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        **tile.options,
    )
    return y
