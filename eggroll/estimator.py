"""From scores to an estimate of the gradient: the paper's estimator.

Letters: P members, N = P / 2 antithetic pairs, R rank, O/I a layer's outputs/inputs.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from eggroll.fitness import SHAPINGS
from eggroll.noise import LayerNoise, concatenate

# Blocks of noise that go into one matrix product: long enough for a GEMM to be fast (32 pairs are
# not), short enough that the noise of 512 pairs is all that is held. Fixed, and not the chunk
# size, so that rounding does not depend on memory settings.
PAIRS_PER_PRODUCT = 512


def pair_weights(scores: Tensor, shaping: str, sigma: float, groups: int = 1) -> Tensor:
    """What each pair's noise is weighed by, (N,), from one score per member, (P,).

    (s+ - s-) / (2 N) for shaped scores s. Unshaped scores keep the fitness's own units, so the
    difference is also divided by sigma and the estimate is the gradient of the fitness. The other
    shapings have divided by the scores' spread, which grows with sigma: dividing again would tie
    the learning rate to sigma.
    Where groups of members saw examples of their own, each group's mean is taken off first: that
    its examples are easy is no merit of its members.
    Source: Algorithm 1 of the paper, with antithetic pairs.
    """
    if groups > 1:
        by_group = scores.unflatten(0, (groups, -1))
        scores = (by_group - by_group.mean(1, keepdim=True)).flatten()
    shaped = SHAPINGS[shaping](scores)
    difference = shaped[0::2] - shaped[1::2]
    scale = 1 / sigma if shaping == "none" else 1.0
    return difference * (scale / len(scores))


def estimate_layer(
    layer: nn.Linear,
    blocks: Iterable[LayerNoise],
    weights: Tensor,  # (N,)
) -> tuple[Tensor, Tensor | None]:
    """Estimated ascent direction of one layer: weight (O, I) and bias (O,) or None.

    The sum over pairs of weights[k] * E_k, as one matrix product for every few blocks of noise:
    (a * weight).T @ b, in which neither E_k nor the population's noise is ever held.
    Raises ValueError where there is not one weight for each pair.
    """
    weight_estimate = torch.zeros_like(layer.weight)
    bias_estimate = None if layer.bias is None else torch.zeros_like(layer.bias)
    start = 0
    for noise in _joined(blocks):
        share = weights[start : start + len(noise)].to(noise.a.dtype)
        weighed = noise.a * (share * noise.rank_scale)[:, None, None]
        weight_estimate.addmm_(weighed.flatten(0, 1).T, noise.b.flatten(0, 1))
        if bias_estimate is not None:
            bias_estimate.addmv_(noise.bias.T, share)
        start += len(noise)
    if start != len(weights):
        raise ValueError(f"{len(weights)} weights for {start} pairs")
    return weight_estimate, bias_estimate


def _joined(blocks: Iterable[LayerNoise]) -> Iterator[LayerNoise]:
    """The blocks, several put together, as PAIRS_PER_PRODUCT says."""
    blocks = iter(blocks)
    while first := next(blocks, None):
        more = islice(blocks, max(0, PAIRS_PER_PRODUCT // len(first) - 1))
        yield concatenate([first, *more])


def materialised_estimate(
    layer: nn.Linear, blocks: Iterable[LayerNoise], weights: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The plain twin of `estimate_layer`: forms every E_k, (O, I), and adds them up."""
    weight_estimate = torch.zeros_like(layer.weight)
    bias_estimate = None if layer.bias is None else torch.zeros_like(layer.bias)
    remaining = iter(weights)
    for noise in blocks:
        for k, perturbation in enumerate(noise.materialise()):
            share = next(remaining)
            weight_estimate += share * perturbation
            if bias_estimate is not None:
                bias_estimate += share * noise.bias[k]
    return weight_estimate, bias_estimate
