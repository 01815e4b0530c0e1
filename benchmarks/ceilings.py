"""Rates of products and copies that a device reaches, and what a launch costs it.

python benchmarks/ceilings.py --csv ceilings.csv
"""

import statistics
import sys
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a file, from any folder

from benchmarks import bounds
from benchmarks.rows import (
    Flags,
    Panel,
    Row,
    Series,
    Work,
    draw,
    in_turn,
    provenance,
    show,
    write_rows,
)
from eggroll.graphed import capture_cuda_graph
from experiment.config import MARKERS
from experiment.device import choose_device, set_threads
from experiment.script import run_script

LAUNCHES = 1_000


def launches(device: torch.device) -> dict[tuple[str, int], Work]:
    """Return calls that launch small kernels one by one, and as one graph."""
    x = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)

    calls: dict[tuple[str, int], Work] = {("launch", LAUNCHES): launch}
    if device.type == "cuda":
        calls["launch in a graph", LAUNCHES] = capture_cuda_graph(launch, list)
    return calls


def measure(config: Flags, device: torch.device) -> list[Row]:
    """Return a row for each operation: how many of them a second."""
    numbers = torch.zeros(1 << (30 if device.type == "cuda" else 24), dtype=torch.uint8)
    numbers = numbers.to(device)
    target = torch.empty_like(numbers)
    copy = {("byte copied", numbers.numel()): partial(target.copy_, numbers)}
    calls: dict[Hashable, Work] = {**bounds.operations(device), **copy, **launches(device)}
    rows = []
    for (what, number), seconds in in_turn(calls, device, 5, turn=0.1).items():  # type: ignore
        each = statistics.median(seconds) / number
        row = {
            "what": what,
            "in_a_call": number,
            "seconds_of_one": each,
            "a_second": f"{1 / each:.4g}",
        }
        show(row, first=not rows)
        rows.append(row | provenance(device))
    return rows


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the seconds of one operation of each kind."""
    names = [row["what"] for row in rows]
    series = Series("", [row["seconds_of_one"] for row in rows], range(len(rows)), "o")
    panel = Panel("", "seconds of one operation (log scale)", "", [series], names)
    draw(path, rows[0]["device"], [panel])


def main() -> None:
    config = tyro.cli(Flags, config=MARKERS)
    set_threads(config.threads)
    write_rows(measure(config, choose_device(config.device)), config.csv, config.json, plot)


if __name__ == "__main__":
    run_script(main, "ceilings.py")
