"""The kernels as a backend: what `eggroll.backends` describes, on a CUDA GPU.

Letters: P members, N antithetic pairs, B examples, O/I a layer's outputs/inputs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eggroll.captured import capturing
from eggroll.fitness import Fitness
from eggroll.kernels.draw import draw_layer
from eggroll.kernels.estimate import estimate_layer
from eggroll.kernels.forward import forward, linear
from eggroll.model import MLP
from eggroll.noise import LayerNoise
from eggroll.perturbed import PopulationError
from eggroll.population import Chunk, Population


class Triton:
    """Noise is drawn inside of the kernels; seed, step and sigma are read from the device.

    The project's MLP with GELU goes through one fused kernel; any other network through `linear`.
    """

    def __init__(self):
        self.key: Tensor | None = None  # int64 (2,): seed, step
        self.sigma: Tensor | None = None  # float32 ()

    def prepare(self, population: Population) -> None:
        """Write the step's key and sigma to where launches, and replays of a graph, read them."""
        if capturing():
            return  # the graph would write this step's key at every replay
        if self.key is None or self.key.device != population.device:
            self.key = torch.zeros(2, dtype=torch.int64, device=population.device)
            self.sigma = torch.zeros((), device=population.device)
        seed = population.seed & (1 << 64) - 1
        self.key[0] = seed - (1 << 64) if seed >> 63 else seed  # the same 64 bits, with a sign
        self.key[1] = population.step
        self.sigma.fill_(population.sigma)

    def noise(self, population: Population, layer_index: int, block: int) -> LayerNoise:
        """As `eggroll.noise.draw_block`; the same pairs differ from the CPU's."""
        self.prepare(population)
        start, stop = population.blocks[block]
        layer = population.layers[layer_index]
        place = {"layer_index": layer_index, "start": start, "stop": stop}
        return draw_layer(layer, population.rank, key=self.key, **place)

    def share(self, population: Population, inputs: Tensor) -> None:
        """Nothing: the kernels compute the first layer's product where they use it."""

    def forward(self, chunk: Chunk, inputs: Tensor, shared: None = None) -> Tensor:
        """Outputs (P, B, ...) of a chunk's members for inputs (B, ...)."""
        population = chunk.population
        self.prepare(population)
        place = {"key": self.key, "start": chunk.start, "stop": chunk.stop}
        settings = {**place, "rank": population.rank, "sigma": self.sigma}
        inputs = inputs.contiguous()  # a group's part of a batch is strided
        if type(population.network) is MLP and population.network.activation is F.gelu:
            return forward(population.network, inputs, **settings)
        return self._forward_through_linear(population, len(chunk), inputs, settings)

    def score(
        self, chunk: Chunk, inputs: Tensor, labels: Tensor, fitness: Fitness, shared: None = None
    ) -> Tensor:
        """What the fitness says of these outputs: (P, B) or (P,)."""
        return fitness(self.forward(chunk, inputs, shared), labels)

    def _forward_through_linear(
        self, population: Population, members: int, inputs: Tensor, settings: dict
    ) -> Tensor:
        called = set()

        def seam(layer: nn.Linear, x: Tensor) -> Tensor:
            index = next((i for i, known in enumerate(population.layers) if known is layer), None)
            if index is None:
                raise PopulationError(f"linear() got {layer}, which the network does not hold")
            called.add(index)
            return linear(layer, x, layer_index=index, **settings)

        outputs = population.network(inputs.expand(members, *inputs.shape), linear=seam)
        if len(called) < len(population.layers):
            raise PopulationError("a layer was not called through linear(layer, x)")
        return outputs

    def estimate(
        self, population: Population, layer_index: int, weights: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Ascent direction of one layer, (O, I) and (O,) or None, for weights (N,) of the pairs."""
        self.prepare(population)
        return estimate_layer(
            population.layers[layer_index],
            key=self.key,
            layer_index=layer_index,
            pairs=population.pairs,
            rank=population.rank,
            weights=weights,
        )
