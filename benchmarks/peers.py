"""EGGROLL beside four libraries for evolution strategies, on the same task and the same CPU.

pip install -r benchmarks/requirements.txt
python benchmarks/peers.py            # seconds per generation, and accuracy after a minute of each
python benchmarks/peers.py --quick    # about a minute in all, for a look

Same for all: network (784-256-256-10, GELU, no biases) and its first weights, population, batches,
fitness (log-likelihood of the labels at temperature 2), float32 on the CPU. Population counts the
members that see each image; 528 is the most that example members have. Each library goes its own
fastest documented way of those that were tried (peer_libraries.py says which). They differ in how
they perturb: EGGROLL's batch members, torcheggroll and evox-lora draw rank-one noise; evosax,
evotorch and evox draw full-rank noise. All but EGGROLL and evox-lora form the whole population in
memory.

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
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder

from benchmarks.peer_libraries import OURS, PEERS
from benchmarks.rows import provenance, show, write_rows
from eggroll import MLP, BatchMembers, ExampleMembers, FitnessError, PopulationError
from eggroll.memory import keep_freed_memory
from lab import cli, data
from lab.cli import DataFlags, PathFlag
from lab.errors import UserError
from lab.evaluation import measure

CPU = torch.device("cpu")
INSTALL = "pip install -r benchmarks/requirements.txt"
COLUMNS = ("library", "version", "algorithm", "population", "seconds_per_generation")
COLUMNS += ("ratio_to_ours", "accuracy", "train_seconds", "generations", "batch", "split")
COLUMNS += ("device", "torch", "commit")
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
