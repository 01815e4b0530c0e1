"""Libraries for evolution strategies behind one interface, each set up for the task of peers.py."""

import os
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eggroll import MLP, BatchMembers, Evolution, ExampleMembers, cross_entropy

TEMPERATURE = 2.0
OURS = "eggroll-batch"


class Peer(Protocol):
    """One library, set up for the task; `start` has the weights that the search begins at."""

    package: str  # as pip knows it; none for this repository
    algorithm: str

    def __init__(self, start: MLP, population: int, seed: int): ...

    def generation(self, images: Tensor, labels: Tensor, progress: float) -> None:
        """One generation on a batch (B, 784), (B,); progress is the part of the training done."""

    def weights(self) -> list[Tensor]:
        """Where the search is: one (O, I) matrix per layer."""


class BatchEggroll:
    """Batch members; the learning rate falls linearly to 0 over the training."""

    package, algorithm = "", "batch members, rank 1, SGD 0.0125"
    lr, kind = 0.0125, BatchMembers

    def __init__(self, start: MLP, population: int, seed: int):
        self.network, members = start, self.kind(population)
        self.optimizer = torch.optim.SGD(start.parameters(), lr=self.lr, momentum=0.9)
        self.evolution = Evolution(start, cross_entropy(TEMPERATURE), members, seed=seed)

    def generation(self, images: Tensor, labels: Tensor, progress: float) -> None:
        self.optimizer.param_groups[0]["lr"] = self.lr * (1 - progress)
        self.evolution.backward(self.evolution.evaluate(images, labels))
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [layer.weight.detach() for layer in self.network.layers]


class ExampleEggroll(BatchEggroll):
    """Example members; at temperature 2 the gradient is about half as long, and the rate higher."""

    algorithm = "example members, SGD 0.1"
    lr, kind = 0.1, ExampleMembers


class Evosax:
    """Open_ES under one jax.jit: ask, a lax.map over the members, tell.

    lax.map evaluates one member after the other, each with all threads: on a CPU it takes half of
    the time that jax.vmap does, whose batched products are slow there.
    """

    package, algorithm = "evosax", "Open_ES (OpenAI-ES), Adam 0.01"
    lr, sigma = 0.01, 0.01

    def __init__(self, start: MLP, population: int, seed: int):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax
        import optax
        from evosax.algorithms import Open_ES
        from evosax.core.fitness_shaping import standardize_fitness_shaping_fn

        self.jax = jax
        weights = [jax.numpy.asarray(layer.weight.detach().T.numpy()) for layer in start.layers]
        self.search = Open_ES(
            population,
            weights,
            optimizer=optax.adam(self.lr),
            std_schedule=optax.constant_schedule(self.sigma),
            fitness_shaping_fn=standardize_fitness_shaping_fn,
        )
        self.step = jax.jit(self._step, donate_argnums=(0, 1))
        self.key = jax.random.key(seed)
        self.state = self.search.init(self.key, weights, self.search.default_params)

    def _step(self, key: Any, state: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        params = self.search.default_params
        key, ask, tell = self.jax.random.split(key, 3)
        population, state = self.search.ask(ask, state, params)
        losses = self.jax.lax.map(lambda member: self._loss(member, images, labels), population)
        state, _ = self.search.tell(tell, population, losses, state, params)
        return key, state

    def _loss(self, weights: list[Any], x: Any, labels: Any) -> Any:
        for weight in weights[:-1]:
            x = self.jax.nn.gelu(x @ weight, approximate=False)
        log_p = self.jax.nn.log_softmax(x @ weights[-1] / TEMPERATURE)
        return -self.jax.numpy.take_along_axis(log_p, labels[:, None], axis=1).mean()

    def generation(self, images: Tensor, labels: Tensor, progress: float) -> None:
        arrays = (self.jax.numpy.asarray(tensor.numpy()) for tensor in (images, labels))
        self.key, self.state = self.step(self.key, self.state, *arrays)
        self.jax.block_until_ready(self.state)

    def weights(self) -> list[Tensor]:
        mean = self.search.get_mean(self.state)
        return [torch.tensor(self.jax.device_get(weight)).T for weight in mean]


class Evotorch:
    """PGPE of the functional API, antithetic, fixed sigma, members batched by torch.func.vmap.

    The class PGPE with a vectorised Problem does the same in up to twice the time.
    """

    package, algorithm = "evotorch", "PGPE, fixed sigma, Adam 0.01"
    lr, sigma = 0.01, 0.01

    def __init__(self, start: MLP, population: int, seed: int):
        from evotorch.algorithms.functional import pgpe, pgpe_ask, pgpe_tell
        from evotorch.neuroevolution.net import make_functional_module

        torch.manual_seed(seed)
        self.start, self.population, self.ask, self.tell = start, population, pgpe_ask, pgpe_tell
        call = make_functional_module(start, disable_autograd_tracking=True)

        def score(member: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            return -F.cross_entropy(call(member, images) / TEMPERATURE, labels)

        self.score = torch.func.vmap(score, in_dims=(0, None, None))
        self.state = pgpe(
            center_init=nn.utils.parameters_to_vector(start.parameters()).detach(),
            center_learning_rate=self.lr,
            stdev_learning_rate=0.0,
            stdev_init=self.sigma,
            objective_sense="max",
            ranking_method="normalized",
            optimizer="adam",
        )

    @torch.no_grad()
    def generation(self, images: Tensor, labels: Tensor, progress: float) -> None:
        population = self.ask(self.state, popsize=self.population)
        self.state = self.tell(self.state, population, self.score(population, images, labels))

    def weights(self) -> list[Tensor]:
        return unflatten(self.state.optimizer_state.center, self.start)


class Present:
    """A data loader that gives the batch of the present generation, again and again."""

    batch: tuple[Tensor, Tensor]

    def __iter__(self) -> "Present":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return self.batch


class TemperedLoss(nn.Module):
    """EvoX minimises: the negative log-likelihood of every example."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits / TEMPERATURE, labels, reduction="none")


class ZScore(nn.Module):
    """EvoX's own strategies do not shape the fitness; the workflow takes a transform."""

    def forward(self, fitness: Tensor) -> Tensor:
        return (fitness - fitness.mean()) / fitness.std()


class Evox:
    """OpenES, mirrored, in the standard workflow with a SupervisedLearningProblem (vmap).

    Eager: torch.compile of the step is no faster on a CPU, where the matrix products and the
    random numbers take the time. Its Adam has no bias correction: the first steps are about three
    times as long, and want a smaller learning rate than the others'.
    """

    package, algorithm = "evox", "OpenES, Adam 0.0015"
    lr, sigma = 0.0015, 0.01

    def __init__(self, start: MLP, population: int, seed: int):
        from evox.workflows import StdWorkflow

        torch.manual_seed(seed)
        first, second, head = start.layers
        self.model = nn.Sequential(first, nn.GELU(), second, nn.GELU(), head)
        self.start, self.population, self.present = start, population, Present()
        self.first = nn.utils.parameters_to_vector(start.parameters()).detach()
        self.workflow = StdWorkflow(**self._parts(), fitness_transform=ZScore())

    def _parts(self) -> dict[str, Any]:
        from evox.algorithms.so.es_variants import OpenES
        from evox.problems.neuroevolution.supervised_learning import SupervisedLearningProblem
        from evox.utils import ParamsAndVector

        return {
            "algorithm": OpenES(
                self.population, self.first, self.lr, self.sigma, optimizer="adam"
            ),
            "problem": SupervisedLearningProblem(
                self.model, self.present, TemperedLoss(), pop_size=self.population
            ),
            "solution_transform": ParamsAndVector(self.model),
        }  # fmt: skip

    @torch.no_grad()
    def generation(self, images: Tensor, labels: Tensor, progress: float) -> None:
        self.present.batch = images, labels
        self.workflow.step()

    def weights(self) -> list[Tensor]:
        return unflatten(self.workflow.algorithm.center, self.start)


class EvoxLora(Evox):
    """VirtualLoRAES: like EGGROLL it never forms a member's weights. It has no antithetic pairs."""

    algorithm = "VirtualLoRAES, rank 1, Adam 0.0015"

    def _parts(self) -> dict[str, Any]:
        from evox.algorithms.so.es_variants.virtual_lora_es import VirtualLoRAES
        from evox.problems.neuroevolution.virtual_lora_problem import VirtualLoRAProblem

        algorithm = VirtualLoRAES(
            param_shapes=[tuple(p.shape) for p in self.model.parameters()],
            lora_rank=1,
            pop_size=self.population,
            center_init=self.first,
            learning_rate=self.lr,
            noise_stdev=self.sigma,
            optimizer="adam",
        )
        problem = VirtualLoRAProblem(self.model, self.present, TemperedLoss(), lora_rank=1)
        return {"algorithm": algorithm, "problem": problem}


class Torcheggroll:
    """Another EGGROLL in PyTorch: antithetic pairs, rank one, all members' weights by vmap."""

    package, algorithm = "torcheggroll", "rank 1, antithetic, SGD 1.0, sigma 0.02"
    lr, sigma = 1.0, 0.02

    def __init__(self, start: MLP, population: int, seed: int):
        from torcheggroll import TorchEggrollES

        self.start = start
        self.search = TorchEggrollES(start, population, sigma=self.sigma, lr=self.lr, rank=1)
        self.search.epoch = seed << 20  # its noise is keyed by the number of the step alone

    def generation(self, images: Tensor, labels: Tensor, progress: float) -> None:
        self.search.lr = self.lr * (1 - progress)
        self.search.step(images, lambda y, t: F.cross_entropy(y / TEMPERATURE, t), labels)

    def weights(self) -> list[Tensor]:
        return [layer.weight.detach() for layer in self.start.layers]


PEERS: dict[str, type[Peer]] = {
    OURS: BatchEggroll,
    "eggroll-example": ExampleEggroll,
    "evosax": Evosax,
    "evotorch": Evotorch,
    "evox": Evox,
    "evox-lora": EvoxLora,
    "torcheggroll": Torcheggroll,
}


def unflatten(vector: Tensor, network: MLP) -> list[Tensor]:
    """A flat vector as the matrices of a network, (O, I) each."""
    shapes = [layer.weight.shape for layer in network.layers]
    parts = vector.detach().split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
