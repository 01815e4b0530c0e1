"""Any signal, any component: the rows, table and figure that ./run_experiments.sh --all adds.

Networks that backprop has no gradient for, and scores that are no loss, each by every method that
can be asked. Everything lies in the folder any-signal of the experiment's own, so that its summary
stays what it is.

python -m lab.any_signal results/latest                      the table and the figure again
python -m lab.any_signal publish results/latest DESTINATION  copies what is worth committing
"""

import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lab.cli import run_script
from lab.errors import UserError
from lab.report import COMMITTED, mean_and_deviation, read_summary
from lab.runlog import SUMMARY_KEYS, write_csv, write_text

FOLDER = "any-signal"


@dataclass(frozen=True)
class Row:
    """One bar of the comparison: what is varied, and how it is trained.

    panel  the part of the figure: "activation", "fitness" or "members"
    base   one of the methods of lab.experiments
    flags  on top of that method's; an option with a value is one word, with =
    """

    panel: str
    label: str
    base: str
    flags: tuple[str, ...]

    def folder(self, experiment: Path, seed: int) -> Path:
        return experiment / FOLDER / self.panel / self.label / self.base / f"seed{seed}"

    def flags_for(self, quick: bool) -> list[str]:
        """The row's flags; how much is trained is left to --quick where it is typed."""
        sizes = ("--epochs=", "--population=")
        return [flag for flag in self.flags if not (quick and flag.startswith(sizes))]


def rows() -> list[Row]:
    """Every row, in the order of the table."""
    found = []
    for name in ("gelu", "relu", "int8-round", "argmax-k", "step", "sign"):
        for base in ("backprop", "eggroll-per-example"):
            found.append(Row("activation", name, base, (f"--activation={name}", *EPOCHS)))
    for base in ("backprop", "eggroll-per-example"):
        found.append(Row("activation", "binary weights", base, ("--binary-weights", *EPOCHS)))
    for label, fitness in FITNESSES.items():
        own = (f"--fitness={fitness}",)
        if label == "cross-entropy":
            found.append(Row("fitness", label, "backprop", EPOCHS))
            found.append(Row("fitness", label, "eggroll-per-example", EPOCHS))
        elif label in BY_EXAMPLE:
            found.append(Row("fitness", label, "eggroll-per-example", (*own, *HITS, *EPOCHS)))
        found.append(Row("fitness", label, "eggroll", (*own, *ONE_SCORE)))
    for label in ("low-rank", "full-rank"):
        flags = (f"--perturbation={label}", "--population=128", "--lr=0.01", "--epochs=1")
        found.append(Row("members", label, "eggroll", flags))
    return found


EPOCHS = ("--epochs=2",)
FITNESSES = {
    "cross-entropy": "cross-entropy",
    "accuracy": "accuracy",
    "costly confusion": "examples/costly_confusion.py:minus_cost",
    "macro-F1": "examples/macro_f1.py:macro_f1",
    "external program": "examples/external_program.py:verdict",
}
BY_EXAMPLE = ("accuracy", "costly confusion")
# Scores that are counts: members must change an answer before they are told apart, and from a head
# of zeros every class is answered at the start: one that no member answers is never credited
HITS = ("--init=zero-head", "--noise=gaussian", "--sigma=0.02", "--optimizer=adam", "--lr=0.001")
ONE_SCORE = ("--population=256", "--sigma=0.05", "--lr=0.01", "--epochs=1")


def write_report(experiment: Path) -> tuple[str, list[Path]]:
    """summary.csv, summary.md and the figure of all finished rows: the table, what was written.

    Raises UserError where none is finished.
    """
    from lab.any_signal_figure import draw

    found = [record for row in rows() for record in finished(row, experiment)]
    if not found:
        raise UserError(f"no finished run in {experiment / FOLDER} (./run_experiments.sh --all)")
    folder = experiment / FOLDER
    write_csv(folder / "summary.csv", found, ("panel", "label", *SUMMARY_KEYS))
    table = markdown_table(found)
    write_text(folder / "summary.md", f"# Any signal, any component\n\n{table}")
    return table, [folder / "summary.csv", folder / "summary.md", *draw(found, folder)]


def finished(row: Row, experiment: Path) -> list[dict[str, Any]]:
    """Summaries of the row's seeds, with the row's panel and label."""
    paths = sorted(row.folder(experiment, 0).parent.glob("seed*/summary.json"))
    summaries = [read_summary(path.parent) for path in paths]
    place = {"panel": row.panel, "label": row.label}
    return [place | summary for summary in summaries if summary["status"] == "finished"]


def markdown_table(found: Sequence[dict[str, Any]]) -> str:
    """One line for each panel, label and method: mean and deviation over the seeds."""
    lines = [
        "| what | with | method | population | epochs | seeds | test accuracy | training time |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for (panel, label, method), group in grouped(found).items():
        first, accuracy = group[0], mean_and_deviation([s["test_accuracy"] for s in group])
        seconds = statistics.median(s["train_seconds"] for s in group)
        cells = (panel, label, method, f"{first['population']:,}" if first["population"] else "")
        cells += (str(first["epochs"]), str(len(group)), accuracy, f"{seconds:,.1f} s")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def grouped(found: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """The summaries of each panel, label and method."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for summary in found:
        key = (summary["panel"], summary["label"], summary["method"])
        groups.setdefault(key, []).append(summary)
    return groups


def publish(experiment: Path, destination: Path) -> None:
    """Copy the rows' records (no checkpoints, no weights) and their report."""
    _, paths = write_report(experiment)
    for row in rows():
        for run in row.folder(experiment, 0).parent.glob("seed*"):
            paths += [run / name for name in COMMITTED if (run / name).exists()]
    for path in paths:
        target = destination / path.relative_to(experiment)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def main(args: Sequence[str]) -> None:
    match list(args):
        case ["publish", source, destination]:
            publish(Path(source), Path(destination))
        case [folder]:
            table, paths = write_report(Path(folder))
            print(table)
            print("\n".join(map(str, paths)))
        case _:
            raise UserError("type: python -m lab.any_signal FOLDER | publish FROM TO")


if __name__ == "__main__":
    run_script(partial(main, sys.argv[1:]), "lab.any_signal", errors=())
