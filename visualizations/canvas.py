"""A blank sheet measured in inches, and the few shapes that the explaining figures share."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.text import Text

from lab.plots import COLOURS, STYLE

POSITIVE, NEGATIVE = COLOURS["eggroll"], COLOURS["backprop"]
INK, GREY = "#222222", "#666666"

TITLE, HEADING, BODY, SMALL = 28, 19, 17, 16  # points, on a sheet of about 18 x 9 inches

TALK_STYLE = STYLE | {
    "savefig.dpi": 130,  # more pixels than a projector has
    # letters as outlines: the drawings place text by the inch, and a viewer without the font
    # would put another, wider one into the same place
    "svg.fonttype": "path",
    "text.color": INK,
    "axes.labelcolor": INK,
}

SIGNED = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "#ffffff", POSITIVE])


def sheet(width: float, height: float) -> Axes:
    """Axes without frame that cover a figure of their own, one unit to the inch."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def write(axes: Axes, x: float, y: float, text: str, size: float = BODY, **style) -> Text:
    """Text centred on (x, y), unless the style says otherwise."""
    defaults = {"ha": "center", "va": "center", "color": INK}
    return axes.text(x, y, text, fontsize=size, **(defaults | style))


def heatmap(
    axes: Axes, values: np.ndarray, left: float, middle: float, cell: float, limit: float
) -> None:
    """A matrix (rows, columns) as coloured squares; white is 0, full colour is +-limit.

    Squares and not an image: they stay sharp at any size, in every viewer.
    """
    rows, columns = values.shape
    x = left + cell * np.arange(columns + 1)
    y = middle + cell * (rows / 2 - np.arange(rows + 1))
    axes.pcolormesh(
        x, y, values, cmap=SIGNED, vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.6
    )
    # a frame, so that pale cells at the rim do not dissolve in the page
    frame = plt.Rectangle((x[0], y[-1]), x[-1] - x[0], y[0] - y[-1], fill=False, ec=GREY, lw=0.9)
    axes.add_patch(frame)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "", **style
) -> None:
    """An arrow between two points, with a label above its middle."""
    shape = {"arrowstyle": "-|>", "mutation_scale": 22, "lw": 2.2, "color": GREY}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **(shape | style)))
    if label:
        (x0, y0), (x1, y1) = start, end
        write(axes, (x0 + x1) / 2, (y0 + y1) / 2 + 0.12, label, SMALL, va="bottom", color=GREY)


def box(axes: Axes, left: float, bottom: float, width: float, height: float, **style) -> None:
    """A rectangle with slightly rounded corners."""
    shape = FancyBboxPatch(
        (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.08", **style
    )
    axes.add_patch(shape)
