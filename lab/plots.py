"""The experiment's plots: the same colours everywhere, seeds as bands, PNG and SVG."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lab.runlog import write_atomically

NAMES = {
    "backprop": "backprop",
    "eggroll": "EGGROLL, example members",
    "eggroll-int8": "EGGROLL, example members, int8",
    "eggroll-batch": "EGGROLL, batch members",
    "eggroll-batch-one-layer": "EGGROLL, batch members of one layer",
}
COLOURS = {
    "backprop": "#2f6db3",
    "eggroll": "#e07b26",
    "eggroll-int8": "#b58900",
    "eggroll-batch": "#3a9a5b",
    "eggroll-batch-one-layer": "#8a5fb8",
}
OTHERS = ("#b0413e", "#6b6b6b")  # for methods that are added

STYLE = {
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
    "svg.hashsalt": "eggroll",  # the same data gives the same file
    "svg.fonttype": "none",
}

PASSES = "forward passes per image, all members counted (log scale)"
ACCURACY_BY = {  # column of metrics.csv, label, whether its axis is logarithmic
    "epoch": ("epoch", "epoch", False),
    "seconds": ("train_seconds", "seconds of training (log scale)", True),
    "forward_passes": ("forward_passes_per_image", PASSES, True),
}

LABEL_WIDTH, LABEL_HEIGHT = 0.13, 0.05  # of a label at a curve's end, in parts of the axes

Rows = Sequence[Mapping[str, float]]
Curves = Mapping[str, Sequence[Rows]]  # method -> one list of metrics.csv rows per seed


def colour(method: str) -> str:
    return COLOURS.get(method) or OTHERS[sum(map(ord, method)) % len(OTHERS)]


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write name.png and name.svg, atomically."""
    paths = []
    for kind in ("png", "svg"):
        path = folder / f"{name}.{kind}"
        metadata = {"Date": None} if kind == "svg" else None
        image = io.BytesIO()
        figure.savefig(image, format=kind, metadata=metadata)
        write_atomically(path, image.getvalue())
        paths.append(path)
    plt.close(figure)
    return paths


def draw_all(curves: Curves, summaries: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Every plot of one experiment; returns the files."""
    where = " + ".join(sorted({s["dataset"] for s in summaries}))
    with plt.rc_context(STYLE):
        paths = []
        for name, (column, label, log) in ACCURACY_BY.items():
            figure = accuracy_figure(curves, column, label, log, f"Test accuracy on {where}")
            paths += save(figure, folder, f"accuracy_by_{name}")
        paths += save(fitness_figure(curves, f"Training fitness on {where}"), folder, "fitness")
        paths += save(cost_figure(summaries, where), folder, "time_and_memory")
    return paths


def accuracy_figure(curves: Curves, column: str, label: str, log: bool, title: str) -> Figure:
    """Test accuracy of every method against one column of metrics.csv."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    finals = {}
    for method, seeds in curves.items():
        x, y = _stack(seeds, column, "test_accuracy", skip_zero=log)
        _band(axes, method, x, 100 * y, len(seeds))
        finals[method] = (x[-1], 100 * y[:, -1].mean())
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.margins(x=0.13)  # room for the labels at the curves' ends
    lowest = min(value for _, value in finals.values())
    axes.set_ylim(0 if lowest < 60 else 60 if lowest < 88 else 80, 101)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
    _label_ends(axes, finals)
    axes.set(xlabel=label, ylabel="test accuracy", title=title)
    _legend_below(figure)
    return figure


def fitness_figure(curves: Curves, title: str) -> Figure:
    """Log-likelihood of the training labels, the same measure for every method."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    lowest = 0.0
    for method, seeds in curves.items():
        x, y = _stack(seeds, "epoch", "train_cross_entropy")
        _band(axes, method, x, -y, len(seeds))
        lowest = min(lowest, -y[:, 1:].max(initial=0.0))
    if lowest:
        axes.set_ylim(1.15 * lowest, 0)  # the untrained network would take most of the axis
    axes.set(
        xlabel="epoch",
        ylabel="mean log-likelihood of the label (nats)",
        title=title,
    )
    _legend_below(figure)
    return figure


def cost_figure(summaries: Sequence[Mapping[str, Any]], where: str) -> Figure:
    """Seconds of training and peak memory of every method, as bars."""
    methods = list(dict.fromkeys(s["row"] for s in summaries))
    width = max(12, 3 * len(methods))  # names under the bars must not meet
    figure, both = plt.subplots(1, 2, figsize=(width, 5), layout="constrained")
    columns = (
        ("train_seconds", "seconds of training (log scale)", "{:,.1f} s"),
        ("peak_memory_mb", "peak memory (MB)", "{:,.0f} MB"),
    )
    for axes, (column, label, text) in zip(both, columns, strict=True):
        for place, method in enumerate(methods):
            values = [float(s[column]) for s in summaries if s["row"] == method]
            middle = float(np.median(values))
            axes.bar(place, middle, color=colour(method), width=0.6)
            if len(values) > 1:
                axes.vlines(place, min(values), max(values), color="black", lw=1.5)
            axes.annotate(
                text.format(middle), (place, max(values)), (0, 5), textcoords="offset points",
                ha="center",
            )  # fmt: skip
        names = [
            textwrap.fill(NAMES.get(m, m).replace(",", ""), 13, break_on_hyphens=False)
            for m in methods
        ]
        axes.set_xticks(range(len(methods)), names)
        axes.set_ylabel(label)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.15)
    both[0].set_yscale("log")
    both[0].yaxis.set_major_formatter(FuncFormatter(plain_number))
    both[0].yaxis.set_minor_formatter(NullFormatter())
    device = " + ".join(sorted({s["device"] for s in summaries}))
    figure.suptitle(f"Time and memory on {where}\n{device}; median of the seeds", fontsize=13)
    return figure


def plain_number(value: float, _: int) -> str:
    """0.1, 10, 1,000, 10 million: for axes that people read aloud."""
    for size, name in ((1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{value / size:,g}{name}"
    return f"{value:,g}"


def _stack(
    seeds: Sequence[Rows], x: str, y: str, skip_zero: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """x (rows,), the seeds' median, and y (seeds, rows), over the rows that have been evaluated."""
    kept = [[r for r in rows if r[y] is not None and (r[x] or not skip_zero)] for rows in seeds]
    shortest = min(map(len, kept))
    xs, ys = (np.array([[r[c] for r in rows[:shortest]] for rows in kept], float) for c in (x, y))
    return np.median(xs, axis=0), ys


def _band(axes: Axes, method: str, x: np.ndarray, y: np.ndarray, seeds: int) -> None:
    """The seeds' mean as a line, their range as a band."""
    name = NAMES.get(method, method) + (f" ({seeds} seeds)" if seeds > 1 else "")
    axes.plot(x, y.mean(0), "o-", ms=4, color=colour(method), label=name)
    axes.fill_between(x, y.min(0), y.max(0), color=colour(method), alpha=0.2, lw=0)


def _legend_below(figure: Figure) -> None:
    figure.legend(loc="outside lower center", ncols=2, fontsize=10)


def _label_ends(axes: Axes, finals: Mapping[str, tuple[float, float]]) -> None:
    """Each curve's last value, to the right of its end: below where a better curve goes on, above
    where only a worse one does, and clear of other labels. The axes' limits must be set."""
    axes.autoscale_view(scaley=False)
    place = (axes.transData + axes.transAxes.inverted()).transform
    labels: list[tuple[float, float]] = []
    for method, (x, value) in sorted(finals.items(), key=lambda item: -item[1][1]):
        going_on = [final for end, final in finals.values() if end > x]
        shift = -1 if max(going_on, default=0) >= value else 0.7 if going_on else 0
        left, height = place((x, value))
        height += LABEL_HEIGHT * shift
        near = [y for other, y in labels if abs(left - other) < LABEL_WIDTH]
        height = min([height, *(y - LABEL_HEIGHT for y in near)])
        labels.append((left, height))
        axes.annotate(
            f"{value:.1f} %", (left, height), (8, 0), xycoords="axes fraction",
            textcoords="offset points", ha="left", va="center", color=colour(method),
            fontweight="bold",
        )  # fmt: skip
