"""Tables and plots of finished runs.

python -m experiment.report results/latest            write tables, plots and report.html
python -m experiment.report publish SOURCE TARGET     copy what is worth committing
python -m experiment.report readme                    rewrite the README's table
"""

import csv
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.config import read_config
from experiment.errors import UserError
from experiment.files import write_atomically, write_csv
from experiment.page import page
from experiment.script import run_script

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "results" / "reference" / "third-edition" / "summary.csv"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
METHODS = (
    "backprop",
    "eggroll",
    "eggroll-dense",
    "node-perturbation",
    "node-perturbation-int8",
)
COLUMNS = (
    "method",
    "signal",
    "members",
    "epochs",
    "test accuracy",
    "seconds",
    "over backprop's",
    "memory",
)

Summary = Mapping[str, Any]


def finished_runs(folder: Path) -> dict[Path, Summary]:
    """Return the finished runs <row>/seed<k> by folder, in the order of the table.

    A row is a method or METHOD+VARIANT.
    """
    runs = {path.parent: read_summary(path.parent) for path in folder.glob("*/seed*/summary.json")}
    finished = [(run, summary) for run, summary in runs.items() if summary["status"] == "finished"]
    return dict(sorted(finished, key=lambda item: _order(item[1])))


def _order(summary: Summary) -> tuple:
    method, _, variant = summary["row"].partition("+")
    place = METHODS.index(method) if method in METHODS else len(METHODS)
    return bool(variant), place, summary["row"], summary["seed"]


def read_summary(run: Path) -> Summary:
    """Return summary.json with the row of the table and the fitness."""
    flags = read_config(run)["flags"]
    row = {"row": run.parent.name, "fitness": flags.get("fitness", "cross-entropy")}
    return row | json.loads((run / "summary.json").read_text())


def read_metrics(run: Path) -> list[dict[str, float | None]]:
    """Return the rows of metrics.csv as numbers, None where a cell is empty."""
    with (run / "metrics.csv").open() as file:
        return [
            {k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)
        ]


def read_curves(folder: Path, summaries: Sequence[Summary]) -> dict[str, list]:
    """Return the metrics of every run, by row."""
    curves: dict[str, list] = {}
    for summary in summaries:
        run = folder / summary["row"] / f"seed{summary['seed']}"
        curves.setdefault(summary["row"], []).append(read_metrics(run))
    return curves


def write_report(folder: Path) -> list[Path]:
    """Write and return summary.csv, summary.md, the plots and report.html of one experiment."""
    from experiment import plots

    runs = finished_runs(folder)
    if not runs:
        raise UserError(f"{folder} holds no finished run (type ./run_experiments.sh to make some)")
    summaries = list(runs.values())
    write_csv(folder / "summary.csv", summaries, list(summaries[0]))
    write_atomically(folder / "summary.md", f"# Results\n\n{markdown_tables(summaries)}")
    drawn = plots.draw_all(read_curves(folder, summaries), summaries, folder)
    pictures = [path for path in drawn if path.suffix == ".png"]
    configs = [read_config(run) for run in runs]
    html = page(COLUMNS, make_tables(summaries), pictures, configs, folder)
    write_atomically(folder / "report.html", html)
    names = ("summary.csv", "summary.md", "report.html")
    return [*(folder / name for name in names), *drawn]


def markdown_tables(summaries: Sequence[Summary]) -> str:
    """Return a table for each dataset and device, with a caption."""
    header = f"| {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * len(COLUMNS[2:])}\n"
    tables = []
    for rows, caption in make_tables(summaries):
        lines = [f"| {' | '.join(cells)} |\n" for cells in rows]
        tables.append(f"{header}{''.join(lines)}\n{caption}\n")
    return "\n".join(tables)


def make_tables(summaries: Sequence[Summary]) -> list[tuple[list[Sequence[str]], str]]:
    """Return rows and a caption for each dataset and device."""
    tables = []
    for dataset, device in dict.fromkeys((s["dataset"], s["device"]) for s in summaries):
        same = [s for s in summaries if (s["dataset"], s["device"]) == (dataset, device)]
        caption = (
            f"{dataset}, {device}. Test accuracy: mean ± standard deviation (number of seeds); "
            "seconds of training and peak memory: medians."
        )
        tables.append((_table_rows(same), caption))
    return tables


def _table_rows(summaries: Sequence[Summary]) -> list[Sequence[str]]:
    groups: dict[tuple, list[Summary]] = {}
    for summary in summaries:
        key = (summary["row"], summary["population"], summary["epochs"])
        groups.setdefault(key, []).append(summary)
    backprop = [s for s in summaries if s["row"] == "backprop"]
    rows: list[Sequence[str]] = []
    for group in groups.values():
        first, seconds = group[0], _median(group, "train_seconds")
        row = (
            first["row"],
            Path(first["fitness"]).name,
            f"{int(first['population']):,}" if first["population"] else "",
            str(first["epochs"]),
            _mean_and_deviation([float(s["test_accuracy"]) for s in group]),
            f"{seconds:,.1f}",
            f"{seconds / _median(backprop, 'train_seconds'):,.1f}x" if backprop else "",
            f"{_median(group, 'peak_memory_mb'):,.0f} MB",
        )
        rows.append(row)
    return rows


def _median(summaries: Sequence[Summary], column: str) -> float:
    return statistics.median(float(s[column]) for s in summaries)


def _mean_and_deviation(accuracies: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(accuracies):.2f}"
    if len(accuracies) > 1:
        mean += f" ± {100 * statistics.stdev(accuracies):.2f}"
    return f"{mean} % ({len(accuracies)})"


def publish(source: Path, target: Path) -> None:
    """Copy tables and plots, each seed's metrics.csv, and config.json and weights of the first."""
    reports = [path for path in write_report(source) if path.suffix != ".html"]
    target.mkdir(parents=True, exist_ok=True)
    for path in reports:
        shutil.copy(path, target / path.name)
    for run in reversed(finished_runs(source)):  # the first seed's config.json stays
        copy = target / run.relative_to(source)
        copy.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / "metrics.csv", copy / "metrics.csv")
        shutil.copy(run / "config.json", copy.parent / "config.json")
        if "+" not in copy.parent.name:  # a method itself: for evaluate.py
            shutil.copy(run / "model.safetensors", copy.parent / "model.safetensors")


def readme_with_table(readme: str) -> str:
    """Return the README with its table remade from the committed summary.csv."""
    with REFERENCE.open() as file:
        summaries = list(csv.DictReader(file))
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{markdown_tables(summaries)}{END}{after}"


def main() -> None:
    match sys.argv[1:]:
        case ["readme"]:
            path = ROOT / "README.md"
            write_atomically(path, readme_with_table(path.read_text()))
        case ["publish", source, target]:
            publish(Path(source), Path(target))
        case [folder] if folder != "publish" and not folder.startswith("-"):
            paths = write_report(Path(folder))
            print((Path(folder) / "summary.md").read_text())
            print("\n".join(map(str, paths)))
        case _:
            raise UserError(
                "expected FOLDER, publish SOURCE TARGET or readme, got "
                + (" ".join(sys.argv[1:]) or "nothing")
            )


if __name__ == "__main__":
    run_script(main, "experiment.report")
