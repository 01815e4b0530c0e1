"""The population's forward and whole step in int8 beside float32.

python benchmarks/int8.py                                    # a few populations: some minutes
python benchmarks/int8.py --populations 2304 --csv int8.csv

Members perturb one layer each, in 16 groups, on one batch of 128; float32 and int8 are timed in
turn. `product` is the second layer's matrix product alone, for 16 members. `forward` is from what
the perturbed layer wrote to the members' scores, noise drawn before. `step` is everything between
two batches: noise, forward, fitness, estimate and update. Medians, after a warm-up that compiles.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder

from benchmarks.rows import in_turn, provenance, show, write_rows
from eggroll import MLP, BackendError, LayerwiseEvolution, PopulationError, cross_entropy
from eggroll.backends import FirstShape, choose_backend
from eggroll.centre import Centre, forward_of_members
from eggroll.integer import (
    ONE,
    IntegerEvolution,
    IntegerMLP,
    IntegerOptimizer,
    integer_log_likelihood,
)
from eggroll.integer.arithmetic import int_matmul
from eggroll.memory import keep_freed_memory
from lab import cli
from lab.cli import PathFlag

BATCH, GROUPS, CHUNK, SIGMA = 128, 16, 16, 2**-8
COLUMNS = ("what", "backend", "population", "float32_seconds", "int8_seconds", "ratio", "rounds")
COLUMNS += ("device", "torch", "commit")


@dataclass(frozen=True)
class Config:
    """Time of a population's forward and step in int8 and in float32."""

    populations: tuple[int, ...] = (768, 2_304, 8_448)
    """Members per step."""
    backend: Literal["auto", "eager", "compile"] = "compile"
    """Of both."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to measure."""
    seconds: float = 3.0
    """Time for each row and dtype, at least; five rounds are always taken."""
    csv: PathFlag = None
    """File for the rows."""
    json: PathFlag = None
    """File for the rows as a JSON list."""


class Float32:
    """Members of one layer each in float32."""

    def __init__(self, population: int, backend: str, device: torch.device):
        self.network = MLP().to(device)
        self.fitness = cross_entropy(1.0, 0.1)
        self.evolution = LayerwiseEvolution(
            self.network,
            self.fitness,
            population=population,
            groups=GROUPS,
            sigma=SIGMA,
            noise="orthogonal",
            backend=backend,
            chunk_size=CHUNK,
        )
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-4, momentum=0.9)
        self.inputs = torch.randn(BATCH, 784, device=device)
        self.labels = torch.randint(0, 10, (BATCH,), device=device)
        compiled = backend == "compile"
        self.score = FirstShape(self.plain_score) if compiled else self.plain_score
        self.centre = Centre(self.network, self.inputs)
        self.noise = [self.draw(*layer) for layer in enumerate(self.evolution.directions())]

    def draw(self, index: int, members: int) -> list[tuple[Tensor, Tensor]]:
        """Moves (M, 1, B) and signs (G, M, 1, O) of the members of a layer, in chunks."""
        moves = 0.1 * torch.randn(members, 1, BATCH, device=self.inputs.device)
        outputs = self.network.layers[index].out_features
        a = torch.randn(GROUPS, members, 1, outputs, device=self.inputs.device).sign()
        return list(zip(moves.split(CHUNK), a.split(CHUNK, dim=1), strict=True))

    def plain_score(self, index: int, moves: Tensor, a: Tensor) -> Tensor:
        centre = self.centre
        before = (self.network, centre.layers, centre.outputs, centre.calls)
        outputs = forward_of_members(*before, index, moves, a, self.inputs)
        return self.fitness(outputs, self.labels)

    @torch.no_grad()
    def forward(self) -> None:
        for index, chunks in enumerate(self.noise):
            for moves, a in chunks:
                self.score(index, moves, a)

    def step(self) -> None:
        self.evolution.estimate(self.inputs, self.labels)
        self.optimizer.step()


class Int8:
    """The same in int8."""

    def __init__(self, population: int, backend: str, device: torch.device):
        self.network = IntegerMLP(MLP()).to(device)
        self.evolution = IntegerEvolution(
            self.network,
            integer_log_likelihood(1, 0.1, device),
            population=population,
            groups=GROUPS,
            sigma=SIGMA,
            noise="orthogonal",
            backend=backend,
            chunk_size=CHUNK,
        )
        self.optimizer = IntegerOptimizer(self.network, lr=1e-4)
        inputs = (ONE * torch.randn(BATCH, 784, device=device)).round().clamp(-127, 127)
        self.inputs = inputs.to(torch.int8)
        self.labels = torch.randint(0, 10, (BATCH,), device=device)
        self.group = torch.arange(BATCH, device=device) % GROUPS
        self.read, self.wrote = self.network.all_outputs(self.inputs)
        members = enumerate(self.evolution.members())
        self.noise = [self.evolution.draw(i, count, self.read[i]) for i, count in members]

    @torch.no_grad()
    def forward(self) -> None:
        for index, drawn in enumerate(self.noise):
            self.evolution.evaluate(index, drawn, self.wrote[index], self.labels, self.group)

    def step(self) -> None:
        self.evolution.estimate(self.inputs, self.labels)
        self.optimizer.step(BATCH)


def products(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The second layer's product for one chunk of members."""
    x = torch.randint(-127, 128, (CHUNK * BATCH, 256), dtype=torch.int8, device=device)
    weight = torch.randint(-127, 128, (256, 256), dtype=torch.int8, device=device)
    float_x, float_weight = x.float(), weight.float()
    return {
        "float32": lambda: float_x @ float_weight.t(),
        "int8": lambda: int_matmul(x, weight.t()),
    }


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    device = cli.resolve_device(config.device)
    backend = choose_backend(config.backend, device, layerwise=True)
    keep_freed_memory()
    rows: list[dict] = []

    def measure(what: str, population: int | str, work: dict) -> None:
        seconds = in_turn(work, device, rounds=5, at_least=config.seconds)
        middle = {dtype: statistics.median(own) for dtype, own in seconds.items()}
        rows.append(
            {
                "what": what,
                "backend": backend,
                "population": population,
                "float32_seconds": round(middle["float32"], 6),
                "int8_seconds": round(middle["int8"], 6),
                "ratio": round(middle["float32"] / middle["int8"], 2),
                "rounds": min(map(len, seconds.values())),
            }
            | provenance(device)
        )
        show(rows, COLUMNS[:7])

    measure("product", "", products(device))
    for population in config.populations:
        both = {
            "float32": Float32(population, backend, device),
            "int8": Int8(population, backend, device),
        }
        measure("forward", population, {dtype: one.forward for dtype, one in both.items()})
        measure("step", population, {dtype: one.step for dtype, one in both.items()})
        torch.compiler.reset()  # the next size compiles afresh
    write_rows(rows, COLUMNS, config.csv, config.json)


if __name__ == "__main__":
    cli.run_script(main, "benchmarks/int8.py", errors=(BackendError, PopulationError))
