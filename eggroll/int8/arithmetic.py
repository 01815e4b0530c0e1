"""Integer arithmetic that training needs: products, and divisions that round to nearest."""

import torch
from torch import Tensor
from torch.nn import functional as F

# int8 is -127..127 everywhere: with -128 the range would lean to one side
INT8_MAX = 127
# A wide number is 128 * high + low, with high and low int8
WIDE_MAX = 127 * 128
# Sums of so many products of int8 are whole numbers that float32 holds: 127 * 127 * 1040 < 2^24
FLOAT_EXACT = 1040


def int_matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y in int32, for int8 x (N, K) and y (K, M): the only place that multiplies matrices.

    torch._int_mm is VNNI instructions on a CPU and tensor cores on CUDA, which wants more than 16
    rows and multiples of 8 elsewhere: there the operands are padded with zeros. A CPU without VNNI
    has no fast product of int8; there float32 units compute the same integers.
    """
    if x.device.type == "cpu":
        through_float = FLOAT_IS_FASTER and x.shape[1] <= FLOAT_EXACT
        return float_matmul(x, y) if through_float else torch._int_mm(x, y)
    if x.device.type != "cuda":  # no such product elsewhere
        return (x.int().unsqueeze(2) * y.int()).sum(1, dtype=torch.int32)
    (rows, inner), columns = x.shape, y.shape[1]
    x = F.pad(x, (0, -inner % 8, 0, max(0, 17 - rows)))
    y = F.pad(y, (0, -columns % 8, 0, -inner % 8))
    return torch._int_mm(x, y)[:rows, :columns]


def float_matmul(x: Tensor, y: Tensor) -> Tensor:
    """The reference implementation of `int_matmul`: exact for K up to FLOAT_EXACT."""
    return (x.float() @ y.float()).int()


def _multiplies_int8() -> bool:
    """Whether this CPU has instructions for products of int8 (older torch does not know)."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    has = torch.cpu.get_capabilities().get
    return any(map(has, ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "dotprod")))


FLOAT_IS_FASTER = not _multiplies_int8()


def wide_matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y in int32, for int32 x (N, K) of at most WIDE_MAX in size, and int8 y (K, M).

    Two int8 products: PyTorch's own product of int32 is many times as slow.
    """
    high = rounded_shift(x, 7)
    low = x - (high << 7)  # -64..63
    both = int_matmul(torch.cat([high, low]).to(torch.int8), y)
    return (both[: len(x)] << 7) + both[len(x) :]


def rounded_shift(x: Tensor, bits: int) -> Tensor:
    """x / 2^bits, to nearest, halves upwards. Without the half, every shift would lower its sum."""
    return (x + (1 << bits >> 1)) >> bits if bits else x


def rounded_division(x: Tensor, divisor: int | Tensor) -> Tensor:
    """x / divisor, to nearest, halves upwards, for a divisor above 0."""
    if isinstance(divisor, int) and divisor & (divisor - 1) == 0:
        return rounded_shift(x, divisor.bit_length() - 1)
    return torch.div(2 * x + divisor, 2 * divisor, rounding_mode="floor")


def clipped(x: Tensor) -> Tensor:
    """Within -127..127, still int32."""
    return x.clamp(-INT8_MAX, INT8_MAX)
