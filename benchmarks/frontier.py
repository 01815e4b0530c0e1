"""Accuracy against seconds of training: whole runs of several lengths, each with its own schedule.

python benchmarks/frontier.py --out-dir results/frontier     # about half an hour on two cores
python benchmarks/frontier.py --tiny --dataset mnist-sample  # to see that it works

1. Trials, the same number for every method: each length with each of two settings, on the
   validation split, seed 0.
2. Of each method those that no other trial of it beats in both seconds and accuracy, on all
   training images, all seeds, in turn.
3. A table of the shortest runs whose mean reaches 97.5, 98.0 and 98.3 % of the test set, with the
   ratio to backprop's; and a plot.

Finished runs are skipped, so the same command goes on after an interruption.
"""

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import tyro
from matplotlib.ticker import FuncFormatter, NullFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder

from benchmarks.rows import provenance, show, write_rows
from lab import cli
from lab.experiments import COMMANDS, ROOT
from lab.plots import NAMES, STYLE, colour, plain_number, save
from lab.report import read_summary

SETTINGS = {  # two for every method, chosen before the trials
    "backprop": (("--lr", "0.1"), ("--lr", "0.2")),
    "eggroll": (
        ("--population", "96+128+16", "--lr", "0.1"),
        ("--population", "128+128+16", "--lr", "0.14"),
    ),
    "eggroll-int8": (
        ("--population", "96+128+16", "--lr", "0.04"),
        ("--population", "128+128+16", "--lr", "0.06"),
    ),
}
LENGTHS = (1, 2, 3, 4, 6)  # epochs
REACHED = (97.5, 98.0, 98.3)  # percent of the test set
COLUMNS = ("method", "epochs", "settings", "seeds", "seconds", "test_accuracy", "spread")
COLUMNS += ("validation_accuracy", "device", "torch", "commit")


@dataclass(frozen=True)
class Config:
    """Accuracy against seconds of training, of backprop and of both dtypes of example members."""

    out_dir: Path = Path("results/frontier")
    """Folder for all runs, the table and the plot."""
    seeds: int = 5
    """Seeds 0 to n - 1 of the chosen runs."""
    tiny: bool = False
    """One length, one seed, few members: to see that it works."""
    dataset: Literal["mnist", "mnist-sample"] = "mnist"
    """mnist-sample needs no download."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""


@dataclass(frozen=True)
class Point:
    """A whole run of some method."""

    method: str
    epochs: int
    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        words = "_".join(word.removeprefix("--") for word in self.settings)
        return f"{self.method}-{self.epochs}-{words}"


def finished(point: Point, folder: Path, flags: Sequence[str]) -> dict[str, Any]:
    """The summary of a run, which is made if it is not there."""
    if not (folder / "summary.json").exists() or read_summary(folder)["status"] != "finished":
        script, *own = COMMANDS[point.method]
        command = [sys.executable, str(ROOT / script), *own, *point.settings, *flags]
        command += ["--epochs", str(point.epochs), "--out-dir", str(folder), "--overwrite"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr, end="")
            raise SystemExit(done.returncode)
    return read_summary(folder)


def trials(config: Config, points: Sequence[Point]) -> dict[Point, dict[str, Any]]:
    flags = ("--dataset", config.dataset, "--device", config.device, "--eval-every", "100")
    found = {}
    for point in points:
        found[point] = finished(point, config.out_dir / "trials" / point.name / "seed0", flags)
        accuracy, seconds = (found[point][k] for k in ("validation_accuracy", "train_seconds"))
        print(f"{point.name}: validation {accuracy:.2%}, {seconds:.1f} s", flush=True)
    return found


def undominated(found: dict[Point, dict[str, Any]]) -> list[Point]:
    """Trials that no other of the same method beats in seconds and in accuracy."""

    def beaten(point: Point) -> bool:
        own = found[point]
        return any(
            other.method == point.method
            and summary["train_seconds"] < own["train_seconds"]
            and summary["validation_accuracy"] >= own["validation_accuracy"]
            for other, summary in found.items()
        )

    return [point for point in found if not beaten(point)]


def measure(config: Config) -> list[dict[str, Any]]:
    """All rows: a chosen point each, over its seeds."""
    methods = {m: s[:1] if config.tiny else s for m, s in SETTINGS.items()}
    lengths, seeds = ((1,), 1) if config.tiny else (LENGTHS, config.seeds)
    few = {"eggroll": ("--population", "12"), "eggroll-int8": ("--population", "12")}
    points = [
        Point(method, epochs, few.get(method, own) if config.tiny else own)
        for epochs in lengths
        for method, settings in methods.items()
        for own in settings
    ]
    found = trials(config, points)
    chosen, runs = undominated(found), {}
    for seed in range(seeds):
        flags = ("--dataset", config.dataset, "--device", config.device, "--train-on-all")
        flags += ("--eval-every", "100", "--seed", str(seed))
        for point in chosen:
            folder = config.out_dir / "runs" / point.name / f"seed{seed}"
            runs.setdefault(point, []).append(finished(point, folder, flags))
            print(f"{point.name} seed {seed}: {runs[point][-1]['test_accuracy']:.2%}", flush=True)
    rows: list[dict[str, Any]] = []
    for point in sorted(chosen, key=lambda point: list(SETTINGS).index(point.method)):
        rows.append(row_of(point, runs[point], found[point]["validation_accuracy"]))
        show(rows, COLUMNS[:7])
    return rows


def row_of(point: Point, runs: Sequence[dict[str, Any]], validation: float) -> dict[str, Any]:
    accuracies = [100 * run["test_accuracy"] for run in runs]
    device = torch.device("cuda" if runs[0]["device"].startswith("cuda") else "cpu")
    return {
        "method": point.method,
        "epochs": point.epochs,
        "settings": " ".join(point.settings),
        "seeds": len(runs),
        "seconds": round(statistics.median(run["train_seconds"] for run in runs), 2),
        "test_accuracy": round(statistics.mean(accuracies), 3),
        "spread": round(statistics.pstdev(accuracies), 3),
        "validation_accuracy": validation,
        **provenance(device),
        "device": runs[0]["device"],
    }


def shortest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of the shortest run that reaches each accuracy, and over backprop's."""
    table = []
    for accuracy in REACHED:
        line: dict[str, Any] = {"reaches": f"{accuracy:.1f} %"}
        for method in SETTINGS:
            reached = [
                row["seconds"]
                for row in rows
                if row["method"] == method and row["test_accuracy"] >= accuracy
            ]
            line[method] = min(reached, default=None)
        for method in list(SETTINGS)[1:]:
            own, backprop = line[method], line["backprop"]
            line[f"{method}/backprop"] = round(own / backprop, 1) if own and backprop else None
        table.append(line)
    return table


def markdown(table: Sequence[dict[str, Any]]) -> str:
    lines = ["| test accuracy | " + " | ".join(list(table[0])[1:]) + " |"]
    lines.append("|---" + "|---:" * (len(table[0]) - 1) + "|")
    for line in table:
        cells = ["" if value is None else str(value) for value in line.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_plot(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """A line per method, its points labelled with their epochs."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
        for method in SETTINGS:
            own = sorted((r for r in rows if r["method"] == method), key=lambda r: r["seconds"])
            if not own:
                continue
            x, y = [r["seconds"] for r in own], [r["test_accuracy"] for r in own]
            spread = [r["spread"] for r in own]
            kind = {"color": colour(method), "label": NAMES[method], "marker": "o", "capsize": 3}
            axes.errorbar(x, y, spread, linewidth=2, **kind)
            for row in own:
                place = (row["seconds"], row["test_accuracy"])
                axes.annotate(
                    str(row["epochs"]), place, xytext=(5, -14), textcoords="offset points"
                )
        axes.set(xscale="log", xlabel="seconds of training, whole runs (log scale)")
        axes.set(ylabel="test accuracy, %")
        axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"Numbers at the points: epochs\n{rows[0]['device']}", fontsize=13)
        axes.legend(loc="lower right")
        return save(figure, folder, "frontier")


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    rows = measure(config)
    write_rows(rows, COLUMNS, config.out_dir / "frontier.csv", None)
    table = markdown(shortest(rows))
    (config.out_dir / "frontier.md").write_text(table)
    print(table, *draw_plot(rows, config.out_dir), sep="\n")


if __name__ == "__main__":
    cli.run_script(main, "frontier.py", errors=())
