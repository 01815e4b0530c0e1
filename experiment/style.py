"""Style of all plots: a colour, line and mark for each method, labels clear of curves, files."""

import io
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from experiment.files import write_atomically

# chosen by computer to lie far apart for colour-blind readers too (tests/test_style.py)
COLOURS = {
    "backprop": "#0186f7",
    "eggroll": "#005247",
    "eggroll-dense": "#591180",
    "node-perturbation": "#d57405",
    "node-perturbation-int8": "#763906",
}
LINES = {  # mark and line, as matplotlib's format strings
    "backprop": "o-",
    "eggroll": "D-",
    "eggroll-dense": "v-",
    "node-perturbation": "^-",
    "node-perturbation-int8": "s--",
}

STYLE: Any = {  # matplotlib's own type of the keys is not public
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "savefig.facecolor": "white",  # not transparent: pages may be dark
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


class Spot(NamedTuple):
    """Place of a label beside its point, in points."""

    x: float
    y: float
    align: Literal["left", "center", "right"]


SPOTS = tuple(
    spot
    for far in (0, 10, 20)
    for spot in (
        Spot(9, far, "left"),
        Spot(9, -far, "left"),
        Spot(0, 14 + far, "center"),
        Spot(0, -14 - far, "center"),
        Spot(-9, far, "right"),
        Spot(-9, -far, "right"),
    )
)
SPANS = (4, 10, 20, 40, 100)  # of an accuracy axis, in %
MARK = 4 * np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(-1, 2)  # pixels
NEAR = 15  # points: a label farther from its point has a line to it


class Label(NamedTuple):
    """Text beside the point (x, y)."""

    text: str
    x: float
    y: float
    colour: str


def colour(method: str) -> str:
    return COLOURS.get(method, "#808080")


def line_format(method: str) -> str:
    return LINES.get(method, "o-")


def plain_number(value: float, _: int = 0) -> str:
    """Return 0.1, 10, 1,000 or 10 million, for the ticks of a logarithmic axis."""
    for size, name in ((1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{value / size:,g}{name}"
    return f"{value:,g}"


def label_log_axis(axes: Axes) -> None:
    """Make x logarithmic, with ticks at 1, 2 and 5 too where it spans less than two decades."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.xaxis.set_minor_formatter(NullFormatter())


def accuracy_range(accuracies: Sequence[float]) -> tuple[int, int]:
    """Return limits in % that hold the best accuracy and more than half of them all."""
    high = min(100, math.ceil(max(accuracies) + 0.3))
    for span in SPANS:
        if 2 * sum(accuracy >= high - span for accuracy in accuracies) > len(accuracies):
            return max(0, high - span), high
    raise ValueError(f"expected accuracies of 0 to 100 %, got {accuracies}")


def write_labels(figure: Figure, axes: Axes, labels: Iterable[Label], **style: Any) -> None:
    """Write each label where it is inside the frame and covers least of lines and labels."""
    figure.draw_without_rendering()  # sets the size of the axes
    points, boxes = _points_of_lines(axes), []
    for label in sorted(labels, key=lambda label: -label.x):
        note = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points", va="center",
            color=label.colour, **style,
        )  # fmt: skip
        costs = [_cost(axes, note, spot, boxes, points) for spot in SPOTS]
        best = SPOTS[int(np.argmin(costs))]
        boxes.append(_move(note, best))
        if math.hypot(*best[:2]) > NEAR:
            arrow = {"arrowstyle": "-", "color": label.colour, "lw": 0.8}
            axes.annotate("", note.xy, best[:2], textcoords="offset points", arrowprops=arrow)


def _points_of_lines(axes: Axes) -> np.ndarray:
    """Return points (n, 2), in pixels, 3 apart along all curves and error bars, 9 for a mark."""
    bars = [c for c in axes.collections if isinstance(c, LineCollection)]
    pieces = [line.get_xydata() for line in axes.lines]
    pieces += [segment for bar in bars for segment in bar.get_segments()]
    points = [np.empty((0, 2))]
    for piece in pieces:
        corners = axes.transData.transform(np.asarray(piece, float).reshape(-1, 2))
        points += [corner + MARK for corner in corners]
        for start, end in pairwise(corners):
            number = 2 + int(math.dist(start, end) / 3)
            points.append(np.linspace(start, end, number))
    return np.concatenate(points)


def _move(note: Annotation, spot: Spot) -> Bbox:
    """Move a label to a spot; returns its box in pixels."""
    note.xyann = spot[:2]
    note.set_horizontalalignment(spot.align)
    return note.get_window_extent()


def _cost(
    axes: Axes, note: Annotation, spot: Spot, others: Sequence[Bbox], points: np.ndarray
) -> float:
    """Return how bad a spot is: outside the frame, over labels or lines, behind a line, far."""
    box, point = _move(note, spot).padded(7, 3), axes.transData.transform(note.xy)
    outside = not (axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max))
    way = Bbox.union([box, Bbox([point, point])])
    lines = box.count_contains(points) + way.count_contains(points)
    return 1e6 * outside + 1e3 * box.count_overlaps(others) + lines + math.hypot(*spot[:2])


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write name.png and name.svg atomically, and return their paths."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        image, kind = io.BytesIO(), path.suffix[1:]
        figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else None)
        write_atomically(path, image.getvalue())
    plt.close(figure)
    return paths
