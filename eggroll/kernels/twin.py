"""The plain twin of the kernels' noise, in numpy: the same words, the same normals.

For tests, and to compute a member's noise where there is no GPU. Letters: N antithetic pairs, R
rank; F features, O or I.
"""

import numpy as np
import torch
from torch import Tensor, nn

from eggroll.kernels.philox import FACTOR_A, FACTOR_B, FACTOR_BIAS
from eggroll.noise import LayerNoise

_WORD = np.uint64(0xFFFFFFFF)


def philox(
    counter: tuple[np.ndarray, ...],  # four words, broadcastable
    seed: int,
) -> tuple[np.ndarray, ...]:
    """Philox 4x32-10: four random words of 32 bits, uint32, for each counter."""
    c0, c1, c2, c3 = (np.asarray(word).astype(np.uint64) & _WORD for word in counter)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0, product2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c0, c1, c2, c3 = (
            (product2 >> shift) ^ c1 ^ np.uint64(k0),
            product2 & _WORD,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(word.astype(np.uint32) for word in np.broadcast_arrays(c0, c1, c2, c3))


def box_muller(x0: np.ndarray, x1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two normals, float64, of two random words; the map is described beside the kernels' own."""
    uniform = x0.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    radius = np.sqrt(-2 * np.log(uniform.astype(np.float64))) * np.where(x1 >> 31, -1, 1)
    angle = (x1 << np.uint32(2)).view(np.int32) * (np.pi / 2 * 2**-32)
    swap = x1 & np.uint32(1 << 30) != 0
    cosine, sine = np.cos(angle), np.sin(angle)
    return radius * np.where(swap, sine, cosine), radius * np.where(swap, cosine, sine)


def draw_layer_twin(
    layer: nn.Linear, rank: int, *, key: Tensor, layer_index: int, start: int, stop: int
) -> LayerNoise:
    """As `eggroll.kernels.draw_layer`, on the host."""
    seed, step = key.tolist()
    out_features, in_features = layer.weight.shape

    def normal(factor: int, rank: int, features: int) -> Tensor:
        r, groups = np.arange(rank)[:, None], np.arange(-(-features // 4))
        pairs = np.arange(start, stop)[:, None, None]
        stream = ((layer_index * 3 + factor) << 16) + r
        x0, x1, x2, x3 = philox((groups, pairs, stream, np.uint32(step & 0xFFFFFFFF)), seed)
        quads = np.stack([*box_muller(x0, x1), *box_muller(x2, x3)], axis=-1)
        numbers = quads.reshape(stop - start, rank, -1)[..., :features]
        return torch.from_numpy(numbers).float().to(layer.weight)

    bias = normal(FACTOR_BIAS, 1, out_features)[:, 0] if layer.bias is not None else None
    return LayerNoise(
        normal(FACTOR_A, rank, out_features), normal(FACTOR_B, rank, in_features), bias
    )
