"""EGGROLL beside four libraries for evolution strategies, on the same task and the same CPU.

pip install -r benchmarks/requirements.txt
python benchmarks/peers.py            # seconds per generation, and accuracy after a minute of each
python benchmarks/peers.py --quick    # about a minute in all, for a look

Same for all: network (784-256-256-10, GELU, no biases) and its first weights, population, batches,
fitness (log-likelihood of the labels at temperature 2), float32 on the CPU. Population counts the
members that see each image; 528 is the most that example members have. Each library goes its own
fastest documented way of those that were tried (its adapter says which). They differ in how they
perturb: EGGROLL's batch members, torcheggroll and evox-lora draw rank-one noise; evosax, evotorch
and evox draw full-rank noise. All but EGGROLL and evox-lora form the whole population in memory.

Every library works in a process of its own. Batch members and one other library take turns of
`--turn` seconds (one generation at the least) after two untimed generations; times are medians over
the turns, and the ratio is to batch members in the same turns. Then each trains alone from the same
first weights until `--seconds` are spent in generations; the first one, which compiles, is not
timed. The peers' settings were chosen on the validation split at population 1,000: optimizer,
learning rate, sigma 0.005 to 0.05, constant or falling rate.
"""

import importlib.metadata
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder

from benchmarks.rows import provenance, show, write_rows
from eggroll import (
    MLP,
    BatchMembers,
    Evolution,
    ExampleMembers,
    FitnessError,
    PopulationError,
    cross_entropy,
)
from eggroll.memory import keep_freed_memory
from lab import cli, data
from lab.cli import DataFlags, PathFlag
from lab.errors import UserError
from lab.evaluation import measure

CPU = torch.device("cpu")
TEMPERATURE = 2.0
INSTALL = "pip install -r benchmarks/requirements.txt"
COLUMNS = ("library", "version", "algorithm", "population", "seconds_per_generation")
COLUMNS += ("ratio_to_ours", "accuracy", "train_seconds", "generations", "batch", "split")
COLUMNS += ("device", "torch", "commit")
OURS = "eggroll-batch"
Name = Literal["eggroll-example", "evosax", "evotorch", "evox", "evox-lora", "torcheggroll"]


@dataclass(frozen=True)
class Config:
    """EGGROLL beside other libraries: seconds per generation, and what a minute buys."""

    only: tuple[Name, ...] = ()
    """What to compare batch members with (default: all that is installed)."""
    population: int = 528
    """Members that see each image, per generation; an even number."""
    batch_size: int = 128
    """Examples per generation."""
    rounds: int = 5
    """Timed turns of each library."""
    turn: float = 1.0
    """Seconds that a turn lasts at the least; it ends with a whole generation."""
    seconds: float = 60.0
    """Of training, before the accuracy is measured; 0 leaves the training out."""
    split: Literal["test", "validation"] = "test"
    """What the accuracy is measured on; settings are chosen on the validation split."""
    seed: int = 0
    """Of the first weights, the batches and all noise."""
    dataset: Literal["mnist", "mnist-sample"] = "mnist"
    """mnist-sample is 5,000 digits that need no network."""
    data_dir: PathFlag = None
    """Folder in torchvision's layout (default: $MNIST_DIR, else data)."""
    quick: bool = False
    """About a minute: population 96, 2 rounds, 3 seconds of training."""
    csv: PathFlag = None
    """File for the rows."""
    json: PathFlag = None
    """File for the rows as a JSON list."""


# ---- the libraries, behind one interface ----


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


# ---- in a library's own process ----


class Worker:
    """One library with its data."""

    def __init__(self, name: str, config: Config):
        # without it large tensors are mapped and cleared anew each time; the peers gain as well
        keep_freed_memory(2047)  # MB: mallopt's largest
        self.name, self.config = name, config
        self.digits = data.load_for(DataFlags(config.dataset, config.data_dir), CPU)
        self._start()
        self.generation(), self.generation()  # the second is the first to find its memory in place

    def _start(self) -> None:
        start = MLP(seed=self.config.seed)
        self.peer = PEERS[self.name](start, self.config.population, self.config.seed)
        self.batches = self._batches()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, 784) and labels (B,) without end; the same order in every worker."""
        generator = torch.Generator().manual_seed(self.config.seed)
        size, train = self.config.batch_size, self.digits.train
        while True:
            order = torch.randperm(len(train), generator=generator)
            for start in range(0, len(train) - size + 1, size):
                batch = train[order[start : start + size]]
                yield self.digits.scale(batch.images), batch.labels

    def generation(self, progress: float = 0.0) -> float:
        """Seconds that one generation took."""
        images, labels = next(self.batches)
        start = time.perf_counter()
        self.peer.generation(images, labels, progress)
        return time.perf_counter() - start

    def turn(self) -> float:
        """Mean seconds of the generations of one turn."""
        seconds: list[float] = []
        while not seconds or sum(seconds) < self.config.turn:
            seconds.append(self.generation())
        return statistics.mean(seconds)

    def train(self) -> dict[str, float]:
        """Columns of a training that ends with the generation that passes the limit."""
        self._start()
        self.generation()
        spent, generations = 0.0, 1
        while spent < self.config.seconds:
            spent += self.generation(spent / self.config.seconds)
            generations += 1
        network = MLP()
        for layer, weight in zip(network.layers, self.peer.weights(), strict=True):
            layer.weight.data.copy_(weight)
        accuracy = measure(network, self.digits, getattr(self.digits, self.config.split)).accuracy
        spent = round(spent, 2)
        return {"accuracy": accuracy, "train_seconds": spent, "generations": generations}


_workers: list[Worker] = []  # of this process: one


def _begin(name: str, config: Config) -> None:
    _workers.append(Worker(name, config))


def _do(request: str) -> Any:
    return getattr(_workers[0], request)()


# ---- in the parent ----


class Library:
    """A library in a process of its own, which raises there what it raises here."""

    def __init__(self, name: str, config: Config):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.pool.submit(_begin, name, config).result()

    def ask(self, request: str) -> Any:
        return self.pool.submit(_do, request).result()

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown()


def version(name: str) -> str | None:
    """The installed version of a library; None where it is not installed."""
    package = PEERS[name].package
    if not package:
        return "this checkout"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def row(name: str, config: Config, seconds: list[float], ours: list[float]) -> dict[str, Any]:
    """The columns of a library that was timed; those of the training are empty."""
    median = statistics.median(seconds)
    population = config.population
    if name == "eggroll-example":  # at most as many as there are orthogonal rows
        population = sum(n for _, n in ExampleMembers(population).counts([256, 256, 10]))
    return {
        "library": name,
        "version": version(name),
        "algorithm": PEERS[name].algorithm,
        "population": population,
        "seconds_per_generation": round(median, 5),
        "ratio_to_ours": round(median / statistics.median(ours), 4),
        **dict.fromkeys(("accuracy", "train_seconds", "generations"), ""),
        "batch": config.batch_size,
        "split": config.split,
    } | provenance(CPU)


def measure_all(config: Config, names: list[str]) -> list[dict[str, Any]]:
    """A row per library that ran. Batch members' own times are those of all their turns."""
    rows, own = [], []
    with Library(OURS, config) as ours:
        for name in names:
            try:
                with Library(name, config) as peer:
                    turns = [(ours.ask("turn"), peer.ask("turn")) for _ in range(config.rounds)]
                    between, seconds = map(list, zip(*turns, strict=True))
                    measured = row(name, config, seconds, between)
                    rows.append(measured | (peer.ask("train") if config.seconds else {}))
                    own += between
                    show(rows, COLUMNS[:9])
            except UserError:
                raise
            except Exception as error:  # whatever a library raises: the others are worth having
                print(
                    f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                )
        own = own or [ours.ask("turn")]
        rows.append(row(OURS, config, own, own) | (ours.ask("train") if config.seconds else {}))
        show(rows, COLUMNS[:9])
    return [rows[-1], *rows[:-1]]


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    if config.quick:
        config = replace(config, population=96, rounds=2, seconds=3.0)
    for flag, least in (("batch_size", 1), ("rounds", 1), ("turn", 0), ("seconds", 0), ("seed", 0)):
        if not getattr(config, flag) >= least:
            name = flag.replace("_", "-")
            raise UserError(
                f"--{name} {getattr(config, flag)} is below {least} (type {least} or more)"
            )
    BatchMembers(config.population)  # raises what the run would raise
    # for the workers: a spinning thread of one would slow the others, tenfold on two busy cores
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    asked = [name for name in PEERS if name in (config.only or PEERS) and name != OURS]
    if missing := [name for name in asked if version(name) is None]:
        print(f"not installed: {', '.join(missing)} (type: {INSTALL})")
    rows = measure_all(config, [name for name in asked if name not in missing])
    write_rows(rows, COLUMNS, config.csv, config.json)


if __name__ == "__main__":
    cli.run_script(main, "peers.py", errors=(PopulationError, FitnessError))
