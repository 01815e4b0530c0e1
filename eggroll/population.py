"""Forward of many members at once: a whole chunk of the population through one network.

Every tensor inside the network has a leading axis of members. Members 2k and 2k+1 are the two
signs of pair k: they share the noise, so the noise is drawn and multiplied once.

Letters: P members, N pairs, B examples, R rank, O/I a layer's outputs/inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call

from eggroll.noise import LayerNoise, block_size, draw_block


class PopulationError(ValueError):
    """A population that cannot be: odd, empty, of a rank or sigma that makes no sense."""


def check_population(size: int, rank: int, sigma: float) -> None:
    """Raises PopulationError for a size that is odd or below 2, a rank below 1, a sigma of 0."""
    if size < 2 or size % 2:
        raise PopulationError(
            f"population {size} is {'odd' if size % 2 else 'too small'}; antithetic pairs need "
            f"an even number of 2 or more (try {max(2, size + size % 2)})"
        )
    if rank < 1:
        raise PopulationError(f"rank {rank} is below 1 (try 1)")
    if not sigma > 0:
        raise PopulationError(f"sigma {sigma} is not above 0 (try 0.02)")


@dataclass(frozen=True)
class Population:
    """The members of one step: `size` perturbations of a network, known by their keys alone.

    Raises PopulationError as `check_population` does.
    """

    network: nn.Module
    size: int
    rank: int
    sigma: float
    seed: int
    step: int

    def __post_init__(self):
        check_population(self.size, self.rank, self.sigma)

    @property
    def pairs(self) -> int:
        return self.size // 2

    @cached_property
    def layers(self) -> list[nn.Linear]:
        """The layers that evolve, in the order that keys their noise: every nn.Linear."""
        return [module for module in self.network.modules() if isinstance(module, nn.Linear)]

    @cached_property
    def device(self) -> torch.device:
        return self.layers[0].weight.device

    def noise_blocks(
        self, layer_index: int, start: int = 0, stop: int | None = None
    ) -> Iterator[LayerNoise]:
        """One layer's noise for pairs start..stop, block by block; `start` begins a block."""
        full = block_size(self.device)
        stop = self.pairs if stop is None else stop
        for first in range(start, stop, full):
            yield draw_block(
                self.layers[layer_index],
                self.rank,
                seed=self.seed,
                step=self.step,
                layer_index=layer_index,
                block=first // full,
                pairs=min(full, stop - first),
            )

    def chunks(self, chunk_size: int | None = None) -> Iterator["Chunk"]:
        """The population in parts of about `chunk_size` members, in order.

        Rounded up to whole blocks of noise (64 members on a CPU, 512 elsewhere), which is also
        the default. The chunk size decides memory and speed, never a result.
        """
        block = block_size(self.device)
        pairs = block * max(1, -(-(chunk_size or 0) // (2 * block)))
        for start in range(0, self.pairs, pairs):
            yield Chunk(self, start, min(start + pairs, self.pairs))

    def member(self, index: int) -> dict[str, Tensor]:
        """Parameters of one member by name, as `torch.func.functional_call` takes them.

        The plain twin of a chunk's `linear`: weights + sigma * E, formed in full.
        """
        pair, sign = index // 2, 1 - 2 * (index % 2)
        block = block_size(self.device)
        names = {parameter: name for name, parameter in self.network.named_parameters()}
        perturbed = {}
        for layer_index, layer in enumerate(self.layers):
            first = pair - pair % block
            noise = next(self.noise_blocks(layer_index, first, pair + 1))
            step = sign * self.sigma
            weight = layer.weight.detach()
            perturbed[names[layer.weight]] = weight + step * noise.materialise()[-1]
            if layer.bias is not None:
                perturbed[names[layer.bias]] = layer.bias.detach() + step * noise.bias[-1]
        return perturbed


@dataclass(frozen=True)
class Chunk:
    """Pairs start..stop of a population, ready to be evaluated together."""

    population: Population
    start: int
    stop: int

    @property
    def members(self) -> slice:
        """Where this chunk's members stand in the population."""
        return slice(2 * self.start, 2 * self.stop)

    def __len__(self) -> int:
        return 2 * (self.stop - self.start)

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs (P, B, ...) of this chunk's members for inputs (B, ...).

        Raises PopulationError where the network holds an nn.Linear that it does not call through
        `linear`: noise on it would change no score, and the update would be pure noise.
        """
        linear = PerturbedLinear(self)
        # all members see the same inputs: a view of stride 0, which the first layer recognises
        outputs = self.population.network(inputs.expand(len(self), *inputs.shape), linear=linear)
        linear.check_every_layer_was_called()
        return outputs


class PerturbedLinear:
    """The `linear` of a chunk: W x for every member, plus each member's low-rank term.

        y = x W^T +- (sigma / sqrt(R)) (x b^T) a

    Source: section 4 of the paper; W + sigma E is never formed.
    """

    def __init__(self, chunk: Chunk):
        self.chunk = chunk
        self.noise: dict[nn.Linear, LayerNoise] = {}

    def __call__(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """x (P, ..., I) -> (P, ..., O)."""
        noise = self._noise_of(layer)
        pairs = len(noise)
        if x.shape[0] != 2 * pairs:
            raise PopulationError(
                f"linear() got {tuple(x.shape)}; the first axis must be the {2 * pairs} members "
                "(does the network move or merge its leading axis?)"
            )
        if x.stride(0) == 0:
            y = self._shared_input(layer, noise, x[0])
        else:
            y = self._own_input(layer, noise, x)
        if noise.bias is not None:
            signed = torch.stack([noise.bias, -noise.bias], dim=1).flatten(0, 1)
            y += self.chunk.population.sigma * signed.view(-1, *[1] * (y.dim() - 2), y.shape[-1])
        return y

    def _shared_input(self, layer: nn.Linear, noise: LayerNoise, x: Tensor) -> Tensor:
        """Every member has the same x, (..., I): one base product and one x b^T serve them all."""
        pairs, _, out_features = noise.a.shape
        flat = x.reshape(-1, x.shape[-1])
        base = layer(flat)
        projected = self._project_shared(flat, noise)  # (N, B, R)
        term = torch.bmm(projected, noise.a).mul_(self._scale(noise))
        y = term.new_empty(pairs, 2, *base.shape)
        # both signs share the term: the negative member costs a subtraction
        torch.add(base, term, out=y[:, 0])
        torch.sub(base, term, out=y[:, 1])
        return y.view(2 * pairs, *x.shape[:-1], out_features)

    def _project_shared(self, x: Tensor, noise: LayerNoise) -> Tensor:
        """x b^T for x (B, I): (N, B, R), one product per block of noise.

        Per block and not per chunk: a product's rounding may depend on its shape, and the chunk
        size must not change a bit.
        """
        block = block_size(x.device)
        rank = noise.b.shape[1]
        parts = [x @ b.flatten(0, 1).T for b in noise.b.split(block)]
        return torch.cat(parts, dim=1).unflatten(1, (-1, rank)).transpose(0, 1)

    def _own_input(self, layer: nn.Linear, noise: LayerNoise, x: Tensor) -> Tensor:
        """Every member has its own x, (P, ..., I): a batched product per term, pair by pair."""
        pairs, _, out_features = noise.a.shape
        flat = x.reshape(pairs, -1, x.shape[-1])  # both signs of a pair, one after the other
        projected = torch.bmm(flat, noise.b.mT)  # (N, 2B, R)
        projected[:, projected.shape[1] // 2 :].neg_()
        weight = layer.weight.T.expand(pairs, -1, -1)
        if layer.bias is None:
            y = torch.bmm(flat, weight)
        else:
            y = torch.baddbmm(layer.bias, flat, weight)
        y.baddbmm_(projected, noise.a, alpha=self._scale(noise))
        return y.view(*x.shape[:-1], out_features)

    def _scale(self, noise: LayerNoise) -> float:
        return self.chunk.population.sigma * noise.rank_scale

    def _noise_of(self, layer: nn.Linear) -> LayerNoise:
        """Drawn at a layer's first call; a layer that is called twice keeps its noise."""
        if layer not in self.noise:
            population = self.chunk.population
            if layer not in population.layers:  # modules are equal only to themselves
                raise PopulationError(
                    f"linear() got {layer}, which is not an nn.Linear of the evolving network"
                )
            index = population.layers.index(layer)
            blocks = list(population.noise_blocks(index, self.chunk.start, self.chunk.stop))
            self.noise[layer] = blocks[0] if len(blocks) == 1 else _concatenate(blocks)
        return self.noise[layer]

    def check_every_layer_was_called(self) -> None:
        missing = [layer for layer in self.chunk.population.layers if layer not in self.noise]
        if missing:
            raise PopulationError(
                f"{missing[0]} was not called through linear(); write linear(layer, x) "
                "instead of layer(x) in the network's forward"
            )


def _concatenate(blocks: list[LayerNoise]) -> LayerNoise:
    bias = None if blocks[0].bias is None else torch.cat([block.bias for block in blocks])
    return LayerNoise(
        torch.cat([block.a for block in blocks]), torch.cat([block.b for block in blocks]), bias
    )


def reference_forward(population: Population, inputs: Tensor) -> Tensor:
    """Outputs (P, B, ...) of the whole population, one materialised member after the other.

    The plain twin of `Chunk.forward`: for tests and figures.
    """
    members = (population.member(index) for index in range(population.size))
    return torch.stack([functional_call(population.network, m, (inputs,)) for m in members])
