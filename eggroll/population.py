"""The members of one step, known by their keys, and the chunks in which they are evaluated.

Every tensor inside the network has a leading axis of members. Members 2k and 2k+1 are the two
signs of pair k: they share the noise, so the noise is drawn and multiplied once.

Letters: P members, N pairs, B examples, O/I a layer's outputs/inputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call

from eggroll.noise import LayerNoise, block_size, concatenate, draw_block
from eggroll.perturbed import PerturbedLinear, PopulationError, shared_products


def check_population(size: int, rank: int, sigma: float, groups: int = 1) -> None:
    """Raises PopulationError for a size that is odd or below 2, a rank below 1, a sigma of 0,
    or groups that do not share the pairs evenly."""
    if size < 2 or size % 2:
        raise PopulationError(
            f"population {size} is {'odd' if size % 2 else 'too small'}; antithetic pairs need "
            f"an even number of 2 or more (try {max(2, size + size % 2)})"
        )
    if rank < 1:
        raise PopulationError(f"rank {rank} is below 1 (try 1)")
    if not sigma > 0:
        raise PopulationError(f"sigma {sigma} is not above 0 (try 0.02)")
    if groups < 1 or (size // 2) % groups:
        whole = 2 * max(groups, 1) * max(1, round(size / (2 * max(groups, 1))))
        raise PopulationError(
            f"{groups} groups cannot share {size // 2} antithetic pairs evenly "
            f"(try a population of {whole} with {max(groups, 1)} groups)"
        )


def linear_layers(network: nn.Module) -> list[nn.Linear]:
    """Every nn.Linear, in the network's own order."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def draw_keyed(population: "Population", layer_index: int, block: int) -> LayerNoise:
    """Noise from torch's generators, keyed as `eggroll.noise` says."""
    start, stop = population.blocks[block]
    return draw_block(
        population.layers[layer_index],
        population.rank,
        seed=population.seed,
        step=population.step,
        layer_index=layer_index,
        block=block,
        pairs=stop - start,
    )


DrawNoise = Callable[["Population", int, int], LayerNoise]

# Pairs whose noise is kept from evaluation to estimate, and so drawn once. A bound, so that memory
# does not grow with the population: with the MLP of the experiment 17 MB at rank 1.
KEPT_PAIRS = 2048


@dataclass(frozen=True)
class Population:
    """The members of one step: `size` perturbations of a network, known by their keys alone.

    groups  parts of the population that each see their own part of the batch: group g sees the
            examples g, g + groups, g + 2 groups, ... With 8 groups, 8 times as many members cost
            as many forward passes
    draw    (population, layer index, block) -> the block's noise; the backend's own

    Raises PopulationError as `check_population` does.
    """

    network: nn.Module
    size: int
    rank: int
    sigma: float
    seed: int
    step: int
    groups: int = 1
    draw: "DrawNoise" = draw_keyed

    def __post_init__(self):
        check_population(self.size, self.rank, self.sigma, self.groups)

    @property
    def pairs(self) -> int:
        return self.size // 2

    @property
    def pairs_per_group(self) -> int:
        return self.pairs // self.groups

    @cached_property
    def layers(self) -> list[nn.Linear]:
        """The layers that evolve, in the order that keys their noise: every nn.Linear."""
        return linear_layers(self.network)

    @cached_property
    def device(self) -> torch.device:
        return self.layers[0].weight.device

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """First and last + 1 pair of every block of noise. A block lies within one group."""
        full, each = block_size(self.device), self.pairs_per_group
        return [
            (start, min(start + full, (group + 1) * each))
            for group in range(self.groups)
            for start in range(group * each, (group + 1) * each, full)
        ]

    @cached_property
    def _kept(self) -> list[list[LayerNoise]]:
        """Of each layer, the first blocks' noise.

        Drawn together and not as it is asked for: small tensors that stay between a chunk's large
        ones would split the space that the next chunk needs.
        """
        blocks = sum(stop <= KEPT_PAIRS for _, stop in self.blocks)
        layers = range(len(self.layers))
        return [[self.draw(self, layer, block) for block in range(blocks)] for layer in layers]

    def noise(self, layer_index: int, block: int) -> LayerNoise:
        """The noise of one block of pairs for one layer: kept, or drawn again from its key."""
        if self.blocks[block][1] <= KEPT_PAIRS:
            return self._kept[layer_index][block]
        return self.draw(self, layer_index, block)

    def noise_blocks(self, layer_index: int) -> Iterator[LayerNoise]:
        """One layer's noise for the whole population, block by block."""
        return (self.noise(layer_index, block) for block in range(len(self.blocks)))

    def chunks(self, chunk_size: int | None = None) -> Iterator["Chunk"]:
        """The population in parts of about `chunk_size` members, in order.

        Rounded up to whole blocks of noise (32 members on a CPU, 512 elsewhere). One is the
        default; with groups, each of which sees a part of the batch, as many as there are groups.
        A chunk lies within one group. The chunk size decides memory and speed, never a result.
        """
        full = 2 * block_size(self.device)
        most = -(-chunk_size // full) if chunk_size else self.groups
        per_group = len(self.blocks) // self.groups
        for first in range(0, len(self.blocks), per_group):
            for block in range(first, first + per_group, most):
                yield Chunk(self, range(block, min(block + most, first + per_group)))

    def member(self, index: int) -> dict[str, Tensor]:
        """Parameters of one member by name, as `torch.func.functional_call` takes them.

        The plain twin of a chunk's `linear`: weights + sigma * E, formed in full.
        """
        pair, sign = index // 2, 1 - 2 * (index % 2)
        block = next(b for b, (_, stop) in enumerate(self.blocks) if pair < stop)
        place, step = pair - self.blocks[block][0], sign * self.sigma
        names = {parameter: name for name, parameter in self.network.named_parameters()}
        perturbed = {}
        for layer_index, layer in enumerate(self.layers):
            noise = self.noise(layer_index, block)
            weight = layer.weight.detach()
            perturbed[names[layer.weight]] = weight + step * noise.materialise()[place]
            if layer.bias is not None:
                perturbed[names[layer.bias]] = layer.bias.detach() + step * noise.bias[place]
        return perturbed

    def group_of(self, pair: int) -> int:
        return pair // self.pairs_per_group


@dataclass(frozen=True)
class Chunk:
    """Some blocks of a population, all of one group, ready to be evaluated together."""

    population: Population
    blocks: range

    @property
    def start(self) -> int:
        """First pair."""
        return self.population.blocks[self.blocks[0]][0]

    @property
    def stop(self) -> int:
        """Last pair + 1."""
        return self.population.blocks[self.blocks[-1]][1]

    @property
    def group(self) -> int:
        return self.population.group_of(self.start)

    @property
    def members(self) -> slice:
        """Where this chunk's members stand in the population."""
        return slice(2 * self.start, 2 * self.stop)

    def __len__(self) -> int:
        return 2 * (self.stop - self.start)

    def part(self, batch: Tensor) -> Tensor:
        """What this chunk's group sees of the batch's inputs or labels, (B, ...)."""
        return batch[self.group :: self.population.groups]

    def draw(self) -> list[LayerNoise]:
        """The noise of every layer for this chunk's pairs."""
        population = self.population
        return [
            concatenate([population.noise(index, block) for block in self.blocks])
            for index in range(len(population.layers))
        ]

    @torch.no_grad()
    def forward(self, inputs: Tensor, shared: list[Tensor | None] | None = None) -> Tensor:
        """Outputs (P, B, ...) of this chunk's members for inputs (B, ...).

        shared  `shared_products` of these inputs, where several chunks see them

        Raises PopulationError where the network holds an nn.Linear that it does not call through
        `linear`: noise on it would change no score, and the update would be pure noise.
        """
        population = self.population
        network, layers = population.network, population.layers
        if shared is None:
            shared = shared_products(network, layers, inputs)
        return perturbed_forward(network, layers, self.draw(), population.sigma, inputs, shared)


def perturbed_forward(
    network: nn.Module,
    layers: list[nn.Linear],
    noise: list[LayerNoise],
    sigma: float | Tensor,
    inputs: Tensor,
    shared: list[Tensor | None],
) -> Tensor:
    """Outputs (P, B, ...) for inputs (B, ...) of the members that the layers' noise makes."""
    linear = PerturbedLinear(layers, noise, sigma, shared)
    members = 2 * len(noise[0])
    # all members see the same inputs: a view of stride 0, which the first layer recognises
    outputs = network(inputs.expand(members, *inputs.shape), linear=linear)
    linear.check_every_layer_was_called()
    return outputs


def reference_forward(population: Population, inputs: Tensor) -> Tensor:
    """Outputs (P, B, ...) of the whole population, one materialised member after the other.

    The plain twin of `Chunk.forward`: for tests and figures.
    """
    members = (population.member(index) for index in range(population.size))
    return torch.stack([functional_call(population.network, m, (inputs,)) for m in members])
