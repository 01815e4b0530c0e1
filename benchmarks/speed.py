"""A step of every method over its floor, and over backprop's step.

python benchmarks/speed.py --csv speed.csv                     # a minute or so on two cores
python benchmarks/speed.py --csv speed.csv --backend compile   # compiled rows too

backprop-bare    forward, cross-entropy, backward, SGD: nothing else. All ratios are to it
backprop         the step as mnist_backprop.py takes it, from batch to batch: 128 images gathered
                 and scaled, the loss, its gradient, optimizer, schedule, sum of the fitness
example-float32  the same loop with example members in place of the gradient
example-int8     ... in integers
batch-float32    ... with batch members
batch-bfloat16   the same, its forward in bfloat16, where that pays

A floor is what a method costs at least, at the best of a few chunk sizes, in this same run:
    backprop  its matrix products: forward, and two per layer backward but for the first's inputs
    example   GELU and the products of the layers after the perturbed one, for every member by
              itself: a step can be below, since members share most of it (eggroll/moved.py). Of
              int8 the products alone
    batch     GELU and the second and third layer's products for all members, and the noise, once;
              in float32

Everything is timed in turn, after a warm-up that also compiles. A turn is as many steps as fill
50 ms; the figures are the median and the deciles of a step's mean time over the turns.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import tyro
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder

from benchmarks.rows import in_turn, provenance, show, write_rows
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
from eggroll.dtypes import bfloat16_pays
from eggroll.int8 import INT8_SCALE, Int8CrossEntropy, Int8MLP, Int8SGD
from eggroll.int8.arithmetic import int_matmul
from eggroll.memory import keep_freed_memory
from lab import cli, data
from lab.cli import IntFlag, PathFlag, TrainingFlags
from lab.clock import synchronise
from lab.divergence import FitnessWatch
from lab.errors import UserError
from lab.optim import make_optimizer, make_schedule
from lab.plots import STYLE, colour, plain_number, save

BATCH, IMAGES = 128, 60_000
TURN = 0.05  # seconds
CHUNKS = (8, 32, 128, 512)  # members at once: the fastest is the floor
BARE = "backprop-bare"
# A rate so small that random digits never count as a training that diverged
TRAINING = TrainingFlags(epochs=1_000, lr=1e-4, lr_schedule="onecycle", label_smoothing=0.1)
COLUMNS = ("what", "backend", "population", "step_seconds", "p10", "p90", "floor_seconds")
COLUMNS += ("ratio_to_floor", "ratio_to_backprop", "device", "torch", "commit")
COLOURS = {BARE: "backprop", "backprop": "backprop", "example-float32": "eggroll"}
COLOURS |= {"example-int8": "eggroll-int8", "batch-float32": "eggroll-batch"}
COLOURS |= {"batch-bfloat16": "eggroll-batch"}
FLOOR_OF = {BARE: "backprop", "batch-bfloat16": "batch-float32"}  # where it is another's

Work = Callable[[], Any]


@dataclass(frozen=True)
class Config:
    """Time of a step of every method, over its floor and over backprop's."""

    backend: Literal["eager", "compile", "fused"] = "eager"
    """compile adds compiled rows to the eager ones, fused (CUDA) batch members' kernel too."""
    example_population: tuple[int, int, int] = (96, 128, 16)
    """Example members of each layer that see each image: by default those of the preset."""
    batch_population: int = 1_000
    """Batch members."""
    rounds: int = 20
    """Turns of everything."""
    threads: IntFlag = None
    """CPU threads (default: torch's own choice, the cores)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to measure."""
    csv: PathFlag = None
    """File for the rows; a plot goes beside it."""
    json: PathFlag = None
    """File for the rows as a JSON list."""


# ---- steps ----


class Loop:
    """What a training does from batch to batch, whatever its method; on random digits."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, digits: data.Dataset):
        self.network, self.optimizer, self.digits = network, optimizer, digits
        labels = digits.train.labels
        self.order = torch.randperm(len(labels), device=labels.device)
        self.schedule = make_schedule(optimizer, TRAINING, len(labels) // BATCH)
        self.fitness_sum, self.watch = torch.zeros((), device=labels.device), FitnessWatch()
        self.step = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        start = self.step * BATCH % (len(self.order) - BATCH)
        batch = self.digits.train[self.order[start : start + BATCH]]
        return self.digits.scale(batch.images), batch.labels

    def record(self, fitness: Tensor) -> None:
        self.schedule.step()
        self.step += 1
        self.fitness_sum += fitness
        self.watch.add(fitness, self.step)


def random_digits(device: torch.device) -> data.Dataset:
    images = torch.randint(0, 256, (IMAGES, 784), dtype=torch.uint8, device=device)
    train = data.Split(images, torch.randint(0, 10, (IMAGES,), device=device))
    return data.Dataset("random", train, train[:0], train[:0], mean=0.5, std=0.29)


def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(images), labels, label_smoothing=TRAINING.label_smoothing)


def bare_backprop(digits: data.Dataset) -> Work:
    network = MLP().to(digits.train.labels.device)
    optimizer = make_optimizer(network, TRAINING)
    images, labels = digits.scale(digits.train.images[:BATCH]), digits.train.labels[:BATCH]

    def step() -> None:
        loss = loss_of(network, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def backprop(digits: data.Dataset) -> Work:
    network = MLP().to(digits.train.labels.device)
    loop = Loop(network, make_optimizer(network, TRAINING), digits)

    def step() -> None:
        images, labels = loop.batch()
        loss = loss_of(network, images, labels)
        loop.optimizer.zero_grad()
        loss.backward()
        loop.optimizer.step()
        loop.record(-loss.detach())

    return step


def evolve(
    loop: Loop, fitness: Any, members: Any, backend: str, dtype: torch.dtype | None = None
) -> Work:
    """Raises BackendError where the compiler failed: an eager step must not pass for another."""
    evolution = Evolution(loop.network, fitness, members, backend=backend, dtype=dtype)

    def step() -> None:
        images, labels = loop.batch()
        scores = evolution.evaluate(images, labels)
        evolution.backward(scores)
        loop.optimizer.step()
        loop.record(evolution.mean_fitness)

    step()
    if evolution.backend != backend:
        raise BackendError(f"backend {backend} is not usable here (leave --backend out)")
    return step


def steps(config: Config, device: torch.device) -> dict[tuple[str, str], Work]:
    """A step of every method and backend."""
    digits = random_digits(device)
    integers = data.quantised(random_digits(device), INT8_SCALE)
    smoothing, example = TRAINING.label_smoothing, ExampleMembers(config.example_population)
    work = {(BARE, "eager"): bare_backprop(digits), ("backprop", "eager"): backprop(digits)}
    for backend in ("eager",) if config.backend == "eager" else ("eager", "compile"):
        work["batch-float32", backend] = batch_step(config, digits, backend)
        if bfloat16_pays(device):
            few = batch_step(config, digits, backend, torch.bfloat16)
            work["batch-bfloat16", backend] = few
        network = MLP().to(device)
        loop = Loop(network, make_optimizer(network, TRAINING), digits)
        fitness = cross_entropy(1.0, smoothing)
        work["example-float32", backend] = evolve(loop, fitness, example, backend)
    network = Int8MLP(MLP()).to(device)
    loop = Loop(network, Int8SGD(network, TRAINING.lr), integers)
    fitness = Int8CrossEntropy(1, smoothing, device)
    backend = choose_backend("auto", device, worth=True)  # as the script has it
    work["example-int8", backend] = evolve(loop, fitness, example, backend)
    if config.backend == "fused":
        work["batch-float32", "fused"] = batch_step(config, digits, "fused")
    return work


def batch_step(
    config: Config, digits: data.Dataset, backend: str, dtype: torch.dtype | None = None
) -> Work:
    network = MLP().to(digits.train.labels.device)
    loop = Loop(network, make_optimizer(network, TRAINING), digits)
    members = BatchMembers(config.batch_population)
    return evolve(loop, cross_entropy(2.0), members, backend, dtype=dtype)


# ---- floors ----


def backprop_floor(device: torch.device) -> Work:
    """Its matrix products, each once."""
    weights = [layer.weight.detach().to(device) for layer in MLP().layers]
    reads = [torch.randn(BATCH, weight.shape[1], device=device) for weight in weights]
    errors = [torch.randn(BATCH, weight.shape[0], device=device) for weight in weights]

    def products() -> None:
        for index, (weight, x, error) in enumerate(zip(weights, reads, errors, strict=True)):
            x @ weight.T, error.T @ x
            if index:
                error @ weight

    return products


def float_layers(device: torch.device) -> list[Callable[[Tensor], Tensor]]:
    """The second and third layer, each with the GELU of what it reads."""
    weights = [layer.weight.detach().to(device) for layer in MLP().layers][1:]
    return [lambda x, weight=weight: F.gelu(x) @ weight.T for weight in weights]


def int8_layers(device: torch.device) -> list[Callable[[Tensor], Tensor]]:
    """The second and third layer's products of int8; what the second wrote is not passed on."""
    weights = [layer.weight.to(device) for layer in Int8MLP(MLP()).layers][1:]
    return [lambda x, weight=weight: (int_matmul(x, weight.t()), x)[1] for weight in weights]


def members_floor(
    layers: list[Callable[[Tensor], Tensor]],
    counts: tuple[int, int],  # members that pass through both layers, and through the last alone
    x: Tensor,  # (members at once * B, 256)
) -> Work:
    def passes() -> None:
        for members, passed in zip(counts, (layers, layers[1:]), strict=True):
            rows = members * BATCH
            for start in range(0, rows, len(x)):
                y = x[: rows - start]
                for layer in passed:
                    y = layer(y)

    return passes


def best_members_floor(
    layers: list[Callable[[Tensor], Tensor]], counts: tuple[int, int], x: Tensor
) -> Work:
    """At the fastest of CHUNKS; x (512 * B, 256)."""
    device = x.device
    few = tuple(min(count, max(CHUNKS)) for count in counts)
    short = {chunk: members_floor(layers, few, x[: chunk * BATCH]) for chunk in CHUNKS}
    seconds = in_turn(short, device, rounds=5)
    fastest = min(CHUNKS, key=lambda chunk: statistics.median(seconds[chunk]))
    return members_floor(layers, counts, x[: fastest * BATCH])


def noise(population: int, device: torch.device) -> Work:
    """The factors of all antithetic pairs of batch members, a block's at a time."""
    numbers = [sum(layer.weight.shape) for layer in MLP().layers]
    pairs, block = population // 2, BatchMembers(2).block_size(device) // 2

    def draw() -> None:
        for start in range(0, pairs, block):
            for count in numbers:
                torch.randn(min(block, pairs - start), count, device=device)

    return draw


def floors(config: Config, device: torch.device) -> dict[str, Work]:
    """By method."""
    x = torch.randn(max(CHUNKS) * BATCH, 256, device=device)
    integers = (40 * x).clamp(-127, 127).to(torch.int8)
    first, second, _ = config.example_population
    batch = best_members_floor(float_layers(device), (config.batch_population, 0), x)
    draw = noise(config.batch_population, device)
    return {
        "backprop": backprop_floor(device),
        "example-float32": best_members_floor(float_layers(device), (first, second), x),
        "example-int8": best_members_floor(int8_layers(device), (first, second), integers),
        "batch-float32": lambda: (batch(), draw()),
    }


# ---- measuring ----


def turn_of(step: Work, device: torch.device, gradients: bool) -> tuple[Work, int]:
    """As many calls as fill a turn, as one, and how many; after two calls to warm up."""
    step(), step()
    synchronise(device)
    started = time.perf_counter()
    step()
    synchronise(device)
    calls = max(1, round(TURN / (time.perf_counter() - started)))

    def turn() -> None:
        with torch.set_grad_enabled(gradients):
            for _ in range(calls):
                step()

    return turn, calls


def measure(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """All rows."""
    work: dict[Any, Work] = dict(steps(config, device))
    with torch.no_grad():
        work |= floors(config, device)
    turns = {key: turn_of(call, device, isinstance(key, tuple)) for key, call in work.items()}
    seconds = in_turn({k: turn for k, (turn, _) in turns.items()}, device, rounds=config.rounds)
    per_step = {key: [s / turns[key][1] for s in found] for key, found in seconds.items()}
    populations = {
        "example": "+".join(map(str, config.example_population)),
        "batch": config.batch_population,
    }
    bare = statistics.median(per_step[BARE, "eager"])
    rows = []
    for what, backend in filter(lambda key: isinstance(key, tuple), work):
        own = sorted(per_step[what, backend])
        step = statistics.median(own)
        floor = statistics.median(per_step[FLOOR_OF.get(what, what)])
        rows.append(
            {
                "what": what,
                "backend": backend,
                "population": populations.get(what.split("-")[0], ""),
                "step_seconds": round(step, 7),
                "p10": round(own[len(own) // 10], 7),
                "p90": round(own[-1 - len(own) // 10], 7),
                "floor_seconds": round(floor, 7),
                "ratio_to_floor": round(step / floor, 3),
                "ratio_to_backprop": round(step / bare, 3),
            }
            | provenance(device)
        )
        show(rows, COLUMNS[:9])
    return rows


def draw_plot(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Each step over backprop's as a bar, its floor as a mark."""
    bare = rows[0]["step_seconds"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 1.2 + 0.6 * len(rows)), layout="constrained")
        for place, row in enumerate(rows):
            ratio, floor = row["ratio_to_backprop"], row["floor_seconds"] / bare
            axes.barh(place, ratio, height=0.6, color=colour(COLOURS[row["what"]]))
            axes.plot([floor, floor], [place - 0.3, place + 0.3], color="black", linewidth=2.5)
            label = f"{ratio:.3g} times, {1_000 * row['step_seconds']:.3g} ms"
            shift = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(label, (max(ratio, floor), place), **shift)
        axes.plot([], [], color="black", linewidth=2.5, label="floor: every member by itself")
        compiled = {"eager": "", "compile": ", compiled", "fused": ", fused"}
        axes.set_yticks(range(len(rows)), [r["what"] + compiled[r["backend"]] for r in rows])
        axes.invert_yaxis()
        ends = [r["floor_seconds"] / bare for r in rows] + [r["ratio_to_backprop"] for r in rows]
        axes.set(xscale="log", xlim=(0.7 * min(ends), 8 * max(ends)))  # room for the labels
        axes.set(xlabel="seconds of a step over those of backprop's bare step (log scale)")
        axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", visible=False)
        axes.set_title(f"A step of batch {BATCH}\n{rows[0]['device']}", fontsize=13)
        axes.legend(loc="upper right")
        return save(figure, path.parent, path.stem)


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    cli.check({"threads": config.threads})
    if config.rounds < 1:
        raise UserError(f"--rounds {config.rounds} is below 1 (type 1 or more)")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = cli.resolve_device(config.device)
    keep_freed_memory()
    started = time.perf_counter()
    rows = measure(config, device)
    print(f"{time.perf_counter() - started:.0f} s")
    write_rows(rows, COLUMNS, config.csv, config.json)
    if config.csv:
        print(*draw_plot(rows, config.csv), sep="\n")


if __name__ == "__main__":
    cli.run_script(main, "speed.py", errors=(BackendError, PopulationError))
