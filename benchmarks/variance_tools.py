"""What each variance tool is worth alone: short trainings that differ from a base in one thing.

python benchmarks/variance_tools.py --csv tools.csv                           # a quarter of an hour
python benchmarks/variance_tools.py --estimators per-example --seeds 0 1 2

Every row is mnist_eggroll.py with the flags that it names, so each can be had again by hand.
Accuracies are on the validation images. Members are chosen so that a row takes about as many
forward passes as its base; seconds are of the machine as it was, with --jobs trainings at once.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder

from benchmarks.rows import provenance, show, write_rows
from lab import cli
from lab.cli import PathFlag
from lab.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "mnist_eggroll.py"
COLUMNS = ("estimator", "tool", "seeds", "validation_accuracy", "against_base", "train_seconds")
COLUMNS += ("flags", "device", "torch", "commit")

ONE = "--layers-per-member one --sigma 0.004 --population 320"
FORWARD = ONE.replace("320", "640") + " --difference forward"
TOOLS = {
    "per-example": {
        "base": "",
        "Adam": "--optimizer adam --lr 0.001",
        "SGD without momentum": "--momentum 0 --lr 0.4",
        "constant learning rate": "--lr-schedule constant --lr 0.02",
        "cosine schedule": "--lr-schedule cosine",
        "exponential moving average": "--average-weights ema --ema-decay 0.98",
        "equal average of the second half": "--average-weights equal",
        "norm clipped at 1": "--clip-norm 1",
        "slopes winsorised, 1 %": "--winsorize 0.01",
        "Gaussian A": "--noise gaussian",
        "Rademacher A": "--noise rademacher",
        "A shared by all groups": "--share-a",
        "Gaussian B": "--sampling gaussian",
        "B in the batch's span": "--sampling batch-subspace",
        "activations": "--perturbation activations",
        "central differences": "--difference central",
        "rank 4": "--rank 4",
        "1 group": "--groups 1 --population 144",
        "4 groups": "--groups 4 --population 576",
        "no label smoothing": "--label-smoothing 0",
        "temperature 2": "--temperature 2",
        "three times as many members late": "--population 1152 --population-growth 3",
    },
    "population": {
        "base": "",
        "Adam": "--optimizer adam --lr 0.0005",
        "SGD without momentum": "--momentum 0 --lr 0.1",
        "constant learning rate": "--lr-schedule constant --lr 0.005",
        "equal average of the second half": "--average-weights equal",
        "constant rate, averaged": "--lr-schedule constant --average-weights equal",
        "scores winsorised, 5 %": "--winsorize 0.05",
        "norm clipped at 20": "--clip-norm 20",
        "label smoothing": "--label-smoothing 0.1",
        "temperature 1": "--temperature 1",
        "three times as many members late": "--population 128 --population-growth 3",
        "4 groups": "--groups 4 --population 1024 --lr 0.015",
        "one layer per member": ONE,
        "... forward differences": FORWARD,
        "... and orthogonal A": FORWARD + " --noise orthogonal",
        "... B in the batch's span": ONE + " --sampling batch-subspace",
        "... and 16 groups": FORWARD + " --groups 16 --population 6144 --lr 0.015",
        "preset tools": "--preset tools --population 4608 --lr 0.02",
    },
}
BASE = {"per-example": "--epochs 1", "population": "--epochs 1 --population 256 --lr 0.008"}


@dataclass(frozen=True)
class Config:
    """Validation accuracy of short trainings, each with one tool more than the base."""

    estimators: tuple[Literal["per-example", "population"], ...] = ("per-example", "population")
    """Whose tools to measure."""
    seeds: tuple[int, ...] = (0,)
    """Trainings per row, of which the mean is given."""
    dataset: Literal["mnist", "mnist-sample"] = "mnist"
    """Which images; mnist-sample needs no network."""
    jobs: int = 2
    """Trainings at once, which share the CPU's cores."""
    only: tuple[str, ...] = ()
    """Names of tools to measure (default: all); the base always is."""
    csv: PathFlag = None
    """File for the rows."""
    json: PathFlag = None
    """File for the rows as a JSON list."""


def train(flags: Sequence[str], jobs: int) -> dict[str, Any]:
    """The summary of one training; none where it diverged. Raises UserError for other failures."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT), *flags, "--quiet", "--out-dir", folder]
        command.append("--overwrite")
        environment = {**os.environ, **threads}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if "diverged" in done.stderr:
            return {}
        if done.returncode:
            raise UserError(f"{' '.join(flags)}: {done.stderr.strip().splitlines()[-1]}")
        return json.loads((Path(folder) / "summary.json").read_text())


def flags_of(estimator: str, tool: str, dataset: str) -> list[str]:
    flags = f"--estimator {estimator} --dataset {dataset} {BASE[estimator]}"
    return [*flags.split(), *TOOLS[estimator][tool].split()]


def row(estimator: str, tool: str, flags: list[str], runs: list[dict], base: float) -> dict:
    same = {"estimator": estimator, "tool": tool, "seeds": len(runs), "flags": " ".join(flags)}
    if not all(runs):
        return same | {
            "validation_accuracy": "diverged", "against_base": "", "train_seconds": ""
        }  # fmt: skip
    accuracy = statistics.mean(run["validation_accuracy"] for run in runs)
    return same | {
        "validation_accuracy": round(accuracy, 5),
        "against_base": round(accuracy - base, 5) if base else "",
        "train_seconds": statistics.median(run["train_seconds"] for run in runs),
    }


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    names = {name for estimator in config.estimators for name in TOOLS[estimator]}
    if unknown := set(config.only) - names:
        raise UserError(f"there is no tool {min(unknown)!r} (try one of: {', '.join(names)})")
    work = [
        (estimator, tool)
        for estimator in config.estimators
        for tool in TOOLS[estimator]
        if tool == "base" or not config.only or tool in config.only
    ]
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(config.jobs) as pool:
        runs = {}
        for key in work:
            flags = flags_of(*key, config.dataset)
            for seed in config.seeds:
                typed = [*flags, "--seed", str(seed)]
                runs.setdefault(key, []).append(pool.submit(train, typed, config.jobs))
        base = 0.0
        for key in tqdm(work, disable=None):
            done = [run.result() for run in runs[key]]
            base = 0.0 if key[1] == "base" else base
            rows.append(row(*key, flags_of(*key, config.dataset), done, base))
            base = base or rows[-1]["validation_accuracy"]
            rows[-1] |= provenance(torch.device("cpu"))
            show(rows, COLUMNS[:6])
    write_rows(rows, COLUMNS, config.csv, config.json)


if __name__ == "__main__":
    cli.run_script(main, "variance_tools.py", errors=())
