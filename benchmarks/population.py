"""The experiment as it was: how far runs with a population of 39,000 came in an hour.

python benchmarks/population.py FOLDER    # FOLDER/ROW holds a run, finished or interrupted

benchmarks/results.sh makes the runs; this writes FOLDER/population.csv and a plot of their curves.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a file, from any folder

from benchmarks.rows import Panel, Row, Series, draw, provenance_of
from experiment.config import read_config
from experiment.errors import UserError
from experiment.files import write_csv
from experiment.report import read_metrics
from experiment.script import run_script
from experiment.style import colour, line_format


def row_of(run: Path) -> Row:
    """Return what a run has reached, and the time that all of its epochs take."""
    flags = read_config(run)["flags"]
    summary = json.loads((run / "summary.json").read_text())
    steps, seconds = summary["steps"], summary["train_seconds"]
    batches = -(-60_000 // flags["batch_size"])  # of an epoch
    accuracy = f"{100 * summary['test_accuracy']:.2f}"
    return {
        "method": run.name,
        "signal": "accuracy" if flags["smoothing"] == 0 else "accuracy, smoothed",
        "members": summary["population"],
        "epochs": round(steps / batches, 2),
        "test_accuracy": accuracy + (f" after {summary['epochs']}" if steps % batches else ""),
        "seconds": round(seconds),
        "seconds_of_ten_epochs": round(10 * batches * seconds / steps),
        "memory_mb": round(summary["peak_memory_mb"]),
    } | provenance_of(run)


def has_epoch(summary: Path) -> bool:
    return json.loads(summary.read_text())["epochs"] > 0


def plot(runs: Sequence[Path], device: str, path: Path) -> None:
    """Draw test accuracy by seconds, a line for each run."""
    series = []
    for run in runs:  # each has finished an epoch
        points = [
            (row["train_seconds"], 100 * row["test_accuracy"])
            for row in read_metrics(run)
            if row["train_seconds"] and row["test_accuracy"]
        ]
        method, _, variant = run.name.partition("+")
        line = line_format(method)[0] + ("--" if variant else "-")
        series.append(Series(run.name, *zip(*points, strict=True), line, colour(method)))
    labels = ("seconds of training (log scale)", "test accuracy (%)")
    draw(
        path,
        f"Population 39,000, accuracy as the signal; a mark for each epoch\n{device}",
        [Panel("", *labels, series)],
    )


def main() -> None:
    match sys.argv[1:]:
        case [name] if list(Path(name).glob("*/summary.json")):
            folder = Path(name)
        case words:
            raise UserError(f"expected a folder of runs, got {' '.join(words) or 'nothing'}")
    runs = sorted(path.parent for path in folder.glob("*/summary.json") if has_epoch(path))
    if not runs:
        raise UserError(f"no run in {folder} has finished an epoch")
    rows = [row_of(run) for run in runs]
    write_csv(folder / "population.csv", rows, list(rows[0]))
    plot(runs, rows[0]["device"], folder / "population.csv")
    print((folder / "population.csv").read_text())


if __name__ == "__main__":
    run_script(main, "population.py")
