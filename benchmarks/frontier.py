"""Test accuracy against seconds of training: whole runs of several lengths, each with its schedule.

python benchmarks/frontier.py --out-dir results/frontier     # an hour on two cores
python benchmarks/frontier.py --tiny --dataset mnist-sample  # one short run of each method

1. Trials: every method gets each length with each of its settings, on the validation split, seed 0.
2. Trials of a method that no other trial of it beats in both seconds and accuracy are repeated on
   all training images with all seeds, one seed after the other.
3. frontier.csv has a row for each of them, frontier.md the seconds of the shortest run whose mean
   reaches an accuracy, and the ratio to backprop's.

Finished runs are kept, and interrupted ones continue: the same command resumes the benchmark.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a file, from any folder

from benchmarks.rows import Panel, Row, Series, draw, provenance_of, show, write_rows
from experiment.commands import COMMANDS, finish
from experiment.config import MARKERS
from experiment.errors import UserError
from experiment.script import run_script
from experiment.style import colour, line_format

INT8 = "node-perturbation-int8"
Method = Literal[
    "backprop", "eggroll", "eggroll-dense", "node-perturbation", "node-perturbation-int8"
]
METHODS: tuple[Method, ...] = get_args(Method)
SETTINGS = {  # chosen before the trials
    "backprop": ("--lr 0.1", "--lr 0.2"),
    "eggroll": ("--population 8192 8192 256", "--population 4096 4096 128"),
    "eggroll-dense": ("",),
    "node-perturbation": ("--population 96 128 16 --lr 0.1", "--population 128 128 16 --lr 0.14"),
    INT8: ("--population 96 128 16 --lr 0.04", "--population 128 128 16 --lr 0.06"),
}
TINY = {"backprop": "", "eggroll": "--population 66"}
SHORT = (1, 2, 3, 4, 6)
LENGTHS = {  # epochs; fewer lengths where an epoch takes minutes
    "backprop": SHORT,
    "eggroll": (1, 2, 5),
    "eggroll-dense": (1, 3),
    "node-perturbation": SHORT,
    INT8: SHORT,
}
REACHED = (97.0, 97.5, 98.0, 98.3)  # % of the test set

Summary = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of this benchmark."""

    out_dir: Path = Path("results/frontier")
    """Folder for all runs, the table and the plot."""
    methods: tuple[Method, ...] = METHODS
    """Methods to train."""
    seeds: int = 3
    """Repeat chosen runs with seeds 0 to n - 1."""
    tiny: bool = False
    """Train one epoch with few members and one seed."""
    dataset: Literal["mnist", "mnist-sample"] = "mnist"
    """MNIST is read from $MNIST_DIR, else from data; mnist-sample needs no network."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on."""


@dataclass(frozen=True)
class Point:
    """The flags of a whole run."""

    method: Method
    epochs: int
    settings: str

    @property
    def name(self) -> str:
        """Folder of the run."""
        return "_".join([self.method, str(self.epochs), *self.settings.replace("--", "").split()])


def train(config: Config, point: Point, folder: Path, *flags: str) -> Summary:
    """Return the summary of a run, which is made or finished if need be. Raises UserError."""
    flags = (*point.settings.split(), *flags, "--epochs", str(point.epochs), "--eval-every", "100")
    flags += ("--device", config.device, "--dataset", config.dataset)
    summary = finish(COMMANDS[point.method], config.out_dir / folder, *flags)
    if summary["status"] == "diverged":
        raise UserError(f"{folder} has diverged: its settings need a smaller --lr")
    accuracy = summary["validation_accuracy"] or summary["test_accuracy"]
    print(f"{folder}: {accuracy:.2%}, {summary['train_seconds']:.1f} s", flush=True)
    return summary


def undominated(trials: Mapping[Point, Summary]) -> list[Point]:
    """Return the trials that no other of the same method beats in seconds and in accuracy."""
    return [
        point
        for point, own in trials.items()
        if not any(
            other.method == point.method
            and summary["train_seconds"] < own["train_seconds"]
            and summary["validation_accuracy"] >= own["validation_accuracy"]
            for other, summary in trials.items()
        )
    ]


def measure(config: Config) -> list[Row]:
    """Return a row for each chosen point, over its seeds."""
    if config.tiny:
        points = [
            Point(method, 1, TINY.get(method, "--population 12")) for method in config.methods
        ]
    else:
        points = [
            Point(method, epochs, settings)
            for method in config.methods
            for epochs in LENGTHS[method]
            for settings in SETTINGS[method]
        ]
    trials = {point: train(config, point, Path("trials") / point.name) for point in points}
    chosen: dict[Point, list[Summary]] = {point: [] for point in undominated(trials)}
    for seed in range(1 if config.tiny else config.seeds):
        for point, runs in chosen.items():
            folder = Path("runs") / point.name / f"seed{seed}"
            runs.append(train(config, point, folder, "--train-on-all", "--seed", str(seed)))
    rows: list[Row] = []
    for point in sorted(chosen, key=lambda point: METHODS.index(point.method)):
        runs = chosen[point]
        accuracies = [100 * run["test_accuracy"] for run in runs]
        row = {
            "method": point.method,
            "epochs": point.epochs,
            "settings": point.settings,
            "seeds": len(runs),
            "seconds": round(statistics.median(run["train_seconds"] for run in runs), 2),
            "test_accuracy": round(statistics.mean(accuracies), 3),
            "standard_deviation": round(statistics.stdev(accuracies), 3) if runs[1:] else 0.0,
            "validation_accuracy": trials[point]["validation_accuracy"],
        }
        show(row, first=not rows)
        rows.append(row | provenance_of(config.out_dir / "runs" / point.name / "seed0"))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the seconds of the shortest run that reaches each accuracy, as Markdown."""
    lines = [["test accuracy", *METHODS], ["---"] + ["---:"] * len(METHODS)]
    for accuracy in REACHED:
        cells, base = [f"{accuracy:.1f} %"], None
        for method in METHODS:
            reached = [r for r in rows if r["method"] == method and r["test_accuracy"] >= accuracy]
            seconds = min((row["seconds"] for row in reached), default=None)
            base = seconds if method == "backprop" else base
            ratio = f" ({seconds / base:.1f}x)" if seconds and base else ""
            cells.append(f"{seconds:,.1f} s{ratio}" if seconds else "")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw a line per method, its points labelled with their epochs."""
    series, columns = [], ("seconds", "test_accuracy", "standard_deviation")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = sorted((r for r in rows if r["method"] == method), key=lambda r: r["seconds"])
        x, y, error = ([row[column] for row in own] for column in columns)
        notes = [f"{row['epochs']:g}" for row in own]
        series.append(Series(method, x, y, line_format(method), colour(method), error, notes))
    label = "seconds of training of whole runs (log scale)"
    title = "Whole runs: mean and standard deviation of the seeds; numbers: epochs"
    draw(path, f"{title}\n{rows[0]['device']}", [Panel("", label, "test accuracy (%)", series)])


def main() -> None:
    config = tyro.cli(Config, config=MARKERS)
    rows, path = measure(config), config.out_dir / "frontier.csv"
    write_rows(rows, path, None, plot)
    path.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_script(main, "frontier.py")
