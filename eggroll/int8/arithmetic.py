"""Integer arithmetic: exact matrix products, and divisions that round to nearest."""

from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.compiled import Loops

INT8_MAX = 127  # int8 is -127..127 everywhere: -128 would make the range asymmetric
WIDE_MAX = 127 * 128  # largest number that is 128 * high + low, with high and low in int8
# Longest inner product of int8 whose sum float32 holds exactly: 127 * 127 * 1040 < 2^24
FLOAT_EXACT = 1040

# Bit-identical to the torch code they replace
kernels = Loops(
    Path(__file__).with_name("kernels.cpp"),
    "int8 runs on torch's operations, about ten times as slowly",
)


def int_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Return x @ y, int32 (N, M), for int8 x (N, K) and y (K, M)."""
    columns = y.shape[1]
    exported = torch.compiler.is_exporting()  # ONNX has no aten._int_mm
    if x.device.type != "cpu" or FLOAT_IS_FASTER or exported:
        parts = zip(x.split(FLOAT_EXACT, 1), y.split(FLOAT_EXACT), strict=True)
        return reduce(torch.add, (float_matmul(*part) for part in parts))
    if columns % 16:  # a CPU is fastest with multiples of 16
        y = F.pad(y, (0, -columns % 16))
    return torch.ops.aten._int_mm(x, y)[:, :columns].contiguous()


def float_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Return what `int_matmul` does, for K up to FLOAT_EXACT: the reference implementation.

    Products of int8 are exact in bfloat16, and their sums in float32.
    """
    if x.is_cuda:
        return torch.mm(x.bfloat16(), y.bfloat16(), out_dtype=torch.float32).int()
    return (x.float() @ y.float()).int()


def _multiplies_int8() -> bool:
    """Return whether this CPU has instructions for products of int8."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older torch
        return True
    has = torch.cpu.get_capabilities().get
    return any(map(has, ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "dotprod")))


FLOAT_IS_FASTER = not _multiplies_int8()


def wide_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Return x @ y, int32, for int32 x (N, K) within +-WIDE_MAX and int8 y (K, M).

    Two products of int8: torch multiplies int32 matrices many times more slowly.
    """
    high = rounded_shift(x, 7)
    low = x - (high << 7)  # -64..63
    products = int_matmul(torch.cat([high, low]).to(torch.int8), y)
    return torch.add(products[len(x) :], products[: len(x)], alpha=128)


def rounded_shift(x: Tensor, bits: int) -> Tensor:
    """Return x / 2^bits, rounded to nearest, halves upwards; a bare shift would lower every sum."""
    return (x + (1 << bits >> 1)) >> bits if bits else x


def rounded_division(x: Tensor, divisor: int | Tensor) -> Tensor:
    """Return x / divisor, rounded to nearest, halves upwards, for a divisor above 0."""
    return torch.div(2 * x + divisor, 2 * divisor, rounding_mode="floor")


def clip(x: Tensor, most: int = INT8_MAX) -> Tensor:
    """Clamp to -most..most."""
    return x.clamp(-most, most)
