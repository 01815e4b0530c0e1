"""Keyed low-rank noise: the same key gives the same numbers, so nothing has to be stored.

The noise of a layer is drawn in blocks of antithetic pairs, each from a generator of its own,
seeded by (seed, step, layer, block). Which blocks are evaluated together, in which order, or in
which process therefore changes no number.

Letters: N antithetic pairs, R rank, O/I a layer's outputs/inputs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Pairs that share a generator. A block is the unit of work on a CPU (its activations should stay
# in the cache); an accelerator wants few launches, hence large blocks.
CPU_BLOCK = 16
ACCELERATOR_BLOCK = 256

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class LayerNoise:
    """The perturbations of one layer for N antithetic pairs.

    Pair k moves the weights by +- sigma / sqrt(R) * a[k].T @ b[k] and the bias by
    +- sigma * bias[k]. The (O, I) matrix is never formed outside of tests and figures.
    """

    a: Tensor  # (N, R, O)
    b: Tensor  # (N, R, I)
    bias: Tensor | None = None  # (N, O), full-rank: a vector has nothing to factor

    @property
    def rank_scale(self) -> float:
        """1 / sqrt(R): entries of a.T @ b / sqrt(R) have variance 1 at any rank (Eq. 6)."""
        return 1 / math.sqrt(self.a.shape[1])

    def __len__(self) -> int:
        return len(self.a)

    def materialise(self) -> Tensor:
        """E, (N, O, I): the matrices that the fast paths never form."""
        return self.a.mT @ self.b * self.rank_scale


def concatenate(blocks: list[LayerNoise]) -> LayerNoise:
    """The pairs of several blocks of one layer, in order."""
    if len(blocks) == 1:
        return blocks[0]
    bias = None if blocks[0].bias is None else torch.cat([block.bias for block in blocks])
    return LayerNoise(
        torch.cat([block.a for block in blocks]), torch.cat([block.b for block in blocks]), bias
    )


def block_size(device: torch.device | str) -> int:
    """Pairs per noise block on this device."""
    return CPU_BLOCK if torch.device(device).type == "cpu" else ACCELERATOR_BLOCK


def draw_block(
    layer: nn.Linear,
    rank: int,
    *,
    seed: int,
    step: int,
    layer_index: int,
    block: int,
    pairs: int,
) -> LayerNoise:
    """Gaussian noise of one layer for the `pairs` pairs of one block.

    Drawn on the layer's device and in its dtype.
    Source: Algorithm 1 and Eq. 6 of the paper (A, B ~ N(0, 1)).
    """
    weight = layer.weight
    generator = torch.Generator(weight.device)
    generator.manual_seed(generator_seed(seed, step, layer_index, block))
    out_features, in_features = weight.shape

    def normal(*shape: int) -> Tensor:
        numbers = torch.empty(pairs, *shape, device=weight.device, dtype=weight.dtype)
        return numbers.normal_(generator=generator)

    # both factors in one call: the numbers are quick to draw, the calls are not
    a, b = normal(rank, out_features + in_features).split([out_features, in_features], dim=-1)
    return LayerNoise(a, b, normal(out_features) if layer.bias is not None else None)


def generator_seed(seed: int, step: int, layer: int, block: int) -> int:
    """One generator seed per key, without a collision inside a run.

    PyTorch's CPU generator uses 32 bits of its seed, and a hash to 32 bits would meet itself
    about 600 times in a run of two million blocks. So the key is packed injectively (17 bits of
    step, 5 of layer, 10 of block, the rest folded in above them), then moved by a *bijection* of
    32 bits that depends on the high part: two keys of the same run share a generator only beyond
    131,072 steps, 32 layers or 1,024 blocks.
    """
    low = ((step & 0x1FFFF) << 15) | ((layer & 0x1F) << 10) | (block & 0x3FF)
    rest = ((layer >> 5) << 32) ^ (block >> 10)
    high = _splitmix(_splitmix(_splitmix(seed) ^ (step >> 17)) ^ rest)
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
