"""Keyed noise: a key gives the same numbers again, so noise is never stored or sent."""

from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64
_MASK = (1 << 64) - 1


def generator(
    seed: int, step: int, parameter: int, block: int, device: torch.device
) -> torch.Generator:
    """Return a fresh generator for one block of noise of one parameter at one step.

    parameter  index of the layer; larger indices key other noise (smoothing)
    block      number of the block, where a step's noise is drawn in several
    """
    return torch.Generator(device).manual_seed(generator_seed(seed, step, parameter, block))


def generator_seed(seed: int, step: int, parameter: int, block: int) -> int:
    """Return one generator seed per key, without a collision inside a run.

    PyTorch's CPU generator uses 32 bits of its seed, and a hash to 32 bits would collide about 600
    times in a run of two million blocks. So the key is packed injectively (16 bits of step, 5 of
    parameter, 11 of block; the rest is folded in above them), then moved by a *bijection* of 32
    bits that depends on the high part: two keys of one run share a generator only beyond 65,536
    steps, 32 parameters or 2,048 blocks, and there by chance alone.
    """
    low = (step & 0xFFFF) << 16 | (parameter & 0x1F) << 11 | (block & 0x7FF)
    rest = ((parameter >> 5) << 32) ^ (block >> 11)
    high = _splitmix(_splitmix(_splitmix(seed) ^ (step >> 16)) ^ rest)
    upper, mask = (high >> 32) << 32, high & 0xFFFFFFFF
    return upper | _bijection32(low ^ mask)


def _splitmix(x: int) -> int:
    """Mix 64 bits: the output function of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _bijection32(x: int) -> int:
    """Mix 32 bits by MurmurHash3's finalizer: invertible, so distinct keys stay distinct."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def gaussian(shape: tuple[int, ...], like: Tensor, rng: torch.Generator) -> Tensor:
    """Independent standard normal numbers, in the dtype of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=rng.device).normal_(generator=rng)


def signs(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Independent random signs; each 64-bit word that is drawn gives 64 of them."""
    count = torch.Size(shape).numel()
    words = torch.empty(-(-count // 64), dtype=torch.int64, device=rng.device)
    words.random_(-(2**63), None, generator=rng)
    eights = _signs_of_bytes(dtype, rng.device).index_select(0, words.view(torch.uint8).int())
    return eights.view(-1)[:count].view(shape)


@lru_cache(maxsize=8)
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs that each byte encodes, (256, 8)."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (2 * bits - 1).to(device, dtype)


@lru_cache(maxsize=8)
def hadamard(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix of orthogonal rows of signs, (order, order); order is a power of two."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
