"""Seconds of a training step of each method, over its lower bound and over backprop's step.

python benchmarks/speed.py --csv speed.csv             # a minute on two cores
python benchmarks/speed.py --csv speed.csv --memory    # with the peak memory of each method
python benchmarks/speed.py --methods backprop eggroll eggroll:39000

Steps are those of the scripts: on CUDA each is one graph. The lower bound is the arithmetic that a
method cannot avoid, at the best rates of this machine: bounds.py, timed in the same run. Times are
the median and the deciles of turns of 50 ms, which alternate.
"""

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a file, from any folder

from benchmarks import bounds
from benchmarks import rows as shared
from benchmarks.rows import Row, Series
from benchmarks.steps import BACKPROP, BATCH, METHODS, make
from eggroll import Evolution, PopulationError
from experiment.config import MARKERS
from experiment.device import (
    card_memory,
    choose_device,
    peak_memory_mb,
    reset_peak_memory,
    set_threads,
)
from experiment.errors import UserError
from experiment.script import run_script
from experiment.style import colour
from model import MLP


@dataclass(frozen=True, kw_only=True)
class Config(shared.Flags):
    """Flags of this benchmark."""

    methods: tuple[str, ...] = METHODS
    """Methods, or METHOD:POPULATION; without a population, the preset's. backprop comes first."""
    rounds: int = 20
    """Turns of each step."""
    memory: bool = False
    """Add the peak memory of a process that takes steps of one method."""


def count_of(evolution: Evolution | None) -> bounds.Counts:
    """Return what a step cannot avoid (None: backprop's)."""
    if evolution:
        return bounds.evolution(evolution, BATCH)
    weights = (parameter.shape for parameter in MLP().parameters())
    return bounds.backprop([(inputs, outputs) for outputs, inputs in weights], BATCH)


def peak_memory(device: torch.device, name: str) -> Row:
    """Return columns of this process's peak memory after a few steps, the data included."""
    step, _ = make(name, device).work()
    allocated = reset_peak_memory(device)
    for _ in range(3):
        step()
    return {"peak_memory_mb": round(peak_memory_mb(device), 1)} | card_memory(device, allocated)


def peak_memory_alone(device: torch.device, name: str) -> Row:
    """Return the same of a process that does nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(peak_memory, device, name).result()


def of_each(
    names: Iterable[str], call: Callable[[str], Any], failed: dict[str, str]
) -> dict[str, Any]:
    """Return what a call gives for each name; one that fails is noted and does not end the others.

    Raises UserError for a name that is no method.
    """
    found = {}
    for name in names:
        try:
            found[name] = call(name)
        except UserError:
            raise
        except Exception as error:
            failed[name] = f"{name} failed: {' '.join(str(error).split())[:200]}"
    return found


def measure(config: Config, device: torch.device) -> tuple[list[Row], list[str]]:
    """Return the rows, and a line for each method that failed."""
    memory, failed = {}, {}
    if config.memory:  # before this process takes memory of a card
        memory = of_each(config.methods, partial(peak_memory_alone, device), failed)
    trainings = of_each(config.methods, lambda name: make(name, device), failed)
    work = of_each(trainings, lambda name: trainings[name].work(), failed)
    steps = {name: step for name, (step, _) in work.items()}
    operations = bounds.operations(device)
    seconds = shared.in_turn(steps | operations, device, config.rounds, turn=0.05)
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    each = bounds.seconds_of_each({key: middle[key] for key in operations})
    rows = []
    for name in steps:
        evolution = trainings[name].evolution
        bound = count_of(evolution).seconds(each)
        row = {"what": name, "population": evolution.population if evolution else ""}
        row |= times(seconds[name], bound, middle[BACKPROP])
        if device.type == "cuda":
            row["graph"] = work[name][1]
        row |= memory.get(name, {})
        shared.show(row, first=not rows)
        rows.append(row | shared.provenance(device))
    return rows, list(failed.values())


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
    """Draw each step over backprop's as a mark, with a line from its lower bound."""
    lowest = [row["bound_seconds"] / rows[0]["step_seconds"] for row in rows]
    bound = "lower bound: the arithmetic that the step cannot avoid, at this machine's best rates"
    series = [Series("measured", [], [], "ko"), Series(bound, lowest, range(len(rows)), "k|")]
    names = []
    for place, row in enumerate(rows):
        ratio, paint = row["ratio_to_backprop"], colour(row["what"].partition(":")[0])
        note = f"{row['ratio_to_bound']:.3g} x its bound"
        series.append(Series("", [lowest[place], ratio], [place, place], "-", paint))
        series.append(Series("", [ratio], [place], "o", paint, notes=[note]))
        milliseconds = f"{1_000 * row['step_seconds']:,.4g} ms"
        names.append(f"{row['what']}\n{milliseconds}, {ratio:.3g} x backprop")
    label = "seconds of a step over those of backprop's step (log scale)"
    panel = shared.Panel("", label, "", series, names)
    shared.draw(path, f"A training step of batch {BATCH}\n{rows[0]['device']}", [panel])


def main() -> None:
    config = tyro.cli(Config, config=MARKERS)
    set_threads(config.threads)
    rows, failed = measure(config, choose_device(config.device))
    shared.write_rows(rows, config.csv, config.json, plot)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    run_script(main, "speed.py", errors=(PopulationError,))
