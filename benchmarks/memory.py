"""Peak memory against population: backprop, both kinds of members, and naive full-rank ES.

python benchmarks/memory.py --csv memory.csv
python benchmarks/memory.py --csv memory.csv --compiled

Each row is a process of its own that takes a few training steps on a batch of 128, with 60,000
images in memory as in training. On a CPU the peak is the process's, libraries included; on a CUDA
GPU the allocator's. Population counts the members that see each image. Naive ES holds every
member's weights, and is refused before the machine would swap.
"""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
import tyro
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder

from benchmarks.rows import provenance, show, write_rows
from eggroll import (
    MLP,
    BackendError,
    BatchMembers,
    Evolution,
    ExampleMembers,
    PopulationError,
    cross_entropy,
)
from eggroll.compiled import choose_backend
from eggroll.fitness import z_score
from eggroll.memory import keep_freed_memory
from lab import cli
from lab.cli import PathFlag
from lab.clock import peak_memory_mb
from lab.errors import UserError
from lab.plots import NAMES, STYLE, colour, plain_number, save

BATCH, IMAGES, STEPS, SIGMA = 128, 60_000, 2, 0.02  # the second step finds its memory in place
COLUMNS = ("method", "backend", "population", "peak_memory_mb", "ratio_to_backprop", "note")
COLUMNS += ("device", "torch", "commit")
MEMBERS = {"example": ExampleMembers, "batch": BatchMembers}
LABELS = {"backprop": "backprop", "example": "eggroll", "batch": "eggroll-batch"}  # in lab.plots
USABLE = 0.8  # part of the free memory that naive ES may plan with


class TooLarge(UserError):
    """A population that would not fit in memory."""


@dataclass(frozen=True)
class Config:
    """Peak memory of backprop, EGGROLL and naive full-rank ES against population."""

    example_populations: tuple[int, ...] = (48, 144, 272, 528)
    """Example members that see each image; 528 are all that there are."""
    batch_populations: tuple[int, ...] = (144, 1_000, 4_000, 10_000, 40_000)
    """Batch members, and members of naive ES; even numbers."""
    compiled: bool = False
    """Add rows of compiled members."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to measure."""
    csv: PathFlag = None
    """File for the rows; a plot goes beside it."""
    json: PathFlag = None
    """File for the rows as a JSON list."""


class Case(NamedTuple):
    method: str
    population: int | str = ""
    backend: str = "eager"


def cases(config: Config) -> list[Case]:
    """Backprop first: all others are compared with it. Raises PopulationError."""
    found = [Case("backprop")]
    for backend in ("eager", "compile") if config.compiled else ("eager",):
        found += [Case("example", p, backend) for p in config.example_populations]
        found += [Case("batch", p, backend) for p in config.batch_populations]
    for case in found[1:]:
        members(case)
    return found + [Case("naive", p) for p in config.batch_populations]


def members(case: Case) -> BatchMembers | ExampleMembers:
    return MEMBERS[case.method](case.population)


def backprop(network: MLP, images: Tensor, labels: Tensor) -> None:
    F.cross_entropy(network(images), labels).backward()


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
    noise = [torch.randn(population, *weight.shape, device=weight.device) for weight in weights]
    scores = torch.stack([score(network, noise, k, images, labels) for k in range(population)])
    for weight, matrices in zip(weights, noise, strict=True):
        weight.grad = -torch.tensordot(z_score(scores), matrices, 1) / population


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


def take_steps(case: Case, network: MLP, images: Tensor, labels: Tensor) -> None:
    """STEPS gradients by the case's method, each followed by SGD. Raises TooLarge."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    if case.method in MEMBERS:
        evolution = Evolution(network, cross_entropy(), members(case), backend=case.backend)
    for _ in range(STEPS):
        optimizer.zero_grad()
        if case.method == "backprop":
            backprop(network, images, labels)
        elif case.method == "naive":
            naive(network, images, labels, case.population)
        else:
            evolution.backward(evolution.evaluate(images, labels))
        optimizer.step()


def measured(case: Case, device: torch.device) -> dict[str, Any]:
    """One row's own columns. Runs in a process of its own."""
    cli.quiet_libraries()
    keep_freed_memory()
    data = torch.randint(0, 256, (IMAGES, 784), dtype=torch.uint8, device=device)
    images = data[:BATCH].float() / 255
    labels = torch.randint(0, 10, (BATCH,), device=device)
    row = case._asdict() | {"peak_memory_mb": "", "note": ""}
    try:
        take_steps(case, MLP().to(device), images, labels)
    except TooLarge as refusal:
        return row | {"note": str(refusal)}
    return row | {"peak_memory_mb": round(peak_memory_mb(device), 1)}


def draw_plot(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """One line per method and backend; what was refused is marked."""
    base = rows[0]["peak_memory_mb"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        axes.axhline(base, color=colour("backprop"), label="backprop", linewidth=2)
        for method, backend in dict.fromkeys((r["method"], r["backend"]) for r in rows[1:]):
            own = [r for r in rows if (r["method"], r["backend"]) == (method, backend)]
            shade = colour(LABELS.get(method, method))
            name = NAMES[LABELS[method]] if method in LABELS else "naive ES, full rank"
            style = {"label": name, "marker": "o", "color": shade}
            if backend == "compile":
                style |= {"label": f"{name}, compiled", "linestyle": "--", "marker": "s"}
            done = [(r["population"], r["peak_memory_mb"]) for r in own if r["peak_memory_mb"]]
            axes.plot([p for p, _ in done], [peak for _, peak in done], **style)
            for refused in (r["population"] for r in own if r["note"]):
                axes.axvline(refused, color=shade, linestyle=":")
                options = {"rotation": 90, "ha": "right", "va": "center", "color": shade}
                axes.text(refused, 0.6, "refused", transform=axes.get_xaxis_transform(), **options)
        axes.set(xscale="log", yscale="log", ylim=(0.5 * base, None))
        axes.set(xlabel="members that see each image (log scale)")
        axes.set(ylabel="peak memory, MB (log scale)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(plain_number))
        axes.set_title(f"Peak memory of training\n{rows[0]['device']}", fontsize=13)
        figure.legend(loc="outside lower center", ncols=2, fontsize=10)
        return save(figure, path.parent, path.stem)


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    device = cli.resolve_device(config.device)
    work = cases(config)
    if config.compiled:
        choose_backend("compile", device, worth=True)
    rows: list[dict[str, Any]] = []
    for case in work:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            row = process.submit(measured, case, device).result()
        base, peak = (rows or [row])[0]["peak_memory_mb"], row["peak_memory_mb"]
        ratio = {"ratio_to_backprop": round(peak / base, 3) if peak else ""}
        rows.append(row | ratio | provenance(device))
        show(rows, COLUMNS[:6])
    write_rows(rows, COLUMNS, config.csv, config.json)
    if config.csv:
        print(*draw_plot(rows, config.csv), sep="\n")


if __name__ == "__main__":
    cli.run_script(main, "memory.py", errors=(BackendError, PopulationError))
