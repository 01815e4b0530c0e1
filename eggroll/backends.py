"""How a population is evaluated: plainly, compiled, or by kernels of our own. One rule chooses.

eager    the plain twin: PyTorch operations, one after the other. Runs everywhere
compile  torch.compile fuses what lies between the matrix products: low-rank terms, activations and
         the fitness. The first step takes up to half a minute, once per machine and shape
triton   kernels that draw the noise where they use it (NVIDIA GPUs)

auto takes triton on a CUDA GPU where Triton is installed. On a CPU it takes compile where a C++
compiler is there and the run is long enough to earn the compilation back, else eager. So it never
makes a short run slower.
"""

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.estimator import estimate_layer
from eggroll.fitness import Fitness, cross_entropy
from eggroll.noise import LayerNoise
from eggroll.perturbed import shared_products
from eggroll.population import Chunk, Population, draw_keyed, perturbed_forward

BACKENDS = ("auto", "eager", "compile", "triton")

# Forward passes of one example through one member beyond which compiling pays on a CPU: it saves
# 0.1 to 0.4 microseconds of each, and costs 2 to 25 s (machines differ, and a second run finds
# what the first has compiled).
WORTH_COMPILING = 100_000_000


class BackendError(RuntimeError):
    """A backend that is not known, or whose tools are not installed."""


def choose_backend(
    name: str, device: torch.device, forward_passes: float = 0, layerwise: bool = False
) -> str:
    """The backend that `name` means for a run of so many forward passes of one example.

    layerwise  for members that perturb one layer each, which have no kernels of their own
    Raises BackendError, with what to install, where the one that was asked for is not there.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r} is not known (try {', '.join(BACKENDS)})")
    if name == "triton" and layerwise:
        raise BackendError(
            "the triton kernels are for members that perturb all layers (try compile)"
        )
    if name == "auto":
        if device.type == "cuda" and layerwise:
            return "eager" if _missing("triton", device) else "compile"
        if device.type == "cuda":
            return "eager" if _missing("triton", device) else "triton"
        worth = device.type == "cpu" and forward_passes > WORTH_COMPILING
        return "compile" if worth and not _missing("compile", device) else "eager"
    if missing := _missing(name, device):
        raise BackendError(f"backend {name} is not available: {missing}")
    return name


def make_backend(name: str) -> "Eager":
    """`name` as `choose_backend` returns it."""
    if name == "triton":
        from eggroll.kernels.backend import Triton  # Triton is installed on few machines

        return Triton()
    return {"eager": Eager, "compile": Compiled}[name]()


def _missing(name: str, device: torch.device) -> str:
    """What a backend lacks here and how to get it; empty where it can run."""
    if name == "compile" and device.type == "cpu":
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "torch.compile needs a C++ compiler on a CPU (Debian, Ubuntu: apt install g++)"
    elif name == "triton":
        if device.type != "cuda":
            return f"its kernels need a CUDA GPU, and the device is {device.type} (try compile)"
        if not importlib.util.find_spec("triton"):
            return "Triton is not installed (pip install triton)"
    return ""


class Eager:
    """The plain twin of every other backend."""

    def prepare(self, population: Population) -> None:
        """Once before a population is evaluated or estimated from: nothing to do here."""

    def noise(self, population: Population, layer_index: int, block: int) -> LayerNoise:
        """The noise of one block of pairs for one layer."""
        return draw_keyed(population, layer_index, block)

    def share(self, population: Population, inputs: Tensor) -> Any:
        """What all chunks that see these inputs (B, ...) have in common, for `forward`."""
        return shared_products(population.network, population.layers, inputs)

    def forward(self, chunk: Chunk, inputs: Tensor, shared: Any) -> Tensor:
        """Outputs (P, B, ...) of a chunk's members for inputs (B, ...)."""
        return chunk.forward(inputs, shared)

    def score(
        self, chunk: Chunk, inputs: Tensor, labels: Tensor, fitness: Fitness, shared: Any
    ) -> Tensor:
        """What the fitness says of these outputs: (P, B) or (P,)."""
        return fitness(self.forward(chunk, inputs, shared), labels)

    def estimate(
        self, population: Population, layer_index: int, weights: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Ascent direction of one layer, (O, I) and (O,) or None, for weights (N,) of the pairs."""
        layer = population.layers[layer_index]
        return estimate_layer(layer, population.noise_blocks(layer_index), weights)


class FirstShape:
    """torch.compile of `function` for the shapes that come first; any other takes the plain twin.

    A batch that is cut off at the end of an epoch, or a last block with fewer pairs, is rare: to
    compile again for it would cost more than it saves. Numbers and lists among the arguments (a
    layer's index, say) are compiled in, each value with a first shape of its own.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.plain = function
        self.compiled = torch.compile(function, dynamic=False)
        self.shapes: dict[tuple, tuple] = {}

    def __call__(self, *args: Any) -> Tensor:
        numbers = tuple(arg for arg in args if isinstance(arg, int))
        shapes = tuple(arg.shape for arg in args if isinstance(arg, Tensor))
        same = self.shapes.setdefault(numbers, shapes) == shapes
        return (self.compiled if same else self.plain)(*args)


class Compiled(Eager):
    """The whole of a chunk, from noise to scores, through torch.compile."""

    def __init__(self):
        self.compiled = FirstShape(_scores_of_tensors)
        self.fitness: Fitness | None = None

    @torch.no_grad()
    def score(
        self, chunk: Chunk, inputs: Tensor, labels: Tensor, fitness: Fitness, shared: Any
    ) -> Tensor:
        population = chunk.population
        # a number would be compiled in, and sigma may follow a schedule
        sigma = torch.tensor(population.sigma, device=inputs.device, dtype=inputs.dtype)
        factors = [f for noise in chunk.draw() for f in (noise.a, noise.b, noise.bias)]
        fixed = (population.network, population.layers, self._compilable(fitness))
        return self.compiled(*fixed, sigma, inputs, labels, *shared, *factors)

    def _compilable(self, fitness: Fitness) -> Fitness:
        """`compilable`, once for a fitness: another wrapper would be compiled anew."""
        if fitness is not self.fitness:
            self.fitness, self.followed = fitness, compilable(fitness)
        return self.followed


def compilable(fitness: Fitness) -> Fitness:
    """The fitness, for compiled code to call.

    The package's own are compiled with what comes before them. What others wrote is run as it is:
    it may read files, talk to programs and do all else that no compiler follows.
    """
    if getattr(fitness, "__module__", "") == cross_entropy.__module__:
        return fitness

    @torch.compiler.disable
    def as_it_is(outputs: Tensor, labels: Tensor) -> Tensor:
        return fitness(outputs, labels)

    return as_it_is


def _scores_of_tensors(
    network: nn.Module,
    layers: list[nn.Linear],
    fitness: Fitness,
    sigma: Tensor,
    inputs: Tensor,
    labels: Tensor,
    *tensors: Tensor | None,
) -> Tensor:
    shared, factors = list(tensors[: len(layers)]), tensors[len(layers) :]
    noise = [LayerNoise(*factors[i : i + 3]) for i in range(0, len(factors), 3)]
    outputs = perturbed_forward(network, layers, noise, sigma, inputs, shared)
    return fitness(outputs, labels)
