"""EGGROLL beside three libraries for evolution strategies, on the same task and the same CPU.

pip install -r benchmarks/requirements.txt
python benchmarks/peers.py            # seconds per generation, and accuracy after 60 s of training
python benchmarks/peers.py --quick    # about a minute, for a look

Same for all: network (784-256-256-10, GELU, no biases) and its first weights, population, batches,
fitness (mean log-likelihood of the labels at temperature 2, z-scored over the population), float32
on the CPU. Each library goes its own fastest documented way of those that were tried (its class
says which). They differ in how they perturb: EGGROLL and evox-lora draw rank-one noise; evosax,
evotorch and evox draw full-rank noise and form the whole population in memory.

Every library runs in a process of its own, so that no thread pool is in another's way, and works
only when it is told to: EGGROLL and the peer take turns of `--turn` seconds (one generation at the
least), after an untimed warm-up that also compiles. Threads that wait sleep and do not spin
(OMP_WAIT_POLICY), for all alike. One peer at a time is kept in memory: a materialised population
is 1 GB, and there are several copies of it. Times are medians over all generations; the ratio
compares the peer with the EGGROLL turns that lay between the peer's own. Then each trains alone
from the same weights until `--seconds` have been spent in generations.

Settings were chosen on the validation split, by runs of as many generations as a minute allows on
two cores: SGD with and without momentum and Adam, learning rates a factor of 2 to 3 apart, sigma
0.005 to 0.05, constant or falling linearly to 0. A constant Adam is best where there are few.
"""

import importlib.metadata
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, from any folder

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
from lab.cli import PathFlag
from lab.clock import device_name
from lab.errors import UserError
from lab.evaluation import measure
from lab.runlog import commit, write_csv, write_text

CPU = torch.device("cpu")
TEMPERATURE = 2.0
INSTALL = "pip install -r benchmarks/requirements.txt"
COLUMNS = (
    "library",
    "version",
    "algorithm",
    "population",
    "batch",
    "seconds_per_generation",
    "p10",
    "p90",
    "ratio_to_ours",
    "test_accuracy",
    "train_seconds",
    "generations",
    "cpu",
    "torch",
    "commit",
)
SHOWN = ("library", "version", "algorithm", *COLUMNS[5:12])
OURS = "eggroll"
Name = Literal["eggroll", "eggroll-example", "evosax", "evotorch", "evox", "evox-lora"]


@dataclass(frozen=True)
class Config:
    """EGGROLL beside evosax, evotorch and EvoX: seconds per generation, and what a minute buys."""

    only: tuple[Name, ...] = ()
    """Libraries to run (default: all); eggroll always runs, the ratios need it."""
    population: int = 1000
    """Members per generation; an even number."""
    batch_size: int = 128
    """Examples that every member of a generation sees."""
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
    data_dir: PathFlag = None
    """Folder of MNIST in torchvision's layout (default: $MNIST_DIR, else data)."""
    dataset: Literal["mnist", "mnist-sample"] = "mnist"
    """mnist-sample is 5,000 digits that need no network."""
    csv: Path = Path("results/peers.csv")
    """File for the table."""
    json: PathFlag = None
    """File for the same rows as a list of JSON objects."""
    quick: bool = False
    """About a minute: population 100, 2 rounds, 3 seconds of training."""


# ---- the libraries, behind one interface ----


class Peer(Protocol):
    """One library, set up for the task.

    `start` is the network whose weights the search begins at. Nothing is timed but `generation`.
    """

    package: str
    algorithm: str

    def __init__(self, start: MLP, population: int, seed: int): ...

    def reset(self) -> None:
        """Back to the first weights, keeping what was compiled."""

    def generation(self, images: Tensor, labels: Tensor, progress: float) -> None:
        """One generation on a batch (B, 784), (B,); progress is the part of the training done."""

    def weights(self) -> list[Tensor]:
        """The centre of the search: one (O, I) matrix per layer."""


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch of the labels' log-likelihood at the temperature; logits (B, 10)."""
    return -F.cross_entropy(logits / TEMPERATURE, labels)


class Eggroll:
    """This repository's batch members: rank-one noise, antithetic pairs, SGD with momentum 0.9.

    The learning rate falls linearly to 0 over the training, as in mnist_eggroll.py.
    """

    package, algorithm = "eggroll-mnist", "EGGROLL, batch members, rank 1, SGD 0.015"
    lr = 0.015

    def __init__(self, start: MLP, population: int, seed: int):
        self.start, self.network = start.state_dict(), MLP()
        self.population, self.seed = population, seed
        self.reset()

    def members(self) -> BatchMembers | ExampleMembers:
        return BatchMembers(self.population)

    def reset(self) -> None:
        self.network.load_state_dict(self.start)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=self.lr, momentum=0.9)
        self.evolution = Evolution(
            self.network, cross_entropy(TEMPERATURE), self.members(), seed=self.seed
        )

    def generation(self, images: Tensor, labels: Tensor, progress: float) -> None:
        self.optimizer.param_groups[0]["lr"] = self.lr * (1 - progress)
        self.evolution.backward(self.evolution.evaluate(images, labels))
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [layer.weight.detach() for layer in self.network.layers]


class EggrollExample(Eggroll):
    """Example members, as many as there are orthogonal rows for: at most 528."""

    algorithm = "EGGROLL, example members, SGD 0.06"
    lr = 0.06

    def members(self) -> ExampleMembers:
        return ExampleMembers(self.population)


class Evosax:
    """Open_ES under one jax.jit: ask, a lax.map over the members, tell.

    lax.map evaluates one member after the other, each with all threads: on a CPU it takes half of
    the time that jax.vmap does, whose batched products are slow there. JAX's default random
    numbers: "rbg", faster on a TPU, is slower on a CPU.
    """

    package, algorithm = "evosax", "Open_ES (OpenAI-ES), Adam 0.01"
    lr, sigma = 0.01, 0.01

    def __init__(self, start: MLP, population: int, seed: int):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax
        import optax
        from evosax.algorithms import Open_ES
        from evosax.core.fitness_shaping import standardize_fitness_shaping_fn

        self.jax, self.seed = jax, seed
        self.start = [jax.numpy.asarray(layer.weight.detach().T.numpy()) for layer in start.layers]
        self.search = Open_ES(
            population,
            self.start,
            optimizer=optax.adam(self.lr),
            std_schedule=optax.constant_schedule(self.sigma),
            fitness_shaping_fn=standardize_fitness_shaping_fn,
        )
        self.step = jax.jit(self._step, donate_argnums=(0, 1))
        self.reset()

    def reset(self) -> None:
        self.key = self.jax.random.key(self.seed)
        self.state = self.search.init(self.key, self.start, self.search.default_params)

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
        from evotorch.neuroevolution.net import make_functional_module

        torch.manual_seed(seed)
        self.start, self.population = start, population
        call = make_functional_module(start, disable_autograd_tracking=True)

        def score(member: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            return log_likelihood(call(member, images), labels)

        self.score = torch.func.vmap(score, in_dims=(0, None, None))
        self.reset()

    def reset(self) -> None:
        from evotorch.algorithms.functional import pgpe

        self.state = pgpe(
            center_init=nn.utils.parameters_to_vector(self.start.parameters()).detach(),
            center_learning_rate=self.lr,
            stdev_learning_rate=0.0,
            stdev_init=self.sigma,
            objective_sense="max",
            ranking_method="normalized",
            optimizer="adam",
        )

    @torch.no_grad()
    def generation(self, images: Tensor, labels: Tensor, progress: float) -> None:
        from evotorch.algorithms.functional import pgpe_ask, pgpe_tell

        population = pgpe_ask(self.state, popsize=self.population)
        scores = self.score(population, images, labels)
        self.state = pgpe_tell(self.state, population, scores)

    def weights(self) -> list[Tensor]:
        return unflatten(self.state.optimizer_state.center, self.start)


class Batch:
    """A data loader that gives the batch of the present generation, again and again."""

    present: tuple[Tensor, Tensor]

    def __iter__(self) -> "Batch":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return self.present


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
    random numbers take the time, and takes 15 s to compile. Its Adam has no bias correction: the
    first steps are about three times as long, and want a smaller learning rate than the others'.
    """

    package, algorithm = "evox", "OpenES, Adam 0.0015"
    lr, sigma = 0.0015, 0.01

    def __init__(self, start: MLP, population: int, seed: int):
        from evox.utils import ParamsAndVector

        torch.manual_seed(seed)
        first, second, head = start.layers
        self.model = nn.Sequential(first, nn.GELU(), second, nn.GELU(), head)
        self.start, self.population, self.batch = start, population, Batch()
        self.vector = ParamsAndVector(self.model)
        self.centre = nn.utils.parameters_to_vector(start.parameters()).detach()
        self.workflow = self._workflow()

    def _workflow(self) -> Any:
        from evox.algorithms.so.es_variants import OpenES
        from evox.problems.neuroevolution.supervised_learning import SupervisedLearningProblem
        from evox.workflows import StdWorkflow

        return StdWorkflow(
            OpenES(self.population, self.centre.clone(), self.lr, self.sigma, optimizer="adam"),
            SupervisedLearningProblem(
                self.model, self.batch, TemperedLoss(), pop_size=self.population
            ),
            solution_transform=self.vector,
            fitness_transform=ZScore(),
        )

    def reset(self) -> None:
        algorithm = self.workflow.algorithm
        algorithm.center = self.centre.clone()
        algorithm.exp_avg = torch.zeros_like(self.centre)
        algorithm.exp_avg_sq = torch.zeros_like(self.centre)

    @torch.no_grad()
    def generation(self, images: Tensor, labels: Tensor, progress: float) -> None:
        self.batch.present = images, labels
        self.workflow.step()

    def weights(self) -> list[Tensor]:
        return unflatten(self.workflow.algorithm.center, self.start)


class EvoxLora(Evox):
    """VirtualLoRAES: like EGGROLL it draws low-rank noise and never forms a member's weights.

    Rank one, as EGGROLL's here; it has no antithetic pairs.
    """

    algorithm = "VirtualLoRAES, rank 1, Adam 0.0015"
    lr, sigma = 0.0015, 0.01

    def _workflow(self) -> Any:
        from evox.algorithms.so.es_variants.virtual_lora_es import VirtualLoRAES
        from evox.problems.neuroevolution.virtual_lora_problem import VirtualLoRAProblem
        from evox.workflows import StdWorkflow

        shapes = [tuple(p.shape) for p in self.model.parameters()]
        return StdWorkflow(
            VirtualLoRAES(
                param_shapes=shapes,
                lora_rank=1,
                pop_size=self.population,
                center_init=self.centre.clone(),
                learning_rate=self.lr,
                noise_stdev=self.sigma,
                optimizer="adam",
            ),
            VirtualLoRAProblem(self.model, self.batch, TemperedLoss(), lora_rank=1),
            fitness_transform=ZScore(),
        )


PEERS: dict[str, type[Peer]] = {
    "eggroll": Eggroll,
    "eggroll-example": EggrollExample,
    "evosax": Evosax,
    "evotorch": Evotorch,
    "evox": Evox,
    "evox-lora": EvoxLora,
}


def unflatten(vector: Tensor, network: MLP) -> list[Tensor]:
    """A flat vector as the matrices of a network, (O, I) each."""
    shapes = [layer.weight.shape for layer in network.layers]
    parts = vector.detach().split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


# ---- in a library's own process ----


class Worker:
    """One library with its data: does what the parent asks for, one request at a time."""

    def __init__(self, name: str, config: Config):
        # without it large tensors are mapped and cleared anew each time; the peers gain as well
        keep_freed_memory(2047)  # MB: mallopt's largest, and more than a materialised population
        folder = data.default_data_dir(config.data_dir)
        self.digits = data.load(config.dataset, folder, CPU)
        self.config, self.network = config, MLP(seed=config.seed)
        self.peer = PEERS[name](MLP(seed=config.seed), config.population, config.seed)
        self.batches = self._batches()

    def _batches(self) -> Any:
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

    def turn(self) -> list[float]:
        """Seconds of each generation of one turn."""
        seconds: list[float] = []
        while not seconds or sum(seconds) < self.config.turn:
            seconds.append(self.generation())
        return seconds

    def train(self) -> tuple[float, float, int]:
        """Accuracy as a fraction, the seconds spent in generations, and how many there were.

        From the first weights on; it ends with the generation that passes the limit.
        """
        self.peer.reset()
        self.batches = self._batches()
        spent, generations = 0.0, 0
        while spent < self.config.seconds:
            spent += self.generation(spent / self.config.seconds)
            generations += 1
        return self.accuracy(), spent, generations

    def accuracy(self) -> float:
        for layer, weight in zip(self.network.layers, self.peer.weights(), strict=True):
            layer.weight.data.copy_(weight)
        return measure(self.network, self.digits, getattr(self.digits, self.config.split))[0]


def serve(pipe: Any, name: str, config: Config) -> None:
    """The worker's process: requests are names of Worker's methods; an error is sent back."""
    try:
        worker = Worker(name, config)
        while request := pipe.recv():
            pipe.send(getattr(worker, request)())
    except (EOFError, KeyboardInterrupt):
        return
    except UserError as error:
        pipe.send(error)
    except Exception as error:  # whatever a library raises: the others are still to be measured
        pipe.send(UserError(f"{name} failed: {type(error).__name__}: {error}"))


# ---- in the parent ----


class Remote:
    """A library in a process of its own."""

    def __init__(self, name: str, config: Config):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, config), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, request: str) -> Any:
        """Raises UserError where the worker did, or where it died."""
        try:
            self.pipe.send(request)
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError(
                f"{self.name} ended without an answer, for want of memory perhaps (try a smaller "
                "--population, or leave it out with --only)"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: Any) -> None:
        self.pipe.close()
        self.process.join(timeout=5)
        self.process.terminate()


def version(name: str) -> str | None:
    """The installed version of a library; None where it is not installed."""
    if name.startswith(OURS):
        return "this checkout"
    try:
        return importlib.metadata.version(PEERS[name].package)
    except importlib.metadata.PackageNotFoundError:
        return None


def turns(ours: Remote, peer: Remote, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of every generation of both, turn by turn, after two untimed ones of the peer."""
    for _ in range(2):  # the first compiles, the second is the first to find its memory in place
        peer.ask("generation")
    timed: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for library, seconds in zip((ours, peer), timed, strict=True):
            seconds += library.ask("turn")
    return timed


def row(name: str, config: Config) -> dict[str, Any]:
    """What is known of a library before it has run."""
    return {
        "library": name,
        "version": version(name) or "not installed",
        "algorithm": PEERS[name].algorithm,
        "population": config.population,
        "batch": config.batch_size,
        "cpu": device_name(CPU),
        "torch": torch.__version__,
        "commit": commit(),
    }


def times(seconds: list[float], ours: float) -> dict[str, float]:
    """Columns for the seconds of one library's generations; `ours` is EGGROLL's median."""
    *_, p90 = deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    median = statistics.median(seconds)
    values = {"p10": deciles[0], "p90": p90, "ratio_to_ours": median / ours}
    return {"seconds_per_generation": round(median, 4)} | {
        k: round(v, 4) for k, v in values.items()
    }


def training(library: Remote, config: Config) -> dict[str, float]:
    """Columns of the training, where there is one."""
    if not config.seconds:
        return {}
    accuracy, seconds, generations = library.ask("train")
    return {
        "test_accuracy": accuracy,
        "train_seconds": round(seconds, 2),
        "generations": generations,
    }


def measure_all(config: Config, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row per library. EGGROLL's times are those of all its turns, beside whatever peer."""
    names = [name for name in PEERS if name in (OURS, *(config.only or PEERS))]
    rows = {name: row(name, config) for name in names}
    with Remote(OURS, config) as ours:
        ours.ask("generation")
        own_seconds = [] if len(names) > 1 else ours.ask("turn")
        for name in names:
            if name == OURS or version(name) is None:
                continue
            say(f"{name}: {config.rounds} turns, {config.seconds:g} s of training")
            try:
                with Remote(name, config) as peer:
                    between, seconds = turns(ours, peer, config.rounds)
                    own_seconds += between
                    rows[name] |= times(seconds, statistics.median(between))
                    rows[name] |= training(peer, config)
            except UserError as error:  # the other rows are worth having
                say(str(error))
        own_seconds = own_seconds or ours.ask("turn")
        say(f"{OURS}: {config.seconds:g} s of training")
        rows[OURS] |= times(own_seconds, statistics.median(own_seconds)) | training(ours, config)
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns: text to the left, numbers to the right."""
    cells = [list(SHOWN)] + [[str(row.get(column, "")) for column in SHOWN] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(values: list[str]) -> str:
        padded = (
            value.ljust(width) if index < 3 else value.rjust(width)
            for index, (value, width) in enumerate(zip(values, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, cells))


def checked(config: Config) -> Config:
    """The settings as they run. Raises UserError, PopulationError for what cannot be."""
    if config.quick:
        quick = {"population": 100, "rounds": 2, "seconds": 3.0}
        config = Config(**asdict(config) | quick)
    BatchMembers(config.population)  # raises what the run would raise
    for flag, least in (("batch_size", 1), ("rounds", 1), ("turn", 0), ("seconds", 0), ("seed", 0)):
        if not getattr(config, flag) >= least:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {getattr(config, flag)} is below {least} (type {least})")
    return config


def main() -> None:
    config = checked(tyro.cli(Config, config=cli.MARKERS))
    # for the workers: a spinning thread of one would slow the others, tenfold on two busy cores
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    rows = measure_all(config, lambda text: print(text, file=sys.stderr, flush=True))
    print(table(rows))
    missing = [row["library"] for row in rows if row["version"] == "not installed"]
    if missing:
        print(f"not installed: {', '.join(missing)} (type: {INSTALL})")
    config.csv.parent.mkdir(parents=True, exist_ok=True)
    write_csv(config.csv, rows, COLUMNS)
    if config.json:
        write_text(config.json, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    cli.run_script(main, "peers.py", errors=(PopulationError, FitnessError))
