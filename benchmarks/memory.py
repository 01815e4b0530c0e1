"""Peak memory against population: backprop, EGGROLL, and naive full-rank ES.

python benchmarks/memory.py --csv memory.csv

Each row is a process of its own that takes a few training steps on a batch of 128, with 60,000
images in memory as in training. On a CPU the peak is the process's, libraries included; on a CUDA
GPU the allocator's. Naive ES holds every member's weights, and is refused before the machine would
swap.
"""

import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import tyro
from matplotlib.ticker import FuncFormatter
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder

from benchmarks.rows import provenance, show, write_rows
from eggroll import MLP, Evolution, PopulationError, cross_entropy
from eggroll.backends import choose_backend
from eggroll.fitness import z_score
from eggroll.memory import keep_freed_memory
from eggroll.population import check_population
from lab import cli
from lab.cli import PathFlag
from lab.clock import peak_memory_mb
from lab.errors import UserError
from lab.plots import STYLE, colour, plain_number, save

BATCH, IMAGES, STEPS, SIGMA = 128, 60_000, 3, 0.02
COLUMNS = ("method", "population", "peak_memory_mb", "ratio_to_backprop", "note")
COLUMNS += ("device", "torch", "commit")
NAMES = {"backprop": "backprop", "eggroll": "EGGROLL", "naive": "naive ES (full rank)"}
USABLE = 0.8  # part of the free memory that naive ES may plan with


class TooLarge(UserError):
    """A population that would not fit in memory."""


@dataclass(frozen=True)
class Config:
    """Peak memory of backprop, EGGROLL and naive full-rank ES against population."""

    populations: tuple[int, ...] = (250, 1_000, 4_000, 10_000, 40_000)
    """Members per step; even numbers."""
    hidden_dim: int = 256
    """Units per hidden layer."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to measure."""
    csv: PathFlag = None
    """File for the rows; a plot goes beside it."""
    json: PathFlag = None
    """File for the rows as a JSON list."""


def backprop(network: MLP, images: Tensor, labels: Tensor, _: int) -> None:
    for _ in range(STEPS):
        F.cross_entropy(network(images), labels).backward()


def eggroll(network: MLP, images: Tensor, labels: Tensor, population: int) -> None:
    backend = choose_backend("auto", images.device)
    evolution = Evolution(network, cross_entropy(), population=population, backend=backend)
    for _ in range(STEPS):
        evolution.estimate(images, labels)


@torch.no_grad()
def naive(network: MLP, images: Tensor, labels: Tensor, population: int) -> None:
    """Every member's noise is a matrix per layer, and all of them are held for the update."""
    weights = [layer.weight for layer in network.layers]
    needed = 4 * population * sum(weight.numel() for weight in weights)
    free = free_bytes(images.device)
    if needed > USABLE * free:
        raise TooLarge(
            f"refused: {needed / 2**30:.0f} GB of noise for {population:,} members, "
            f"and {free / 2**30:.0f} GB are free"
        )
    for _ in range(STEPS):
        noise = [torch.randn(population, *weight.shape, device=weight.device) for weight in weights]
        scores = torch.stack([score(network, noise, k, images, labels) for k in range(population)])
        for weight, matrices in zip(weights, noise, strict=True):
            weight.grad = -torch.tensordot(z_score(scores), matrices, 1) / population
        del noise, matrices


def score(network: MLP, noise: list[Tensor], member: int, images: Tensor, labels: Tensor) -> Tensor:
    """Mean fitness of one member, its weights formed."""
    x = images
    for index, layer in enumerate(network.layers):
        x = x @ (layer.weight + SIGMA * noise[index][member]).T
        x = x if layer is network.layers[-1] else network.activation(x)
    return -F.cross_entropy(x, labels)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")  # what can be had without swapping; sysconf knows the total only
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


METHODS = {"backprop": backprop, "eggroll": eggroll, "naive": naive}


def measured(method: str, population: int, hidden: int, device: torch.device) -> dict[str, Any]:
    """One row's own columns. Runs in a process of its own."""
    keep_freed_memory()
    data = torch.randint(0, 256, (IMAGES, 784), dtype=torch.uint8, device=device)
    images = data[:BATCH].float() / 255
    labels = torch.randint(0, 10, (BATCH,), device=device)
    network = MLP(hidden_dim=hidden).to(device)
    row = {"method": method, "population": population, "peak_memory_mb": "", "note": ""}
    try:
        METHODS[method](network, images, labels, population)
    except TooLarge as refusal:
        return row | {"note": str(refusal)}
    return row | {"peak_memory_mb": round(peak_memory_mb(device), 1)}


def draw_plot(rows: list[dict], path: Path) -> list[Path]:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        base = next(row["peak_memory_mb"] for row in rows if row["method"] == "backprop")
        axes.axhline(base, color=colour("backprop"), label=NAMES["backprop"], linewidth=2)
        for method in ("eggroll", "naive"):
            own = [row for row in rows if row["method"] == method]
            done = [(r["population"], r["peak_memory_mb"]) for r in own if r["peak_memory_mb"]]
            axes.plot(*zip(*done, strict=True), "o-", color=colour(method), label=NAMES[method])
            for row in own:
                if row["note"]:
                    axes.axvline(row["population"], color=colour(method), linestyle=":")
                    place = (row["population"], 3 * base)
                    options = {"rotation": 90, "ha": "right", "va": "bottom"}
                    axes.annotate("naive ES refused", place, color=colour(method), **options)
        axes.set(xscale="log", yscale="log", xlabel="population (log scale)")
        axes.set(ylabel="peak memory, MB (log scale)")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(plain_number))
        axes.set_title(f"Memory does not grow with EGGROLL's population\n{rows[0]['device']}")
        axes.legend(loc="upper left")
        return save(figure, path.parent, path.stem)


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    device = cli.resolve_device(config.device)
    for population in config.populations:
        check_population(population, 1, SIGMA)
    work = [("backprop", 1)]
    work += [(method, p) for p in config.populations for method in ("eggroll", "naive")]
    rows: list[dict[str, Any]] = []
    for method, population in work:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            row = process.apply(measured, (method, population, config.hidden_dim, device))
        first = (rows or [row])[0]["peak_memory_mb"]
        peak = row["peak_memory_mb"]
        ratio = {"ratio_to_backprop": round(peak / first, 3) if peak else ""}
        rows.append(row | ratio | provenance(device))
        show(rows, COLUMNS[:5])
    write_rows(rows, COLUMNS, config.csv, config.json)
    if config.csv:
        print(*draw_plot(rows, config.csv), sep="\n")


if __name__ == "__main__":
    cli.run_script(main, "memory.py", errors=(PopulationError,))
