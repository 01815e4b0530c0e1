"""Seconds of a training step of each method, over its lower bound and over backprop's step.

python benchmarks/speed.py --csv speed.csv             # a minute on two cores
python benchmarks/speed.py --csv speed.csv --memory    # with the peak memory of each method

backprop (bare) is forward, cross-entropy, backward and SGD on one batch, one graph on CUDA: ratios
are to it. All others are steps as the scripts take them, at the population of their preset.

The lower bound counts only unavoidable matrix products and activations, of as many directions at
once as is fastest. They are timed in the same run:
    backprop           the products of the forward and the backward pass
    eggroll            per direction x B and an activation; per member the product of its block of
                       units, and the activations and products after it
    node-perturbation  the same without x B; in int8 the products alone
    eggroll-dense      x B, all activations, and the products of all layers but the first
Times are the median and the deciles of turns of 50 ms, which alternate.
"""

import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a file, from any folder

import mnist_backprop
import mnist_eggroll
import mnist_eggroll_int8
from benchmarks import rows as shared
from benchmarks.rows import Row, Series, Work
from eggroll import Evolution, LowRank, NodePerturbation, PopulationError, int8
from eggroll.blocks import Draw
from eggroll.int8.arithmetic import int_matmul
from experiment.config import MARKERS
from experiment.data import Dataset, Split, quantised
from experiment.device import choose_device, peak_memory_mb, set_threads
from experiment.optim import make_optimizer, make_schedule
from experiment.plots import colour
from experiment.script import run_script
from model import MLP

BARE, INT8 = "backprop (bare)", "node-perturbation-int8"
METHODS = (BARE, "backprop", "eggroll", "eggroll-dense", "node-perturbation", INT8)
BATCH, IMAGES = 128, 51_200
STEPS = 1_000_000  # of a schedule: more than are taken
AT_ONCE = {"cpu": (1, 4, 16), "cuda": (16, 64, 256)}  # directions, of which the fastest counts


@dataclass(frozen=True, kw_only=True)
class Config(shared.Flags):
    """Flags of this benchmark."""

    population: int | None = None
    """Members of eggroll and eggroll-dense (None: the presets')."""
    rounds: int = 20
    """Turns of each step."""
    memory: bool = False
    """Add the peak memory of a process that takes steps of one method."""


def random_data(device: torch.device) -> Dataset:
    images = torch.randint(0, 256, (IMAGES, 784), dtype=torch.uint8, device=device)
    train = Split(images, torch.randint(0, 10, (IMAGES,), device=device))
    return Dataset("random", train, train[:0], train[:0], torch.full((784,), 128.0).to(device), 74)


def endless(data: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in count():
        yield from data.batches(epoch, seed=0, batch_size=BATCH)


def backprop_step(device: torch.device, bare: bool) -> Work:
    config, network = mnist_backprop.PRESETS["backprop"], MLP().to(device)
    optimizer = make_optimizer(network, config)
    schedule = make_schedule(optimizer, config, STEPS)
    batches, fitness = endless(random_data(device)), torch.zeros((), device=device)
    if bare:
        batches = repeat(next(batches))

    def step() -> None:
        images, labels = next(batches)
        loss = F.cross_entropy(network(images), labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not bare:
            schedule.step()
            fitness.add_(-loss.detach())

    return captured(step) if bare and device.type == "cuda" else step


def captured(step: Work) -> Work:
    """Return a step that replays one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazy set-up cannot be captured
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def make(name: str, device: torch.device, population: int | None) -> tuple[Work, Evolution | None]:
    """Return a method's step, and its Evolution. Raises whatever a first step raises."""
    if name in (BARE, "backprop"):
        return backprop_step(device, bare=name == BARE), None
    data, network = random_data(device), MLP().to(device)
    if name == INT8:
        config = mnist_eggroll_int8.PRESETS[name]
        data, network = quantised(data, int8.INT8_SCALE), int8.Int8MLP(network)
        members = int8.Int8NodePerturbation(config.population, config.sigma)
        fitness = int8.Int8CrossEntropy(config.label_smoothing)
        evolution = int8.Int8Evolution(network, fitness, members)
        optimizer = int8.Int8SGD(network, config.lr, config.momentum, BATCH)
    else:
        config = mnist_eggroll.PRESETS[name]
        members = config.es
        if population and not isinstance(members, NodePerturbation):
            members = replace(members, population=population)
        fitness, smoothing = mnist_eggroll.make_fitness(config)
        evolution = Evolution(network, fitness, members, smoothing=smoothing)
        optimizer = make_optimizer(network, config)
    schedule, batches = make_schedule(optimizer, config, STEPS), endless(data)
    fitness_sum = torch.zeros((), device=device)

    def step() -> None:
        images, labels = next(batches)
        scores = evolution.evaluate(images, labels)
        evolution.backward(scores)
        optimizer.step()
        schedule.step()
        fitness_sum.add_(evolution.mean_fitness)

    step()  # plans the population
    return step, evolution


def backprop_work(device: torch.device) -> Work:
    """Return every matrix product of a step: forward, and backward but for the first input's."""
    products = []
    for parameter in MLP().parameters():
        weight = parameter.detach().to(device)
        error, x = (torch.randn(BATCH, size, device=device) for size in weight.shape)
        products += [(error, weight)] if products else []
        products += [(x, weight.T), (error.T, x)]
    return lambda: [torch.mm(x, y) for x, y in products]


def members_work(evolution: Evolution, plan: Draw, n: int, device: torch.device) -> Work:
    """Return the products and activations of n directions of a draw; of integers the products."""
    dense = isinstance(evolution.estimator, LowRank)
    integers = isinstance(evolution, int8.Int8Evolution)
    randint = partial(torch.randint, -127, 128, dtype=torch.int8, device=device)
    new = randint if integers else partial(torch.randn, device=device)
    first, *later = evolution.layers[plan.layers[0] :]
    rank, activations, products = getattr(evolution.estimator, "rank", 0), [], []
    if rank:
        products.append((new((BATCH, first.inputs)), new((first.inputs, n * rank))))
    for index, layer in enumerate(later):
        by_member = dense or index > 0
        x = new((n * plan.blocks if by_member else n, BATCH, layer.inputs))
        activations.append(x)
        if by_member:
            products.append((x, new((layer.inputs, layer.outputs))))
        else:  # each member's block alone
            sizes = (n * BATCH, plan.units), (plan.units, layer.outputs)
            products.append(tuple(new((plan.blocks, *size)) for size in sizes))
        if dense:
            products.append((x, new((len(x), layer.inputs, rank))))

    def work() -> None:
        for x in () if integers else activations:
            F.gelu(x)
        for x, y in products:
            int_product(x, y) if integers else torch.matmul(x, y)

    return work


def int_product(x: Tensor, y: Tensor) -> None:
    for pair in zip(x, y, strict=True) if y.dim() == 3 else [(x.flatten(0, 1), y)]:
        int_matmul(*pair)


def bound_of(evolution: Evolution | None, device: torch.device) -> list[tuple[int, dict]]:
    """Return (directions, {directions at once: work}) of each layer, or of all layers at once."""
    if evolution is None:
        return [(1, {1: backprop_work(device)})]
    parts = []
    for plan in {plan.layers: plan for plan in evolution.draws}.values():
        total = sum(other.directions for other in evolution.draws if other.layers == plan.layers)
        sizes = [n for n in AT_ONCE[device.type] if n <= total] or [total]
        parts.append((total, {n: members_work(evolution, plan, n, device) for n in sizes}))
    return parts


def peak_memory(name: str, device: torch.device, population: int | None) -> float:
    """Return the peak memory of this process in MB after a few steps, the data included."""
    step, _ = make(name, device, population)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):
        step()
    return round(peak_memory_mb(device), 1)


def measure(config: Config, device: torch.device) -> tuple[list[Row], list[str]]:
    """Return the rows, and a line for each method that failed."""
    work: dict[Any, Work] = {}
    bounds, populations, failed = {}, {}, []
    for name in METHODS:
        try:
            work[name], evolution = make(name, device, config.population)
            bounds[name] = bound_of(evolution, device)
            populations[name] = evolution.population if evolution else ""
        except Exception as error:  # one method must not end the others
            failed.append(f"{name} failed: {' '.join(str(error).split())[:200]}")
    for name, parts in bounds.items():
        for index, (_, by_size) in enumerate(parts):
            work |= {(name, index, n): call for n, call in by_size.items()}
    seconds = shared.in_turn(work, device, config.rounds, turn=0.05)
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    rows = []
    for name, population in populations.items():
        bound = sum(
            min(total / n * middle[name, index, n] for n in by_size)
            for index, (total, by_size) in enumerate(bounds[name])
        )
        ordered = sorted(seconds[name])
        row = {
            "what": name,
            "population": population,
            "step_seconds": round(middle[name], 7),
            "p10": round(ordered[len(ordered) // 10], 7),
            "p90": round(ordered[-1 - len(ordered) // 10], 7),
            "bound_seconds": round(bound, 7),
            "ratio_to_bound": round(middle[name] / bound, 3),
            "ratio_to_backprop": round(middle[name] / middle[BARE], 3),
        }
        if config.memory:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                peak = process.submit(peak_memory, name, device, config.population)
                row["peak_memory_mb"] = peak.result()
        shared.show(row, first=not rows)
        rows.append(row | shared.provenance(device))
    return rows, failed


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw each step over backprop's as a point, its lower bound as a mark."""
    bounds = [row["bound_seconds"] / rows[0]["step_seconds"] for row in rows]
    series = [Series("lower bound", bounds, range(len(rows)), "k|")]
    for place, row in enumerate(rows):
        ratio, paint = row["ratio_to_backprop"], colour(row["what"].removesuffix(" (bare)"))
        note = f"{ratio:.3g} times, {1_000 * row['step_seconds']:.3g} ms"
        series.append(Series("", [ratio], [place], "o", paint, notes=[note]))
    label = "seconds of a step over those of backprop's bare step (log scale)"
    panel = shared.Panel("", label, "", series, [row["what"] for row in rows])
    shared.draw(path, f"A step of batch {BATCH}\n{rows[0]['device']}", [panel])


def main() -> None:
    config = tyro.cli(Config, config=MARKERS)
    set_threads(config.threads)
    rows, failed = measure(config, choose_device(config.device))
    shared.write_rows(rows, config.csv, config.json, plot)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    run_script(main, "speed.py", errors=(PopulationError,))
