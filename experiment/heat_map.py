"""Heat map of a search: validation accuracy by the first two settings of its grid."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiment.style import STYLE, accuracy_range, plain_number, save

Cells = Mapping[tuple[float, float], float]


def draw(rows: Sequence[Mapping[str, Any]], grid: Any, title: str, path: Path) -> list[Path]:
    """Write path.png and path.svg; returns their paths, [] where it has fewer than two scales.

    rows  as in trials.csv
    grid  has flags, settings and preset
    """
    names = [name for name, values in grid.settings.items() if _is_scale(values)][:2]
    cells = best_cells(rows, *names) if len(names) == 2 else {}
    if not cells:
        return []
    title += f" {grid.flags}\nmean validation accuracy of {len(rows[0]['seeds'].split())} seeds (%)"
    others = [name for name in grid.settings if name not in names]
    if others:
        title += f"\nbest over {', '.join(others)}"
    preset = tuple(grid.preset[name] for name in names if name in grid.preset)
    with plt.rc_context(STYLE):
        axes = [sorted(map(float, grid.settings[name])) for name in names]
        return save(figure(cells, names, axes, title, preset), path.parent, path.name)


def _is_scale(values: Any) -> bool:
    """Return whether a setting is a list of two or more positive numbers: a logarithmic axis."""
    numbers = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
    return numbers and len(values) > 1 and min(values) > 0


def best_cells(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> Cells:
    """Return {(x, y): accuracy in %} of the best complete trial, NaN where all diverged."""
    cells: dict[tuple[float, float], float] = {}
    for row in rows:
        if row["state"] in ("COMPLETE", "PRUNED"):
            place, complete = (float(row[x]), float(row[y])), row["state"] == "COMPLETE"
            values = [float(value) for value in row["values"].split()] if complete else [np.nan]
            cells[place] = float(np.fmax(100 * np.mean(values), cells.get(place, np.nan)))
    return cells


def figure(
    cells: Cells,
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    title: str,
    preset: tuple = (),
) -> Figure:
    """Return the heat map: numbers in cells, blanks where nothing ran, a ring at the preset.

    names, values  of both axes
    """
    xs, ys = map(np.array, values)
    table = np.array([[cells.get((x, y), np.nan) for x in xs] for y in ys])
    drawing, axes = plt.subplots(
        figsize=(1.8 + 0.95 * len(xs), 1.9 + 0.62 * len(ys)), layout="constrained"
    )
    low, high = accuracy_range([value for value in cells.values() if not np.isnan(value)])
    axes.pcolormesh(_edges(xs), _edges(ys), table, cmap="viridis", vmin=low, vmax=high)
    for (x, y), accuracy in cells.items():
        diverged = bool(np.isnan(accuracy))
        ink = "black" if diverged or accuracy > (low + high) / 2 else "white"
        number = "diverged" if diverged else f"{accuracy:.1f}"
        axes.text(x, y, number, ha="center", va="center", color=ink, fontsize=11)
    if len(preset) == 2:
        axes.plot(*preset, "o", ms=34, mfc="none", mec="#e3120b", mew=2.5, clip_on=False)
        title += "\nring: the preset"
    axes.set_title(title, fontsize=12)
    _log_axes(axes, names, xs, ys)
    return drawing


def _log_axes(axes: Axes, names: Sequence[str], xs: np.ndarray, ys: np.ndarray) -> None:
    """Make both axes logarithmic, with a tick at each value."""
    axes.grid(visible=False)
    axes.set(xscale="log", yscale="log", xlabel=names[0], ylabel=names[1])
    for axis, values in ((axes.xaxis, xs), (axes.yaxis, ys)):
        axis.set_major_locator(FixedLocator(values.tolist()))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(plain_number))


def _edges(values: np.ndarray) -> np.ndarray:
    """Return the limits (n + 1,) of cells around values (n,), half way between them in logs."""
    logs = np.log(values)
    steps = np.diff(logs) if len(logs) > 1 else np.array([1.0])
    middles = logs[:-1] + steps[: len(logs) - 1] / 2
    return np.exp(np.concatenate([[logs[0] - steps[0] / 2], middles, [logs[-1] + steps[-1] / 2]]))
