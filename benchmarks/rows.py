"""What the benchmarks share: timing in turn, and rows as a table, a CSV and a JSON list."""

import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lab.clock import device_name, synchronise
from lab.runlog import commit, write_csv, write_text


def in_turn(
    work: Mapping[Hashable, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int,
    at_least: float = 0.0,
    warm_up: bool = True,
) -> dict[Hashable, list[float]]:
    """Seconds of each call, one after the other, `rounds` times and for `at_least` seconds each.

    In turn, so that a neighbour that slows the machine down for a while slows them all.
    """
    seconds: dict[Hashable, list[float]] = {name: [] for name in work}
    for call in work.values() if warm_up else ():
        _timed(call, device)
    while min(map(len, seconds.values())) < rounds or min(map(sum, seconds.values())) < at_least:
        for name, call in work.items():
            # what is quick need not be repeated for as long as what is slow
            if len(seconds[name]) < rounds or sum(seconds[name]) < at_least:
                seconds[name].append(_timed(call, device))
    return seconds


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started


def provenance(device: torch.device) -> dict[str, str]:
    """What made a row: device, version, commit."""
    return {"device": device_name(device), "torch": torch.__version__, "commit": commit()}


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print the last of the rows as a line of a table, under a head before the first."""
    if len(rows) == 1:
        print("  ".join(columns), flush=True)
    cells = (str(rows[-1][column]).rjust(len(column)) for column in columns)
    print("  ".join(cells), flush=True)


def write_rows(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    csv_path: Path | None,
    json_path: Path | None,
) -> None:
    for path in filter(None, (csv_path, json_path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if csv_path:
        write_csv(csv_path, rows, columns)
        print(csv_path)
    if json_path:
        write_text(json_path, json.dumps(list(rows), indent=2) + "\n")
        print(json_path)
