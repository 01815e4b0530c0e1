"""What one perturbation of one layer costs, of full rank and of low rank: counted, not timed.

Shapes: B examples, R rank, O/I a layer's outputs/inputs.
"""

# ruff: noqa: RUF001 - the times sign is meant: it is drawn

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from visualizations.canvas import BODY, GREY, HEADING, POSITIVE, SMALL, TITLE

WIDTHS = 2 ** np.arange(6, 15)  # 64 to 16,384: outputs and inputs of a square layer
BATCH = 128
OURS, LARGE = 256, 8192  # the experiment's hidden width, and one of a large network


def noise_numbers_full(outputs: int, inputs: int) -> int:
    """Random numbers in a perturbation E (O, I) whose entries are all drawn: O I."""
    return outputs * inputs


def noise_numbers_low(outputs: int, inputs: int, rank: int) -> int:
    """Random numbers in a (R, O) and b (R, I), which stand for E = a^T b / sqrt(R): R (O + I)."""
    return rank * (outputs + inputs)


def multiply_adds_full(outputs: int, inputs: int) -> int:
    """To form W + sigma E, once for the whole batch: one for each weight, O I."""
    return outputs * inputs


def multiply_adds_low(outputs: int, inputs: int, rank: int, batch: int) -> int:
    """To form x b^T (B, R), and to add its product with a to the outputs (B, O): B R (I + O)."""
    return batch * rank * (inputs + outputs)


@dataclass(frozen=True)
class Cost:
    """One panel: a cost of full rank and of rank R, by the width of a square layer."""

    title: str
    unit: str
    full: Callable[[int], int]
    low: Callable[[int, int], int]
    counted: str

    def ratio(self, width: int) -> float:
        """How many times as much full rank costs as rank 1."""
        return self.full(width) / self.low(width, 1)


NOISE = Cost(
    "memory: the noise",
    "random numbers held\nper perturbation of one layer",
    lambda width: noise_numbers_full(width, width),
    lambda width, rank: noise_numbers_low(width, width, rank),
    "full rank: the matrix E, O · I numbers\n"
    "rank R: factors a and b, R · (O + I) numbers\n"
    "one perturbation serves both signs of a pair",
)
ARITHMETIC = Cost(
    "arithmetic: what the noise adds",
    f"multiply-adds that the perturbation adds\nper member and layer, {BATCH} examples",
    lambda width: multiply_adds_full(width, width),
    lambda width, rank: multiply_adds_low(width, width, rank, BATCH),
    "full rank: W + σE, O · I\n"
    "rank R: x bᵀ and its product with a, B · R · (I + O)\n"
    "not counted: drawing noise, and x Wᵀ, B · O · I per member\n"
    "(at low rank once for all members, where they share x)",
)

FULL, RANK_4, RANK_1 = "#444444", "#f0b27a", POSITIVE
TOP = 1e9
ROOM = 3.8  # how far the axis goes on beyond the lines, for their names


def draw() -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(18.2, 10))
    figure.subplots_adjust(left=0.095, right=0.97, bottom=0.29, top=0.81, wspace=0.36)
    ours, large = (f"{NOISE.ratio(width):,.0f}×" for width in (OURS, LARGE))
    title = f"Why low rank: {ours} less noise at width {OURS}, {large} at {LARGE:,}"
    figure.suptitle(title, fontsize=TITLE, fontweight="bold", y=0.945)
    for axes, cost in zip(panels, (NOISE, ARITHMETIC), strict=True):
        _curves(axes, cost)
        _label_axes(axes, cost)
        _ours(axes)
        _ratio(axes, cost, OURS)
        _ratio(axes, cost, LARGE)
    return figure


def _curves(axes: Axes, cost: Cost) -> None:
    """Each line with its name at its end."""
    curves = (
        ("full rank", cost.full, FULL),
        ("R = 4", lambda width: cost.low(width, 4), RANK_4),
        ("R = 1", lambda width: cost.low(width, 1), RANK_1),
    )
    for name, formula, colour in curves:
        y = [formula(int(width)) for width in WIDTHS]
        axes.loglog(WIDTHS, y, color=colour, lw=4)
        axes.annotate(
            name, (WIDTHS[-1], y[-1]), (10, 0), textcoords="offset points", va="center",
            fontsize=BODY, fontweight="bold", color=colour, annotation_clip=False,
        )  # fmt: skip


def _label_axes(axes: Axes, cost: Cost) -> None:
    axes.set_title(cost.title, fontsize=HEADING, fontweight="bold", pad=18)
    axes.set_xlabel("width of a square layer, O = I", fontsize=BODY, labelpad=10)
    axes.set_ylabel(cost.unit, fontsize=BODY, labelpad=10)
    axes.set(xlim=(WIDTHS[0], ROOM * WIDTHS[-1]), ylim=(1e2, TOP))
    axes.set_xticks(WIDTHS[::2], [f"{width:,}" for width in WIDTHS[::2]])
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=SMALL, pad=9)
    axes.text(
        0, -0.22, cost.counted, transform=axes.transAxes, va="top", fontsize=SMALL, color=GREY,
        linespacing=1.4,
    )  # fmt: skip


def _ours(axes: Axes) -> None:
    """Where the experiment of this repository stands."""
    axes.axvline(OURS, color=GREY, lw=1.2)
    axes.annotate(
        "hidden layers of this experiment", (OURS, TOP), (10, -8),
        textcoords="offset points", va="top", fontsize=SMALL, color=GREY,
    )  # fmt: skip


def _ratio(axes: Axes, cost: Cost, width: int) -> None:
    """The two points that are compared, and how many times fewer rank 1 needs than full rank."""
    low, full = cost.low(width, 1), cost.full(width)
    axes.plot([width, width], [low, full], "o:", color=FULL, ms=10, lw=2.5)
    axes.annotate(
        "equal" if full == low else f"{cost.ratio(width):,.0f}× fewer", (width, low), (10, -12),
        textcoords="offset points", va="top", fontsize=BODY, fontweight="bold", color=RANK_1,
    )  # fmt: skip
