"""One population over several processes of this machine, and a model of many more.

python benchmarks/scaling.py --csv results/scaling.csv     # a few minutes on two cores

strong     the same population over 1, 2, ... processes that share the same threads
weak       as much population for each process
repeated   part of a step that every process repeats: the unperturbed forward, the noise of the
           gradient and its products, the optimizer
A table and a plot for 1 to 10,000 devices follow, from these numbers and a link's speed. They are a
model, and say so: T(n) = repeated + evaluated / n + bytes / link + latency log2(n).
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder

from benchmarks.rows import provenance, show, write_rows
from eggroll import MLP, BatchMembers, Evolution, cross_entropy
from lab import cli
from lab.cli import PathFlag
from lab.plots import STYLE, save

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ("mnist_eggroll.py", "--members", "batch", "--dataset", "mnist-sample", "--quiet")
BATCH = 128
COLUMNS = ("what", "processes", "threads_each", "population", "step_seconds", "throughput")
COLUMNS += ("bytes_per_step", "repeated_share", "device", "torch", "commit")
DEVICES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)


@dataclass(frozen=True)
class Config:
    """Scaling over processes, measured, and over many devices, modelled."""

    population: int = 1_000
    """Batch members of strong scaling, and of each process of weak scaling."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes; the threads are shared among them."""
    threads: int = 2
    """CPU threads in all."""
    epochs: int = 4
    """Of mnist-sample, 28 steps each."""
    link_gb: float = 12.5
    """Of the model: GB/s between devices."""
    latency_us: float = 10.0
    """Of the model: microseconds of one exchange."""
    csv: PathFlag = None
    """File for the rows; a plot of the model goes beside it."""


def step_seconds(config: Config, processes: int, population: int) -> float:
    """Mean of a whole run, by its own clock."""
    threads = str(max(1, config.threads // processes))
    flags = ("--population", str(population), "--epochs", str(config.epochs))
    flags += ("--threads", threads, "--backend", "eager", "--eval-every", "1000")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    with tempfile.TemporaryDirectory() as folder:
        out = ("--out-dir", folder)
        start = torchrun if processes > 1 else ()
        subprocess.run([sys.executable, *start, *SCRIPT, *flags, *out], cwd=ROOT, check=True)
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return summary["train_seconds"] / summary["steps"]


def repeated_share(config: Config) -> float:
    """Part of a step that is not the evaluation of members, in one process."""
    torch.manual_seed(0)
    network, members = MLP(), BatchMembers(config.population)
    evolution = Evolution(network, cross_entropy(), members)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6)
    images, labels = torch.randn(BATCH, 784), torch.randint(0, 10, (BATCH,))
    spent = {"all": 0.0, "members": 0.0}
    score = evolution._score

    def timed(*args: Any) -> Any:
        started = time.perf_counter()
        found = score(*args)
        spent["members"] += time.perf_counter() - started
        return found

    evolution._score = timed
    for step in range(12):
        if step == 2:  # the first ones warm up
            spent = dict.fromkeys(spent, 0.0)
        started = time.perf_counter()
        evolution.backward(evolution.evaluate(images, labels))
        optimizer.step()
        spent["all"] += time.perf_counter() - started
    return 1 - spent["members"] / spent["all"]


def measure(config: Config) -> list[dict[str, Any]]:
    device, rows, share = torch.device("cpu"), [], repeated_share(config)
    for what in ("strong", "weak"):
        for processes in config.processes:
            population = config.population * (processes if what == "weak" else 1)
            seconds = step_seconds(config, processes, population)
            rows.append(
                {
                    "what": what,
                    "processes": processes,
                    "threads_each": max(1, config.threads // processes),
                    "population": population,
                    "step_seconds": round(seconds, 5),
                    "throughput": round(population / seconds),
                    "bytes_per_step": 4 * population,  # one float of each batch member
                    "repeated_share": round(share, 3),
                }
                | provenance(device)
            )
            show(rows, COLUMNS[:8])
    return rows


def modelled(config: Config, row: dict[str, Any], devices: int, population: int) -> float:
    """Seconds of a step, from one measured row of strong scaling over one process."""
    grown = population / row["population"]
    repeated = row["repeated_share"] * row["step_seconds"] * grown  # the gradient's noise grows too
    evaluated = (1 - row["repeated_share"]) * row["step_seconds"] * grown / devices
    sent = 4 * population / (config.link_gb * 1e9)
    return repeated + evaluated + sent + config.latency_us * 1e-6 * math.log2(max(devices, 2))


def summed(config: Config, row: dict[str, Any], devices: int, population: int) -> float:
    """The same where every device makes its own members' part of the update, and parts are summed:
    the weights are sent, twice, in place of the scores."""
    whole = row["step_seconds"] * population / row["population"] / devices
    sent = 2 * 4 * sum(p.numel() for p in MLP().parameters()) / (config.link_gb * 1e9)
    return whole + sent + config.latency_us * 1e-6 * math.log2(max(devices, 2))


def draw_plot(config: Config, row: dict[str, Any], path: Path) -> list[Path]:
    population = 40 * row["population"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
        for name, model in (("all update alike", modelled), ("parts are summed", summed)):
            seconds = [model(config, row, devices, population) for devices in DEVICES]
            axes.plot(DEVICES, seconds, "o-", label=f"{name} (model)")
        axes.set(xscale="log", yscale="log", xlabel="devices, each as fast as this CPU")
        axes.set(ylabel="seconds of a step")
        axes.set_title(f"A model, not a measurement: population {population:,}", fontsize=13)
        axes.legend()
        return save(figure, path.parent, path.stem)


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    rows = measure(config)
    first = rows[0]
    print("\nA model, not a measurement: seconds of a step for 40 times the population")
    for devices in DEVICES:
        population = 40 * first["population"]
        own, parts = (m(config, first, devices, population) for m in (modelled, summed))
        print(f"{devices:>6} devices: all update alike {own:.4f}, parts summed {parts:.4f}")
    write_rows(rows, COLUMNS, config.csv, None)
    if config.csv:
        print(*draw_plot(config, first, config.csv), sep="\n")


if __name__ == "__main__":
    cli.run_script(main, "scaling.py", errors=())
