"""How close a whole EGGROLL step comes to the matrix products that it cannot do without.

python benchmarks/throughput.py                                       # every size: many minutes
python benchmarks/throughput.py --population 1000 --json step.json    # one size

A step is everything between two batches: noise, both signs of every pair through three layers,
fitness, estimate, optimizer. The floor is measured in the same run and in turn with the steps:
the second and third layer's products for every member (the first layer's is shared by them all),
at the best rate that a GEMM of that shape and dtype reaches on this device. Medians, after a
warm-up; the first step, which compiles, is reported on its own.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
import tyro
from matplotlib.ticker import FuncFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder

from benchmarks.rows import in_turn, provenance, show, write_rows
from eggroll import MLP, BackendError, Evolution, PopulationError, cross_entropy
from eggroll.backends import choose_backend
from eggroll.memory import keep_freed_memory
from lab import cli
from lab.cli import PathFlag
from lab.plots import STYLE, plain_number, save

BATCH = 128
POPULATIONS = (250, 1_000, 4_000, 10_000, 40_000)
HIDDEN = (64, 128, 512, 1_024)
RANKS = (2, 4, 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOOR_ROWS = (512, 2_048, 8_192, 65_536)  # rows per GEMM: the fastest is the floor
COLUMNS = ("backend", "dtype", "population", "hidden", "rank", "step_seconds", "p10", "p90")
COLUMNS += ("floor_seconds", "ratio_to_floor", "noise_share", "member_examples_per_second")
COLUMNS += ("first_step_seconds", "steps", "device", "torch", "commit")


@dataclass(frozen=True)
class Config:
    """Time of an EGGROLL step over the floor of its matrix products."""

    population: int | None = None
    """Members of the one size to measure (default: a sweep over all sizes)."""
    hidden_dim: int = 256
    """Units per hidden layer, where one size is measured."""
    rank: int = 1
    """Rank of the perturbations, where one size is measured."""
    backends: tuple[Literal["eager", "compile", "triton"], ...] = ()
    """Default: all that this machine has."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of the members' forward."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to measure."""
    seconds: float = 4.0
    """Time for each row, at least; three steps are always taken."""
    csv: PathFlag = None
    """File for the rows; a plot of the ratio against the population goes beside it."""
    json: PathFlag = None
    """File for the rows as a JSON list."""


@dataclass(frozen=True)
class Size:
    population: int
    hidden: int = 256
    rank: int = 1


def sizes(config: Config) -> Iterator[Size]:
    if config.population:
        yield Size(config.population, config.hidden_dim, config.rank)
        return
    yield from (Size(population) for population in POPULATIONS)
    yield from (Size(1_000, hidden=hidden) for hidden in HIDDEN)
    yield from (Size(1_000, rank=rank) for rank in RANKS)


def available(names: tuple[str, ...], device: torch.device) -> list[str]:
    """The backends asked for; or, where none was, those that can run here.

    Raises BackendError for one that was asked for and is not there.
    """
    if names:
        return [choose_backend(name, device) for name in names]
    found = []
    for name in ("eager", "compile", "triton"):
        try:
            found.append(choose_backend(name, device))
        except BackendError as missing:
            print(f"left out: {missing}")
    return found


class Step:
    """One training step at a size, on random digits."""

    def __init__(self, size: Size, backend: str, dtype: str, device: torch.device):
        network = MLP(hidden_dim=size.hidden).to(device)
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        self.inputs = torch.randn(BATCH, 784, device=device)
        self.labels = torch.randint(0, 10, (BATCH,), device=device)
        self.evolution = Evolution(
            network,
            cross_entropy(2.0),
            population=size.population,
            rank=size.rank,
            backend=backend,
            dtype=None if dtype == "float32" else DTYPES[dtype],
            capture=backend == "triton",
        )

    def __call__(self) -> None:
        self.evolution.estimate(self.inputs, self.labels)
        self.optimizer.step()

    def draw_noise(self) -> None:
        """All noise of one step, as often as the step draws it: to evaluate, and to estimate."""
        population = self.evolution.ask()
        for _ in range(2):
            for index in range(len(population.layers)):
                for _ in population.noise_blocks(index):
                    pass


def floor(size: Size, dtype: str, device: torch.device, rows: int) -> Callable[[], None]:
    """The products of one step's second and third layer, `rows` rows of activations at a time."""
    kind = DTYPES[dtype]
    hidden = torch.randn(rows, size.hidden, device=device, dtype=kind)
    second = torch.randn(size.hidden, size.hidden, device=device, dtype=kind)
    third = torch.randn(10, size.hidden, device=device, dtype=kind)
    calls, rest = divmod(size.population * BATCH, rows)

    def products() -> None:
        for _ in range(calls):
            hidden @ second.T, hidden @ third.T
        if rest:
            hidden[:rest] @ second.T, hidden[:rest] @ third.T

    return products


def best_floor(size: Size, dtype: str, device: torch.device) -> Callable[[], None]:
    small = Size(min(size.population, 1_000), size.hidden)
    candidates = {rows: floor(small, dtype, device, rows) for rows in FLOOR_ROWS}
    seconds = in_turn(candidates, device, rounds=3)
    fastest = min(candidates, key=lambda rows: statistics.median(seconds[rows]))
    return floor(size, dtype, device, fastest)


@torch.no_grad()
def measure(size: Size, dtype: str, backends: list[str], config: Config, device) -> list[dict]:
    """One row per backend; the backends' steps and the floor are timed in turn."""
    torch.compiler.reset()  # its limit of variants is meant for one training, not for a sweep
    work: dict[str, Callable[[], None]] = {}
    first = {}
    for backend in backends:
        work[backend] = Step(size, backend, dtype, device)
        first[backend] = in_turn({0: work[backend]}, device, rounds=1, warm_up=False)[0][0]
    noise = {f"noise {b}": step.draw_noise for b, step in work.items() if b != "triton"}
    work |= {"floor": best_floor(size, dtype, device)} | noise
    seconds = in_turn(work, device, rounds=3, at_least=config.seconds)
    floor_seconds = statistics.median(seconds["floor"])
    return [
        row(size, dtype, backend, seconds, floor_seconds, first[backend]) for backend in backends
    ]


def row(size: Size, dtype: str, backend: str, seconds, floor_seconds: float, first: float) -> dict:
    own = sorted(seconds[backend])
    step = statistics.median(own)
    drawn = seconds.get(f"noise {backend}")
    return {
        "backend": backend,
        "dtype": dtype,
        "population": size.population,
        "hidden": size.hidden,
        "rank": size.rank,
        "step_seconds": round(step, 6),
        "p10": round(own[len(own) // 10], 6),
        "p90": round(own[-1 - len(own) // 10], 6),
        "floor_seconds": round(floor_seconds, 6),
        "ratio_to_floor": round(step / floor_seconds, 3),
        # the kernels draw where they use it: their noise has no time of its own
        "noise_share": round(statistics.median(drawn) / step, 3) if drawn else "",
        "member_examples_per_second": round(size.population * BATCH / step),
        "first_step_seconds": round(first, 2),
        "steps": len(own),
    }


def draw_plot(rows: list[dict], path: Path) -> list[Path]:
    """Ratio to the floor against population, one line per backend and dtype."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for key in dict.fromkeys((r["backend"], r["dtype"]) for r in rows):
            line = [r for r in rows if (r["backend"], r["dtype"]) == key]
            line = [r for r in line if r["hidden"] == 256 and r["rank"] == 1]
            x, y = zip(*[(r["population"], r["ratio_to_floor"]) for r in line], strict=True)
            axes.plot(x, y, "o-", label=", ".join(key))
        axes.axhline(1, color="black", linewidth=1)
        axes.set(xscale="log", ylim=(0, None), xlabel="population (log scale)")
        axes.set(ylabel="seconds of a step / seconds of its matrix products")
        axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
        axes.set_title(f"A whole EGGROLL step against its floor\n{rows[0]['device']}")
        axes.legend()
        return save(figure, path.parent, path.stem)


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    device = cli.resolve_device(config.device)
    backends = available(config.backends, device)
    keep_freed_memory()
    rows = []
    started = time.perf_counter()
    for size in sizes(config):
        for dtype in config.dtypes:
            for measured in measure(size, dtype, backends, config, device):
                rows.append(measured | provenance(device))
                show(rows, COLUMNS[:13])
    print(f"{time.perf_counter() - started:.0f} s")
    write_rows(rows, COLUMNS, config.csv, config.json)
    if config.csv and not config.population:
        print(*draw_plot(rows, config.csv), sep="\n")


if __name__ == "__main__":
    cli.run_script(main, "throughput.py", errors=(BackendError, PopulationError))
