"""Tables and plots from finished runs, and the README's table from the committed ones.

python -m lab.report results/latest                      summary.csv, summary.md, plots
python -m lab.report publish results/latest DESTINATION  copies what is worth committing
python -m lab.report readme                              the README's table
"""

import csv
import json
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lab.cli import run_script
from lab.errors import UserError
from lab.runlog import SUMMARY_KEYS, write_csv, write_text

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
REFERENCE = ROOT / "results" / "reference"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
METHOD_ORDER = ("backprop", "eggroll", "eggroll-int8", "eggroll-batch", "eggroll-batch-one-layer")
COLUMNS = ("row", "fitness", *SUMMARY_KEYS)
COMMITTED = ("config.json", "metrics.csv", "summary.json", "train.log")


def finished_runs(folder: Path) -> list[Path]:
    """Folders <row>/seed<k> that hold a finished run, by row and seed. A row is a method, or
    method+variant."""
    runs = [path.parent for path in folder.glob("*/seed*/summary.json")]
    finished = [run for run in runs if read_summary(run)["status"] == "finished"]
    return sorted(finished, key=lambda run: _order(read_summary(run)))


def _order(summary: Mapping[str, Any]) -> tuple:
    row = summary["row"]
    known = METHOD_ORDER.index(row) if row in METHOD_ORDER else len(METHOD_ORDER)
    return known, row, int(summary["seed"])


def read_summary(run: Path) -> dict[str, Any]:
    """summary.json with two columns before it: the row of the table, and the fitness."""
    summary = json.loads((run / "summary.json").read_text())
    flags = json.loads((run / "config.json").read_text())["flags"]
    own = {"row": run.parent.name, "fitness": flags.get("fitness", "cross-entropy")}
    return own | summary


def read_metrics(run: Path) -> list[dict[str, float | None]]:
    """Rows of metrics.csv as numbers, None where a cell is empty."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) if v else None for k, v in row.items()} for row in rows]


def write_report(folder: Path) -> tuple[str, list[Path]]:
    """summary.csv, summary.md and the plots of one experiment: the table, and what was written."""
    from lab import any_signal, plots

    runs = finished_runs(folder)
    if not runs:
        raise UserError(f"no finished run in {folder} (type ./run_experiments.sh to make some)")
    summaries = [read_summary(run) for run in runs]
    write_csv(folder / "summary.csv", summaries, COLUMNS)
    table = markdown_table(summaries)
    dataset = " + ".join(sorted({s["dataset"] for s in summaries}))
    write_text(folder / "summary.md", f"# Results on {dataset}\n\n{table}")
    curves: dict[str, list] = {}
    for run, summary in zip(runs, summaries, strict=True):
        curves.setdefault(summary["row"], []).append(read_metrics(run))
    methods = [s for s in summaries if "+" not in s["row"]]
    drawn = []
    if methods:
        curves = {row: seeds for row, seeds in curves.items() if "+" not in row}
        drawn += plots.draw_all(curves, methods, folder)
    if len(methods) < len(summaries):
        drawn += any_signal.draw(summaries, folder)
    return table, [folder / "summary.csv", folder / "summary.md", *drawn]


def markdown_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """One line per row and device: mean and standard deviation over all seeds, medians of times.

    Seconds to 97.5 % are training seconds at the first evaluation there; empty where a seed never
    reaches it.
    """
    header = (
        "| method | dataset | fitness | population | epochs | forward passes per image | seeds | "
        "test accuracy | training time | over backprop's | to 97.5 % | peak memory | device |"
    )
    lines = [header, "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|"]
    for group in _groups(summaries):
        first = group[0]
        same = [s for s in summaries if s["row"] == "backprop" and _setting(s) == _setting(first)]
        seconds = _median(group, "train_seconds")
        ratio = f"{seconds / _median(same, 'train_seconds'):,.1f}x" if same else ""
        to_goal = all(s["seconds_to_97_5"] for s in group)
        cells = (
            first["row"],
            first["dataset"],
            Path(first["fitness"]).name,
            f"{int(first['population']):,}" if first["population"] else "",
            str(first["epochs"]),
            f"{float(first['forward_passes_per_image']):,.0f}",
            str(len(group)),
            mean_and_deviation([float(s["test_accuracy"]) for s in group]),
            f"{seconds:,.1f} s",
            ratio,
            f"{_median(group, 'seconds_to_97_5'):,.1f} s" if to_goal else "",
            f"{_median(group, 'peak_memory_mb'):,.0f} MB",
            first["device"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _setting(summary: Mapping[str, Any]) -> tuple:
    return summary["dataset"], summary["device"]


def _groups(summaries: Iterable[Mapping[str, Any]]) -> Iterable[list[Mapping[str, Any]]]:
    groups: dict[tuple, list] = {}
    for summary in summaries:
        key = (summary["row"], *_setting(summary), summary["population"], summary["epochs"])
        groups.setdefault(key, []).append(summary)
    return groups.values()


def _median(summaries: Sequence[Mapping[str, Any]], column: str) -> float:
    return statistics.median(float(s[column]) for s in summaries)


def mean_and_deviation(accuracies: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(accuracies):.2f}"
    if len(accuracies) == 1:
        return f"{mean} %"
    return f"{mean} ± {100 * statistics.stdev(accuracies):.2f} %"


def publish(source: Path, destination: Path) -> None:
    """Copy an experiment's record (no checkpoints, no weights) and its report."""
    write_report(source)
    for run in finished_runs(source):
        target = destination / run.relative_to(source)
        target.mkdir(parents=True, exist_ok=True)
        for name in COMMITTED:
            shutil.copy(run / name, target / name)
    for path in source.iterdir():
        if path.suffix in (".csv", ".md", ".png", ".svg"):
            shutil.copy(path, destination / path.name)


def readme_with_table(readme: str) -> str:
    """The README's text with its table made anew from all results/reference/*/summary.csv."""
    summaries = []
    for path in sorted(REFERENCE.glob("*/summary.csv")):
        with path.open() as file:
            summaries += csv.DictReader(file)
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{markdown_table(summaries)}{END}{after}"


def main(args: Sequence[str]) -> None:
    match list(args):
        case ["readme"]:
            write_text(README, readme_with_table(README.read_text()))
        case ["publish", source, destination]:
            publish(Path(source), Path(destination))
        case [folder]:
            table, paths = write_report(Path(folder))
            print(table)
            print("\n".join(map(str, paths)))
        case _:
            raise UserError("type: python -m lab.report FOLDER | publish FROM TO | readme")


if __name__ == "__main__":
    run_script(partial(main, sys.argv[1:]), "lab.report", errors=())
