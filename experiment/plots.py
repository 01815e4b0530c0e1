"""Plots of an experiment: seeds as bands, accuracy in the range where methods differ."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiment.any_signal import any_signal_figure
from experiment.style import (
    STYLE,
    Label,
    accuracy_range,
    colour,
    label_log_axis,
    line_format,
    plain_number,
    save,
    write_labels,
)

ACCURACY_BY = {  # file name: column of metrics.csv, label, logarithmic axis
    "epoch": ("epoch", "epoch", False),
    "seconds": ("train_seconds", "seconds of training (log scale)", True),
    "forward_passes": (
        "forward_passes_per_image",
        "forward passes per image, all members counted (log scale)",
        True,
    ),
}
COSTS = (  # column of summary.csv, label, number beside a bar
    ("train_seconds", "seconds of training", "{:,.1f} s"),
    ("peak_memory_mb", "peak memory (MB)", "{:,.0f} MB"),
)

Summaries = Sequence[Mapping[str, Any]]
Line = tuple[np.ndarray, np.ndarray]  # x (rows,), y (seeds, rows)
Curves = Mapping[str, Sequence[Sequence[Mapping[str, float | None]]]]  # row: metrics of each seed


def draw_all(curves: Curves, summaries: Summaries, folder: Path) -> list[Path]:
    """Draw every plot of one experiment; returns the files."""
    where = " + ".join(sorted({s["dataset"] for s in summaries}))
    device = " + ".join(sorted({s["device"] for s in summaries}))
    curves = {row: seeds for row, seeds in curves.items() if "+" not in row}
    methods = [s for s in summaries if "+" not in s["row"]]
    paths = []
    with plt.rc_context(STYLE):
        if methods:
            for name, (column, label, log) in ACCURACY_BY.items():
                title = f"Test accuracy on {where}" + (f"\n{device}" if name == "seconds" else "")
                figure = accuracy_figure(curves, column, label, log, title)
                paths += save(figure, folder, f"accuracy_by_{name}")
            figure = fitness_figure(curves, f"Training cross-entropy on {where}")
            paths += save(figure, folder, "fitness")
            figure = cost_figure(methods, f"Time and memory on {where}\n{device}")
            paths += save(figure, folder, "time_and_memory")
        if len(methods) < len(summaries):
            paths += save(any_signal_figure(summaries, where), folder, "any_signal")
    return paths


def accuracy_figure(curves: Curves, column: str, label: str, log: bool, title: str) -> Figure:
    """Plot test accuracy against one column of metrics.csv.

    Methods that end below the range of the others are drawn in a lower strip.
    """
    lines = {m: _stack(seeds, column, "test_accuracy", 100) for m, seeds in curves.items()}
    ends = {method: float(y[:, -1].mean()) for method, (_, y) in lines.items()}
    low, high = accuracy_range(list(ends.values()))
    below = {method: y for method, (_, y) in lines.items() if ends[method] < low}
    parts = [(low, high, [method for method in lines if method not in below])]
    if below:
        parts.append((math.floor(min(y.min() for y in below.values())), low, list(below)))
    figure, grid = plt.subplots(
        len(parts), figsize=(8, 5), layout="constrained", sharex=True, squeeze=False,
        height_ratios=(4, 1.2)[: len(parts)],
    )  # fmt: skip
    for axes, (bottom, top, _) in zip(grid[:, 0], parts, strict=True):
        for method, points in lines.items():
            _band(axes, method, *points)
        room = 0.06 * (top - bottom) if top == high else 0  # for labels above the best curve
        axes.set_ylim(bottom, top + room)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
    grid[0, 0].set(ylabel="test accuracy", title=title)
    if below:
        _break(*grid[:, 0])
    _finish(figure, grid[-1, 0], label, log)
    for axes, (_, _, methods) in zip(grid[:, 0], parts, strict=True):
        _label_ends(figure, axes, {method: lines[method] for method in methods}, "{:.1f} %")
    return figure


def fitness_figure(curves: Curves, title: str) -> Figure:
    """Plot the cross-entropy of the training images, one measure for all methods."""
    lines = {m: _stack(seeds, "epoch", "train_cross_entropy") for m, seeds in curves.items()}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for method, points in lines.items():
        _band(axes, method, *points)
    axes.set(yscale="log", ylabel="nats per image (log scale)", title=title)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _finish(figure, axes, "epoch", log=False)
    _label_ends(figure, axes, lines, "{:.3f}")
    return figure


def cost_figure(summaries: Summaries, title: str) -> Figure:
    """Plot seconds of training and peak memory as bars."""
    methods = list(dict.fromkeys(s["row"] for s in summaries))
    size = (9, 0.5 * len(methods) + 1.7)
    figure, both = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    for axes, (column, label, text) in zip(both, COSTS, strict=True):
        values = [[float(s[column]) for s in summaries if s["row"] == m] for m in methods]
        axes.barh(methods, list(map(np.median, values)), color=list(map(colour, methods)))
        ends = list(map(min, values)), list(map(max, values))
        for paint, width in (("white", 4), ("black", 1.5)):  # black alone is lost on dark bars
            axes.hlines(methods, *ends, color=paint, lw=width)
        for place, own in enumerate(values):
            number, end = text.format(np.median(own)), (max(own), place)
            axes.annotate(number, end, (5, 0), textcoords="offset points", va="center")
        axes.set(xlabel=label, xlim=(0, 1.35 * max(map(max, values))))  # room for the numbers
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", visible=False)
    both[0].invert_yaxis()
    figure.suptitle(title, fontsize=13)
    figure.supxlabel("bars: median of the seeds; black lines: their range", fontsize=10)
    return figure


def _stack(seeds: Sequence[Sequence[Mapping[str, Any]]], x: str, y: str, scale: float = 1) -> Line:
    """Return the seeds' median of x, and y times scale, where y was evaluated after training."""
    kept = [[r for r in rows if r[y] is not None and r[x]] for rows in seeds]
    shortest = min(map(len, kept))
    xs, ys = (np.array([[r[c] for r in rows[:shortest]] for rows in kept], float) for c in (x, y))
    return np.median(xs, axis=0), scale * ys


def _band(axes: Axes, method: str, x: np.ndarray, y: np.ndarray) -> None:
    """Draw the seeds' mean as a line and their range as a band."""
    name = method + (f" ({len(y)} seeds)" if len(y) > 1 else "")
    axes.plot(x, y.mean(0), line_format(method), ms=5, color=colour(method), label=name)
    axes.fill_between(x, y.min(0), y.max(0), color=colour(method), alpha=0.2, lw=0)


def _break(upper: Axes, lower: Axes) -> None:
    """Show that the axis is broken between two parts: no line, two slanted marks at each."""
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True, prune="upper"))
    upper.spines.bottom.set_visible(False)
    upper.tick_params(axis="x", bottom=False, which="both")
    slash = {"marker": [(-1, -0.6), (1, 0.6)], "ms": 10, "ls": "", "color": "black", "mew": 1}
    upper.plot([0], [0], transform=upper.transAxes, clip_on=False, **slash)
    lower.plot([0], [1], transform=lower.transAxes, clip_on=False, **slash)


def _finish(figure: Figure, axes: Axes, label: str, log: bool) -> None:
    """Set the x axis, with room for labels, and the legend."""
    axes.set_xlabel(label)
    for part in figure.axes:
        part.margins(x=0.15)
    if log:
        label_log_axis(axes)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=10,
        title="lines: mean of the seeds; bands: their range", title_fontsize=10,
    )  # fmt: skip


def _label_ends(figure: Figure, axes: Axes, lines: Mapping[str, Line], text: str) -> None:
    """Write each curve's last value beside its end."""
    ends = {method: (x[-1], y[:, -1].mean()) for method, (x, y) in lines.items()}
    labels = [Label(text.format(y), x, y, colour(method)) for method, (x, y) in ends.items()]
    write_labels(figure, axes, labels, fontweight="bold")
