"""Markdown tables: of finished runs, and of the committed CSV files that a page's markers name:

<!-- table: results/reference/NAME/FILE.csv [column, column] -->
<!-- end -->
"""

import csv
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.files import ROOT

BLOCK = re.compile(r"(<!-- table: (\S+) (?:\[(.+)\] )?-->\n).*?(<!-- end -->)", re.DOTALL)
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

PROVENANCE = ("device", "torch", "commit")


Summary = Mapping[str, Any]


def with_tables(page: str) -> str:
    """Return a page with each of its tables remade.

    Raises UserError for a file or a column that does not exist.
    """

    def remade(found: re.Match) -> str:
        begin, name, columns, end = found.groups()
        rows = read_rows(ROOT / name)
        if name.endswith("/summary.csv"):
            return begin + markdown_tables(rows) + end
        return begin + markdown(rows, columns.split(", ") if columns else None) + end

    return BLOCK.sub(remade, page)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file. Raises UserError where there are none."""
    try:
        with path.open() as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def markdown(rows: Sequence[Mapping[str, str]], columns: Sequence[str] | None = None) -> str:
    """Return a table of the columns, of all by default, and a line on where it was measured."""
    shown = columns or [name for name in rows[0] if name not in PROVENANCE]
    if unknown := [name for name in shown if name not in rows[0]]:
        raise UserError(f"expected columns of {', '.join(rows[0])}, got {', '.join(unknown)}")
    lines = [[name.replace("_", " ") for name in shown], ["---"] + ["---:"] * len(shown[1:])]
    lines += [[row[name] for name in shown] for row in rows]
    where: dict[str, dict[str, None]] = {}  # commits of each device, in their order
    for row in rows:
        where.setdefault(row["device"], {})[row["commit"][:7]] = None
    places = [f"{device}, commit {', '.join(commits)}" for device, commits in where.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + f"\n{'; '.join(places)}\n"


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
