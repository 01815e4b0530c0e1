"""Seconds of a training step of each method, over its lower bound and over backprop's step.

python benchmarks/speed.py --csv speed.csv             # a minute on two cores
python benchmarks/speed.py --csv speed.csv --memory    # with the peak memory of each method

Steps are those of the scripts, at the population of their preset. The lower bound is the arithmetic
that a method cannot avoid, at the best rates of this machine: bounds.py, timed in the same run.
Times are the median and the deciles of turns of 50 ms, which alternate.
"""

import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
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
from benchmarks import bounds
from benchmarks import rows as shared
from benchmarks.rows import Row, Series, Work
from eggroll import Evolution, NodePerturbation, PopulationError, int8
from experiment.config import MARKERS
from experiment.data import Dataset, Split, quantised
from experiment.device import choose_device, peak_memory_mb, set_threads
from experiment.optim import make_optimizer, make_schedule
from experiment.plots import colour
from experiment.script import run_script
from model import MLP

BACKPROP, INT8 = "backprop", "node-perturbation-int8"
METHODS = (BACKPROP, "eggroll", "eggroll-dense", "node-perturbation", INT8)
BATCH, IMAGES = 128, 51_200
STEPS = 1_000_000  # of a schedule: more than are taken


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


def backprop_step(device: torch.device) -> Work:
    config, network = mnist_backprop.PRESETS[BACKPROP], MLP().to(device)
    optimizer = make_optimizer(network, config)
    schedule = make_schedule(optimizer, config, STEPS)
    batches, fitness = endless(random_data(device)), torch.zeros((), device=device)

    def step() -> None:
        images, labels = next(batches)
        loss = F.cross_entropy(network(images), labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        fitness.add_(-loss.detach())

    return step


def make(name: str, device: torch.device, population: int | None) -> tuple[Work, Evolution | None]:
    """Return a method's step, and its Evolution. Raises whatever a first step raises."""
    if name == BACKPROP:
        return backprop_step(device), None
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


def count_of(evolution: Evolution | None) -> bounds.Counts:
    """Return what a step cannot avoid (None: backprop's)."""
    if evolution:
        return bounds.evolution(evolution, BATCH)
    weights = (parameter.shape for parameter in MLP().parameters())
    return bounds.backprop([(inputs, outputs) for outputs, inputs in weights], BATCH)


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
    counts, populations, failed = {}, {}, []
    for name in METHODS:
        try:
            work[name], evolution = make(name, device, config.population)
            counts[name] = count_of(evolution)
            populations[name] = evolution.population if evolution else ""
        except Exception as error:  # one method must not end the others
            failed.append(f"{name} failed: {' '.join(str(error).split())[:200]}")
    operations = bounds.operations(device)
    work |= operations
    seconds = shared.in_turn(work, device, config.rounds, turn=0.05)
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    each = bounds.seconds_of_each({key: middle[key] for key in operations})
    rows = []
    for name, population in populations.items():
        bound = counts[name].seconds(each)
        row = {"what": name, "population": population}
        row |= times(seconds[name], bound, middle[BACKPROP])
        if config.memory:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                peak = process.submit(peak_memory, name, device, config.population)
                row["peak_memory_mb"] = peak.result()
        shared.show(row, first=not rows)
        rows.append(row | shared.provenance(device))
    return rows, failed


def times(seconds: Sequence[float], bound: float, backprop: float) -> Row:
    """Return the columns of a step's time."""
    ordered, middle = sorted(seconds), statistics.median(seconds)
    return {
        "step_seconds": round(middle, 7),
        "p10": round(ordered[len(ordered) // 10], 7),
        "p90": round(ordered[-1 - len(ordered) // 10], 7),
        "bound_seconds": round(bound, 7),
        "ratio_to_bound": round(middle / bound, 3),
        "ratio_to_backprop": round(middle / backprop, 3),
    }


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw each step over backprop's as a point, its lower bound as a mark."""
    lowest = [row["bound_seconds"] / rows[0]["step_seconds"] for row in rows]
    series, names = [Series("lower bound", lowest, range(len(rows)), "k|")], []
    for place, row in enumerate(rows):
        ratio, paint = row["ratio_to_backprop"], colour(row["what"])
        note = f"{row['ratio_to_bound']:.3g} x bound"
        series.append(Series("", [ratio], [place], "o", paint, notes=[note]))
        milliseconds = f"{1_000 * row['step_seconds']:,.4g} ms"
        names.append(f"{row['what']}\n{milliseconds}, {ratio:.3g} x backprop")
    label = "seconds of a step over those of backprop's step (log scale)"
    panel = shared.Panel("", label, "", series, names)
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
