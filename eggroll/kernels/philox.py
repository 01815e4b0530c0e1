"""Gaussian numbers from a counter: computed wherever they are needed, stored nowhere.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a counter
of 128 bits and a key of 64 bits to four words of 32 bits, and Box-Muller makes four normals of
them. The counter is the name of the numbers, without a collision:

    word 0   features 4 g .. 4 g + 3, as g
    word 1   the pair
    word 2   layer, which of its factors, and rank: (3 layer + factor) 2^16 + r
    word 3   the step
    key      the seed

Neither tile nor chunk nor population size is part of the name. Limits: 2^32 steps and pairs,
2^16 ranks, 21,845 layers.

Letters: N antithetic pairs, R rank; F features, O or I.
"""

# ruff: noqa: N803 - what a kernel is compiled for is upper case, as is Triton's custom

import triton
import triton.language as tl

FACTOR_A, FACTOR_B, FACTOR_BIAS = 0, 1, 2  # which of a layer's factors, in word 2

_A = tl.constexpr(FACTOR_A)
_B = tl.constexpr(FACTOR_B)
_BIAS = tl.constexpr(FACTOR_BIAS)


@triton.jit
def box_muller(x0, x1):
    """Two independent normals of two random words.

    Two bits of x1 choose one of four quarters of the circle, by swap and sign, and the other 30
    the angle within 45 degrees of its middle: there two short polynomials give sine and cosine to
    float32's precision, without the range reduction of a general sine.
    """
    # never 0, so the logarithm is finite: the largest normal is 6.8
    uniform = x0.to(tl.float32) * 2.0**-32 + 2.0**-33
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    radius = tl.where((x1 >> 31) != 0, -radius, radius)
    angle = (x1 << 2).to(tl.int32, bitcast=True).to(tl.float32) * (1.5707963267948966 * 2.0**-32)
    square = angle * angle
    sine = 1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880))))
    sine *= angle
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    swap = (x1 & 0x40000000) != 0
    return radius * tl.where(swap, sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def _quads(key_ptr, stream, pair, group):
    """Normals of features 4 group .. 4 group + 3, shape (..., 2, 2): flattened, in order."""
    seed = tl.load(key_ptr)
    step = tl.load(key_ptr + 1).to(tl.uint32)
    x0, x1, x2, x3 = tl.philox(
        seed, group.to(tl.uint32), pair.to(tl.uint32), stream.to(tl.uint32), step
    )
    n0, n1 = box_muller(x0, x1)
    n2, n3 = box_muller(x2, x3)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))


@triton.jit
def normal_row(
    key_ptr,  # int64 (2,): seed, step
    layer,
    factor: tl.constexpr,
    pair,
    r,
    first,  # first feature, a multiple of 4
    BLOCK: tl.constexpr,
    dtype: tl.constexpr,
):
    """Features first .. first + BLOCK of one pair and rank, (BLOCK,), rounded to `dtype`."""
    group = first // 4 + tl.arange(0, BLOCK // 4)
    stream = (layer * 3 + factor) * 65536 + r
    return tl.reshape(_quads(key_ptr, stream, pair, group), (BLOCK,)).to(dtype)


@triton.jit
def normal_tile(
    key_ptr,  # int64 (2,): seed, step
    layer,
    factor: tl.constexpr,
    rows,  # (ROWS,), pair * RANK + r
    first,  # first feature, a multiple of 4
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    dtype: tl.constexpr,
):
    """Features first .. first + BLOCK of many pairs and ranks, (ROWS, BLOCK), in `dtype`."""
    group = first // 4 + tl.arange(0, BLOCK // 4)
    stream = (layer * 3 + factor) * 65536 + rows % RANK
    quads = _quads(key_ptr, stream[:, None], (rows // RANK)[:, None], group[None, :])
    return tl.reshape(quads, (ROWS, BLOCK)).to(dtype)
