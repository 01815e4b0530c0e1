"""Tables and plots of finished runs.

python -m experiment.report results/latest            write tables, plots and report.html
python -m experiment.report publish SOURCE TARGET     copy what is worth committing
python -m experiment.report pages                     remake the tables of the README and docs
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.commands import COMMANDS
from experiment.config import read_config
from experiment.errors import UserError
from experiment.files import ROOT, write_atomically, write_csv
from experiment.page import page
from experiment.script import run_script
from experiment.tables import COLUMNS, make_tables, markdown_tables, read_rows, with_tables

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
METHODS = tuple(COMMANDS)
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
    rows = read_rows(run / "metrics.csv")
    return [{k: float(v) if v else None for k, v in row.items()} for row in rows]


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


def main() -> None:
    match sys.argv[1:]:
        case ["pages"]:
            for path in PAGES:
                write_atomically(path, with_tables(path.read_text()))
        case ["publish", source, target]:
            publish(Path(source), Path(target))
        case [folder] if folder != "publish" and not folder.startswith("-"):
            paths = write_report(Path(folder))
            print((Path(folder) / "summary.md").read_text())
            print("\n".join(map(str, paths)))
        case _:
            raise UserError(
                "expected FOLDER, publish SOURCE TARGET or pages, got "
                + (" ".join(sys.argv[1:]) or "nothing")
            )


if __name__ == "__main__":
    run_script(main, "experiment.report")
