"""Figure: what one member's perturbation of one layer costs, dense and of low rank, counted.

Shapes: R rank, I / O inputs / outputs of a layer, K blocks.
"""

# ruff: noqa: RUF001 - the times sign is drawn

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from eggroll import BlockLowRank
from experiment.style import COLOURS
from visualizations.canvas import BODY, GREY, HEADING, SMALL, TITLE, WIDTH

WIDTHS = 2 ** np.arange(6, 15)  # 64 to 16,384: outputs and inputs of a square layer
OURS, LARGE = 256, 8192  # the experiment's hidden width, and one of a large network
EXAMPLES, UNITS = 128, BlockLowRank().units
INK = "#444444"

Cost = Callable[[int, int, int | None], int]  # of O, I and R; None: dense


def noise(outputs: int, inputs: int, rank: int | None) -> int:
    """Count random numbers: O I of a dense E; R (O + I) of A and B, where E = A B^T / sqrt(R)."""
    return rank * (outputs + inputs) if rank else outputs * inputs


def multiply_adds(outputs: int, inputs: int, rank: int | None, examples: int = EXAMPLES) -> int:
    """Count multiply-adds: O I form W + sigma E; R (I + O) per example give x B and (x B) A^T."""
    return examples * noise(outputs, inputs, rank) if rank else outputs * inputs


PANELS: tuple[tuple[str, str, Cost, str], ...] = (
    (
        "memory",
        "random numbers per member",
        noise,
        "dense: E, O · I numbers\nrank R: A and B, R · (O + I) numbers\n"
        f"in blocks: one direction serves K = O / {UNITS} members\n"
        "(not counted: a pair +E and −E shares its noise)",
    ),
    (
        "arithmetic",
        "multiply-adds per member",
        multiply_adds,
        f"dense: W + σE, O · I\nrank R: x B and (x B) Aᵀ, {EXAMPLES} examples · R · (I + O)\n"
        "in blocks: the same for K members together\n(not counted: x Wᵀ, and drawing the noise)",
    ),
)


def draw() -> Figure:
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, 8.8))
    figure.subplots_adjust(left=0.085, right=0.985, bottom=0.3, top=0.82, wspace=0.24)
    for axes, (title, unit, cost, counted) in zip(both, PANELS, strict=True):
        axes.set_title(title, fontsize=HEADING, fontweight="bold", pad=12)
        axes.set_ylabel(unit, fontsize=BODY, labelpad=8)
        _write(axes, counted, (0, -0.24), (0, 0), xycoords="axes fraction", linespacing=1.4)
        _draw_curves(axes, cost)
        _draw_ratios(axes, cost)
        _set_axes(axes)
    ours, large = (f"{ratio(noise, width):,.0f}×" for width in (OURS, LARGE))
    title = f"Why low rank: {ours} less noise at width {OURS}, {large} at {LARGE:,}"
    figure.suptitle(title, fontsize=TITLE, fontweight="bold", y=0.965)
    return figure


def ratio(cost: Cost, width: int) -> float:
    """Return the cost of a dense perturbation over that of rank 1."""
    return cost(width, width, None) / cost(width, width, 1)


def in_blocks(cost: Cost, width: int) -> float:
    """Return the cost for each of the K members that a direction of rank 1 serves."""
    return cost(width, width, 1) / (width / UNITS)


def _draw_curves(axes: Axes, cost: Cost) -> None:
    """Draw each line with its name at its end."""
    widths = [int(width) for width in WIDTHS]
    for name, color, y in (
        ("dense", INK, [cost(width, width, None) for width in widths]),
        ("R = 4", "#bda4d8", [cost(width, width, 4) for width in widths]),
        ("R = 1", COLOURS["eggroll-dense"], [cost(width, width, 1) for width in widths]),
        (f"R = 1,\nblocks of {UNITS}", COLOURS["eggroll"], [in_blocks(cost, w) for w in widths]),
    ):
        axes.loglog(widths, y, color=color, lw=4)
        _write(axes, name, (widths[-1], y[-1]), (9, 0), color, va="center", fontweight="bold")


def _draw_ratios(axes: Axes, cost: Cost) -> None:
    """Mark two widths, and how many times fewer rank 1 needs there than a dense perturbation."""
    for width in (OURS, LARGE):
        low, dense = cost(width, width, 1), cost(width, width, None)
        axes.plot([width, width], [low, dense], "o:", color=INK, ms=9, lw=2.5)
        text = "equal" if low == dense else f"{ratio(cost, width):,.0f}× fewer"
        color = COLOURS["eggroll-dense"]
        _write(axes, text, (width, low), (8, -8), color, fontweight="bold")
    axes.axvline(OURS, color=GREY, lw=1.2)
    _write(axes, "hidden layers of\nthis experiment", (OURS, 1e9), (8, -4))


def _set_axes(axes: Axes) -> None:
    axes.set_xlabel("width of a square layer, O = I", fontsize=BODY, labelpad=8)
    axes.set(xlim=(WIDTHS[0], 10 * WIDTHS[-1]), ylim=(1, 1e9))  # room for the names of the lines
    axes.set_xticks(WIDTHS[::2], [f"{width:,}" for width in WIDTHS[::2]])
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=SMALL, pad=7)


def _write(axes: Axes, text: str, at: tuple, offset: tuple, color: str = GREY, **style) -> None:
    """Write text beside a point; the offset is in points."""
    style = {"va": "top", "fontsize": SMALL, "color": color, "annotation_clip": False} | style
    axes.annotate(text, at, offset, textcoords="offset points", **style)
