"""Naive evolution strategies, for comparison only: a dense Gaussian for every member and layer.

W + sigma E is formed, (O, I) numbers for each pair where EGGROLL has R (O + I), and no product is
shared by members. What is drawn for a block of pairs is dropped when the block is done, and drawn
again from its key for the estimate, so memory does not grow with the population.

Letters: P members, N antithetic pairs, B examples, O/I a layer's outputs/inputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.backends import Eager
from eggroll.binary import effective_weight
from eggroll.noise import generator_seed
from eggroll.perturbed import check_calls, index_of
from eggroll.population import Chunk, Population


@dataclass(frozen=True)
class DenseNoise:
    """The perturbations of one layer for N antithetic pairs."""

    e: Tensor  # (N, O, I)
    bias: Tensor | None = None  # (N, O)

    def __len__(self) -> int:
        return len(self.e)

    def materialise(self) -> Tensor:
        """E, (N, O, I), as `eggroll.noise.LayerNoise` has it."""
        return self.e


class FullRank(Eager):
    """How such a population is evaluated, and estimated from: plainly, one block after the other.

    Source: Salimans et al. 2017, arXiv 1703.03864, Algorithm 1, with antithetic pairs.
    """

    def noise(self, population: Population, layer_index: int, block: int) -> DenseNoise:
        """E ~ N(0, 1) of one block of pairs for one layer."""
        layer = population.layers[layer_index]
        start, stop = population.blocks[block]
        generator = torch.Generator(population.device)
        key = generator_seed(population.seed, population.step, layer_index, block)
        generator.manual_seed(key)
        e = layer.weight.new_empty(stop - start, *layer.weight.shape).normal_(generator=generator)
        if layer.bias is None:
            return DenseNoise(e)
        return DenseNoise(
            e, layer.bias.new_empty(len(e), len(layer.bias)).normal_(generator=generator)
        )

    def share(self, population: Population, inputs: Tensor) -> None:
        """Nothing: no two members have a weight in common."""

    def forward(self, chunk: Chunk, inputs: Tensor, shared: Any = None) -> Tensor:
        """Outputs (P, B, ...) of a chunk's members for inputs (B, ...).

        Raises PopulationError for a layer that the network does not call through `linear`.
        """
        population, outputs = chunk.population, []
        for block in chunk.blocks:
            # not population.noise, which keeps what it draws
            layers = range(len(population.layers))
            noise = [self.noise(population, index, block) for index in layers]
            linear = DenseLinear(population.layers, noise, population.sigma)
            members = inputs.expand(2 * len(noise[0]), *inputs.shape)
            outputs.append(population.network(members, linear=linear))
            check_calls(population.layers, linear.called)
        return torch.cat(outputs)

    def estimate(
        self, population: Population, layer_index: int, weights: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Ascent direction of one layer, (O, I) and (O,) or None: the sum of weights[k] * E_k."""
        layer = population.layers[layer_index]
        weight = torch.zeros_like(layer.weight)
        bias = None if layer.bias is None else torch.zeros_like(layer.bias)
        for block, (start, stop) in enumerate(population.blocks):
            noise = self.noise(population, layer_index, block)
            share = weights[start:stop].to(noise.e.dtype)
            weight += torch.tensordot(share, noise.e, dims=1)
            if bias is not None:
                bias += share @ noise.bias
        return weight, bias


class DenseLinear:
    """The `linear` of such a population: y = x (W +- sigma E)^T, every member by itself."""

    def __init__(self, layers: list[nn.Linear], noise: list[DenseNoise], sigma: float):
        self.layers, self.noise, self.sigma = layers, noise, sigma
        self.called = [False] * len(layers)

    def __call__(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """x (P, ..., I) -> (P, ..., O)."""
        index = index_of(layer, self.layers)
        self.called[index] = True
        noise = self.noise[index]
        weights = effective_weight(layer, layer.weight + self._signed(noise.e))
        y = torch.bmm(x.flatten(1, -2), weights.mT).view(*x.shape[:-1], -1)
        if noise.bias is not None:
            bias = layer.bias + self._signed(noise.bias)
            y += bias.view(len(bias), *[1] * (y.dim() - 2), -1)
        return y

    def _signed(self, noise: Tensor) -> Tensor:
        """+ sigma and - sigma times the noise of each pair, (N, ...) to (P, ...)."""
        return torch.stack([noise, -noise], dim=1).flatten(0, 1) * self.sigma
