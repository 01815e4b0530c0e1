"""A blank sheet measured in inches, and the shapes that the figures share."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from experiment.style import STYLE

POSITIVE, NEGATIVE = "#e07b26", "#2f6db3"
INK, GREY = "#222222", "#666666"
SIGNED = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "#ffffff", POSITIVE])

WIDTH = 15  # inches of every sheet
TITLE, HEADING, BODY, SMALL = 24, 17, 16, 15  # points: SMALL is 11 pixels on a sheet 800 wide

SHEET_STYLE = STYLE | {
    "savefig.dpi": 150,
    # outlines: without the font a viewer would draw wider letters, which overlap
    "svg.fonttype": "path",
    "text.color": INK,
    "axes.labelcolor": INK,
}


def sheet(height: float, title: str) -> Axes:
    """Return axes without a frame that cover a new figure, one unit to the inch."""
    figure = plt.figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.axis("off")
    write(axes, WIDTH / 2, height - 0.5, title, TITLE, fontweight="bold")
    return axes


def write(axes: Axes, x: float, y: float, text: str, size: float = SMALL, **style) -> None:
    """Write text centered on (x, y), unless the style says otherwise."""
    defaults = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.3}
    axes.text(x, y, text, fontsize=size, **(defaults | style))


def caption(axes: Axes, y: float, *lines: str) -> None:
    """Write grey lines centered at the foot of a sheet."""
    write(axes, WIDTH / 2, y, "\n".join(lines), color=GREY, linespacing=1.4)


def heatmap(
    axes: Axes,
    values: np.ndarray,  # (rows, columns)
    left: float,
    middle: float,
    cell: float,
    limit: float | None = None,
) -> None:
    """Draw a matrix as colored squares: white is 0, full color +-limit (None: the largest).

    Squares stay sharp at any size; an image would not in every viewer.
    """
    rows, columns = values.shape
    limit = limit or float(np.abs(values).max()) or 1.0
    x = left + cell * np.arange(columns + 1)
    y = middle + cell * (rows / 2 - np.arange(rows + 1))
    axes.pcolormesh(
        x, y, values, cmap=SIGNED, vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.6
    )
    # a frame, so that pale cells at the rim stand out from the page
    frame = plt.Rectangle((x[0], y[-1]), x[-1] - x[0], y[0] - y[-1], fill=False, ec=GREY, lw=0.9)
    axes.add_patch(frame)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "", **style
) -> None:
    """Draw an arrow between two points, with a label above its middle."""
    shape = {"arrowstyle": "-|>", "mutation_scale": 20, "lw": 2, "color": GREY}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **(shape | style)))
    if label:
        (x0, y0), (x1, y1) = start, end
        write(axes, (x0 + x1) / 2, (y0 + y1) / 2 + 0.12, label, va="bottom", color=GREY)


def box(axes: Axes, left: float, bottom: float, width: float, height: float, **style) -> None:
    """Draw a rectangle with slightly rounded corners."""
    shape = FancyBboxPatch(
        (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.08", **style
    )
    axes.add_patch(shape)
