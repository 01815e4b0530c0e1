"""Keyed noise: the same key gives the same numbers, so nothing has to be stored or sent.

Every generator is keyed by (seed, step, parameter, block, what is drawn). Which blocks are
evaluated together, in which order or in which process therefore changes no number.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64
_MASK = (1 << 64) - 1
# Fewer make the next layer's product cheaper, which 16 leave at the cost of writing its result
ROW_UNITS = 16


@dataclass(frozen=True)
class Keys:
    """The generators of one step."""

    seed: int
    step: int
    device: torch.device

    def generator(self, parameter: int, block: int = 0) -> torch.Generator:
        """A fresh generator for one block of members of one parameter.

        parameter  position among the evolving parameters; beyond them, what is no parameter's
        """
        seed = generator_seed(self.seed, self.step, parameter, block)
        return torch.Generator(self.device).manual_seed(seed)


def generator_seed(seed: int, step: int, parameter: int, block: int, what: int = 0) -> int:
    """One generator seed per key, without a collision inside a run.

    PyTorch's CPU generator uses 32 bits of its seed, and a hash to 32 bits would collide about 600
    times in a run of two million blocks. So the key is packed injectively (16 bits of step, 5 of
    parameter, 10 of block, 1 of what; the rest is folded in above them), then moved by a
    *bijection* of 32 bits that depends on the high part: two keys of one run share a generator
    only beyond 65,536 steps, 32 parameters or 1,024 blocks, and there by chance alone.
    """
    low = (step & 0xFFFF) << 16 | (parameter & 0x1F) << 11 | (block & 0x3FF) << 1 | (what & 1)
    rest = ((parameter >> 5) << 32) ^ (block >> 10)
    high = _splitmix(_splitmix(_splitmix(seed) ^ (step >> 16)) ^ rest)
    upper, mask = (high >> 32) << 32, high & 0xFFFFFFFF
    return upper | _bijection32(low ^ mask)


def _splitmix(x: int) -> int:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): mixes 64 bits."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _bijection32(x: int) -> int:
    """MurmurHash3's 32-bit finaliser: invertible, so distinct keys stay distinct."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def gaussian(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Independent N(0, 1) numbers, in the dtype of `like`."""
    return torch.empty(shape, device=generator.device, dtype=like.dtype).normal_(
        generator=generator
    )


def signs(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Independent random signs, 64 for each 64-bit word that is drawn."""
    count, device = math.prod(shape), generator.device
    words = torch.empty(-(-count // 64), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    eights = _signs_of_bytes(dtype, device).index_select(0, words.view(torch.uint8).int())
    return eights.view(-1)[:count].view(shape)


@lru_cache(maxsize=8)
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs that each byte stands for, (256, 8)."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (2 * bits - 1).to(device, dtype)


def orthogonal_rows(
    outputs: int, size: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Orthogonal rows that each have signs for one block of `size` neighbouring units: signs
    (N, size), and blocks (N,). The last block may reach beyond the outputs.

    The first rows are one row of a Hadamard matrix for each block, in random order of the blocks;
    the next are another row of it.
    """
    device, parts = generator.device, -(-outputs // size)
    order = torch.randperm(size, generator=generator, device=device)
    rows = hadamard(size, device, dtype).index_select(0, order)
    blocks = torch.randperm(parts, generator=generator, device=device)
    return rows.unsqueeze(1).expand(size, parts, size).reshape(-1, size), blocks.repeat(size)


def row_units(outputs: int, rows: int, units: int = ROW_UNITS) -> int:
    """Units that an orthogonal row moves, where there are so many rows: `units`, or as many more
    as let all of them be moved by one row; a power of two."""
    fewest = max(min(units, outputs), -(-outputs // rows))
    return 1 << (fewest - 1).bit_length()


def most_rows(outputs: int, units: int = ROW_UNITS) -> int:
    """Orthogonal rows for so many outputs: a full set for each block."""
    size = row_units(outputs, outputs, units)
    return size * -(-outputs // size)


@lru_cache(maxsize=8)
def hadamard(order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sylvester's matrix of orthogonal rows of signs; `order` is a power of two."""
    matrix = torch.ones(1, 1, device=device, dtype=dtype)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
