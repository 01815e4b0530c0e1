"""Shared by the benchmarks: flags, timing in turn, rows as CSV and JSON, one plot."""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from experiment.config import PathFlag, read_config
from experiment.device import Clock, device_name
from experiment.files import ROOT as ROOT
from experiment.files import commit, write_csv
from experiment.style import STYLE, Label, label_log_axis, save, write_labels

Work = Callable[[], Any]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Flags of the benchmarks that run in one process."""

    threads: int | None = None
    """CPU threads (None: one per core)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to measure."""


@dataclass(frozen=True, kw_only=True)
class Flags(DeviceFlags):
    """Flags of those whose results are rows."""

    csv: PathFlag = None
    """File for the rows; a plot is written beside it."""
    json: PathFlag = None
    """File for the rows as a JSON list."""


def in_turn(
    work: Mapping[Hashable, Work], device: torch.device, rounds: int, turn: float
) -> dict[Hashable, list[float]]:
    """Return the mean seconds of a call in each of `rounds` turns, after two calls to warm up.

    A turn repeats a call for about `turn` seconds. Turns alternate, so a disturbance of the machine
    slows all of them down.
    """

    def seconds_of(call: Work, times: int) -> float:
        clock = Clock(device)
        clock.start()
        for _ in range(times):
            call()
        clock.stop()
        return clock.seconds / times

    times = {}
    for name, call in work.items():
        seconds_of(call, 2)
        times[name] = max(1, round(turn / seconds_of(call, 1)))
    seconds: dict[Hashable, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            seconds[name].append(seconds_of(call, times[name]))
    return seconds


def provenance(device: torch.device) -> Row:
    """Return the device, the version of torch and the commit."""
    return {"device": device_name(device), "torch": torch.__version__, "commit": commit()}


def provenance_of(run: Path) -> Row:
    """Return what a training run's config.json says of the same."""
    config = read_config(run)
    torch_version = config["versions"]["torch"]
    return {"device": config["device"], "torch": torch_version, "commit": config["commit"]}


def show(row: Row, first: bool) -> None:
    """Print a row as a line of a table, under a header before the first."""
    if first:
        print("  ".join(row))
    print("  ".join(str(value).rjust(len(name)) for name, value in row.items()), flush=True)


def write_rows(
    rows: Sequence[Row],
    csv_path: Path | None,
    json_path: Path | None,
    plot: Callable[[Sequence[Row], Path], None],
) -> None:
    """Write the rows as CSV, with a plot beside it, and as a JSON list."""
    for path in filter(None, (csv_path, json_path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if json_path:
        json_path.write_text(json.dumps(list(rows), indent=2) + "\n")
    if csv_path:
        write_csv(csv_path, rows, list(rows[0]))
        plot(rows, csv_path)
        print(f"{csv_path}, plot beside it")


class Series(NamedTuple):
    """Points of a plot; `notes` are written beside them, `error` is half the length of a bar."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "o-"
    colour: str | None = None
    error: Sequence[float] | None = None
    notes: Sequence[str] = ()


class Panel(NamedTuple):
    """Axes of a plot, x logarithmic; `names` are written at y = 0, 1, 2, ... from the top."""

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series]
    names: Sequence[str] = ()


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write the panels, three in a line, as PNG and SVG under the name of `path`."""
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(lines, columns, layout="constrained", squeeze=False)
        figure.set_size_inches(4 + 5 * columns, 1 + 4 * lines)
        for axes, panel in zip(grid.flat, panels, strict=False):
            draw_panel(axes, panel)
        figure.suptitle(title, fontsize=13)
        both = [axes.get_legend_handles_labels() for axes in figure.axes]
        entries = {label: handle for pair in both for handle, label in zip(*pair, strict=True)}
        if entries:
            figure.legend(
                entries.values(), entries, loc="outside lower center", ncols=3, fontsize=10
            )
        for axes, panel in zip(grid.flat, panels, strict=False):
            labels = [
                Label(*note, s.colour or "black")
                for s in panel.series
                for note in (zip(s.notes, s.x, s.y, strict=True) if s.notes else ())
            ]
            write_labels(figure, axes, labels, fontsize=10)
        save(figure, path.parent, path.stem)


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw everything in the frame but the notes."""
    for s in panel.series:
        look = {"color": s.colour, "label": s.label, "capsize": 3, "ms": 7}
        axes.errorbar(s.x, s.y, s.error, fmt=s.style, **look)
    axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    if panel.names:
        axes.set_yticks(range(len(panel.names)), panel.names)
        axes.set_ylim(len(panel.names) - 0.3, -0.7)
        axes.margins(x=0.35)  # room for the notes
    label_log_axis(axes)
