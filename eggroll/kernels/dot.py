"""tl.dot, at one precision for each dtype."""

import triton
import triton.language as tl

# its numpy has no bfloat16, and would multiply the bits
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """total + a b, (M, N), summed in float32, for a (M, K) and b (K, N) of one dtype.

    Tensor cores take float32 as three products of TF32, which keep its precision.
    """
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.dtype == tl.float32:
        total = tl.dot(a, b, total, input_precision="tf32x3")
    else:
        total = tl.dot(a, b, total)
    return total
