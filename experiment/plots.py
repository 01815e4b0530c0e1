"""Plots of an experiment as PNG and SVG: one colour per method, seeds as bands."""

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from experiment.files import write_atomically

COLOURS = {
    "backprop": "#2f6db3",
    "eggroll": "#3a9a5b",
    "eggroll-dense": "#8a5fb8",
    "node-perturbation": "#e07b26",
    "node-perturbation-int8": "#b58900",
}

STYLE: Any = {  # matplotlib's own type of the keys is not public
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "font.size": 12,
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "eggroll",  # equal data gives equal files
    "svg.fonttype": "none",
}

ACCURACY_BY = {  # file name: column of metrics.csv, label, logarithmic axis
    "epoch": ("epoch", "epoch", False),
    "seconds": ("train_seconds", "seconds of training (log scale)", True),
    "forward_passes": (
        "forward_passes_per_image",
        "forward passes per image, all members counted (log scale)",
        True,
    ),
}
COSTS = (  # column of summary.csv, label, number on a bar
    ("train_seconds", "seconds of training (log scale)", "{:,.1f} s"),
    ("peak_memory_mb", "peak memory (MB)", "{:,.0f} MB"),
)
ACTIVATIONS = ("int8-round", "argmax-k", "step", "sign")
LABEL_WIDTH, LABEL_HEIGHT = 0.13, 0.05  # of a number at a curve's end, as parts of the axes

Summaries = Sequence[Mapping[str, Any]]
Curves = Mapping[str, Sequence[Sequence[Mapping[str, float | None]]]]  # row: metrics of each seed


def colour(method: str) -> str:
    return COLOURS.get(method, "#6b6b6b")


def draw_all(curves: Curves, summaries: Summaries, folder: Path) -> list[Path]:
    """Draw every plot of one experiment; returns the files."""
    where = " + ".join(sorted({s["dataset"] for s in summaries}))
    curves = {row: seeds for row, seeds in curves.items() if "+" not in row}
    methods = [s for s in summaries if "+" not in s["row"]]
    paths = []
    with plt.rc_context(STYLE):
        if methods:
            for name, (column, label, log) in ACCURACY_BY.items():
                figure = accuracy_figure(curves, column, label, log, f"Test accuracy on {where}")
                paths += save(figure, folder, f"accuracy_by_{name}")
            paths += save(fitness_figure(curves, f"Training fitness on {where}"), folder, "fitness")
            paths += save(cost_figure(methods, where), folder, "time_and_memory")
        if len(methods) < len(summaries):
            paths += save(any_signal_figure(summaries, where), folder, "any_signal")
    return paths


def accuracy_figure(curves: Curves, column: str, label: str, log: bool, title: str) -> Figure:
    """Plot test accuracy against one column of metrics.csv."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    ends = {}
    for method, seeds in curves.items():
        x, y = _stack(seeds, column, "test_accuracy", skip_zero=log)
        _band(axes, method, x, 100 * y)
        ends[method] = (x[-1], 100 * y[:, -1].mean())
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))
    axes.margins(x=0.13)  # room for the numbers at the curves' ends
    lowest = min(value for _, value in ends.values())
    axes.set_ylim(0 if lowest < 60 else 60 if lowest < 88 else 80, 101)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
    _label_ends(axes, ends)
    axes.set(xlabel=label, ylabel="test accuracy", title=title)
    figure.legend(loc="outside lower center", ncols=2, fontsize=10)
    return figure


def fitness_figure(curves: Curves, title: str) -> Figure:
    """Plot the log-likelihood of the training labels, one measure for all methods."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    lowest = 0.0
    for method, seeds in curves.items():
        x, y = _stack(seeds, "epoch", "train_cross_entropy")
        _band(axes, method, x, -y)
        lowest = min(lowest, -y[:, 1:].max(initial=0.0))
    if lowest:
        axes.set_ylim(1.15 * lowest, 0)  # the untrained network would take most of the axis
    axes.set(xlabel="epoch", ylabel="mean log-likelihood of the label (nats)", title=title)
    figure.legend(loc="outside lower center", ncols=2, fontsize=10)
    return figure


def cost_figure(summaries: Summaries, where: str) -> Figure:
    """Plot seconds of training and peak memory as bars."""
    methods = list(dict.fromkeys(s["row"] for s in summaries))
    size = (max(12, 3 * len(methods)), 5)  # names under the bars must not meet
    figure, both = plt.subplots(1, 2, figsize=size, layout="constrained")
    for axes, (column, label, text) in zip(both, COSTS, strict=True):
        for place, method in enumerate(methods):
            values = [float(s[column]) for s in summaries if s["row"] == method]
            middle, top = float(np.median(values)), (place, max(values))
            axes.bar(place, middle, color=colour(method), width=0.6)
            axes.vlines(place, min(values), max(values), color="black", lw=1.5)
            axes.annotate(text.format(middle), top, (0, 5), textcoords="offset points", ha="center")
        names = [textwrap.fill(method, 13) for method in methods]
        axes.set_xticks(range(len(methods)), names)
        axes.set_ylabel(label)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.15)
    both[0].set_yscale("log")
    both[0].yaxis.set_major_formatter(FuncFormatter(_plain_number))
    both[0].yaxis.set_minor_formatter(NullFormatter())
    device = " + ".join(sorted({s["device"] for s in summaries}))
    figure.suptitle(f"Time and memory on {where}\n{device}; median of the seeds", fontsize=13)
    return figure


def any_signal_figure(summaries: Summaries, where: str) -> Figure:
    """Plot test accuracy by activation and by fitness, a mark for each method."""
    panels = {
        "by activation (the last four have a gradient of zero)": _panel(summaries, "gelu", True),
        "by fitness (backprop needs a loss)": _panel(summaries, "cross-entropy", False),
    }
    panels = {title: part for title, part in panels.items() if part}
    heights = [len(part) + 0.5 for part in panels.values()]
    size = (9, 0.42 * sum(heights) + 0.5 * len(panels) + 1.6)
    figure, grid = plt.subplots(
        len(panels), figsize=size, layout="constrained", height_ratios=heights, sharex=True,
        squeeze=False,
    )  # fmt: skip
    for axes, (title, part) in zip(grid[:, 0], panels.items(), strict=True):
        _draw_panel(axes, part)
        axes.set_title(title, loc="left", fontsize=12)
        axes.set(xlim=(-4, 108), xticks=range(0, 101, 20))  # room for numbers beside the marks
    grid[-1, 0].set_xlabel("test accuracy (%)")
    figure.suptitle(f"Any signal, any component: test accuracy on {where}", fontsize=14)
    methods = dict.fromkeys(m for part in panels.values() for seeds in part.values() for m in seeds)
    marks = [Line2D([], [], color=colour(m), marker="o", ms=9, lw=0) for m in methods]
    figure.legend(marks, list(methods), loc="outside lower center", ncols=2)
    return figure


def _panel(summaries: Summaries, usual: str, activations: bool) -> dict[str, dict[str, list]]:
    """Return {label: {method: accuracies in %}} of the rows METHOD+LABEL, METHOD first."""
    rows = [(*s["row"].partition("+")[::2], 100 * s["test_accuracy"]) for s in summaries]
    chosen = [row for row in rows if row[1] and (row[1] in ACTIVATIONS) == activations]
    methods = {method for method, _, _ in chosen}
    plain = [(method, usual, a) for method, label, a in rows if not label and method in methods]
    panel: dict[str, dict[str, list]] = {}
    for method, label, accuracy in plain + chosen:
        panel.setdefault(label, {}).setdefault(method, []).append(accuracy)
    return panel if chosen else {}


def _draw_panel(axes: Axes, panel: Mapping[str, Mapping[str, list]]) -> None:
    """Draw one line per label, from the worst method's mark to the best's."""
    for place, seeds in enumerate(panel.values()):
        ranked = sorted(seeds, key=lambda method: float(np.mean(seeds[method])))
        means = [float(np.mean(seeds[method])) for method in ranked]
        axes.hlines(place, means[0], means[-1], color="#c8c8c8", lw=2, zorder=1)
        for method, mean in zip(ranked, means, strict=True):
            paint = colour(method)
            axes.hlines(place, min(seeds[method]), max(seeds[method]), color=paint, lw=5, alpha=0.4)
            axes.plot(mean, place, "o", ms=9, color=paint)
            # the best's number is on the right, the worst's on the left, others below
            offset, align = (
                ((9, 0), "left") if method == ranked[-1]
                else ((-9, 0), "right") if method == ranked[0]
                else ((0, -14), "center")
            )  # fmt: skip
            axes.annotate(
                f"{mean:.1f}", (mean, place), offset, textcoords="offset points", ha=align,
                va="center", color=paint, fontweight="bold", fontsize=10,
            )  # fmt: skip
    axes.set_yticks(range(len(panel)), list(panel))
    axes.set_ylim(len(panel) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write name.png and name.svg atomically, and return their paths."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        image, kind = io.BytesIO(), path.suffix[1:]
        figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else None)
        write_atomically(path, image.getvalue())
    plt.close(figure)
    return paths


def _plain_number(value: float, _: int) -> str:
    """Return 0.1, 10, 1,000 or 10 million, for the ticks of a logarithmic axis."""
    for size, name in ((1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{value / size:,g}{name}"
    return f"{value:,g}"


def _stack(
    seeds: Sequence[Sequence[Mapping[str, Any]]], x: str, y: str, skip_zero: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return x (rows,), the seeds' median, and y (seeds, rows), of the evaluated rows."""
    kept = [[r for r in rows if r[y] is not None and (r[x] or not skip_zero)] for rows in seeds]
    shortest = min(map(len, kept))
    xs, ys = (np.array([[r[c] for r in rows[:shortest]] for rows in kept], float) for c in (x, y))
    return np.median(xs, axis=0), ys


def _band(axes: Axes, method: str, x: np.ndarray, y: np.ndarray) -> None:
    """Draw the seeds' mean as a line and their range as a band."""
    name = method + (f" ({len(y)} seeds)" if len(y) > 1 else "")
    axes.plot(x, y.mean(0), "o-", ms=4, color=colour(method), label=name)
    axes.fill_between(x, y.min(0), y.max(0), color=colour(method), alpha=0.2, lw=0)


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Write each curve's last value beside its end, clear of better curves and other labels."""
    axes.autoscale_view(scaley=False)
    place = (axes.transData + axes.transAxes.inverted()).transform
    labels: list[tuple[float, float]] = []
    for method, (x, value) in sorted(ends.items(), key=lambda item: -item[1][1]):
        later: Iterable[float] = [final for end, final in ends.values() if end > x]
        shift = -1 if max(later, default=0) >= value else 0.7 if later else 0
        left, height = place((x, value))
        near = [y for other, y in labels if abs(left - other) < LABEL_WIDTH]
        height = min([height + LABEL_HEIGHT * shift, *(y - LABEL_HEIGHT for y in near)])
        labels.append((left, height))
        axes.annotate(
            f"{value:.1f} %", (left, height), (8, 0), xycoords="axes fraction",
            textcoords="offset points", ha="left", va="center", color=colour(method),
            fontweight="bold",
        )  # fmt: skip
