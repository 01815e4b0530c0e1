"""Figure: what one score per batch, and one score per example, tell of the gradient.

Cosines are those that benchmarks/alignment.py measured and results/reference/ holds.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from eggroll import BlockLowRank, LowRank, NodePerturbation
from experiment.style import colour
from experiment.tables import read_rows
from visualizations.canvas import BODY, GREY, HEADING, SMALL, TITLE, WIDTH

TABLE = Path(__file__).resolve().parent.parent / "results/reference/third-edition/alignment.csv"
BATCH = 128  # examples that each member sees in benchmarks/alignment.py
POINTS = ("start", "middle", "end")  # of training
ESTIMATORS = {
    "node-perturbation": NodePerturbation,
    "eggroll": BlockLowRank,
    "eggroll-dense": LowRank,
}
LABELS = {  # text, then for each panel the point it stands beside, offset in points and alignment
    "node-perturbation": (
        "one score per example,\n16 outputs of a layer",
        ((-1, (16, 8), "left", "top"), (0, (-14, 4), "right", "bottom")),
    ),
    "eggroll": (
        "one score per batch,\n8 units of a layer",
        ((0, (-4, 14), "right", "bottom"),) * 2,
    ),
    "eggroll-dense": (
        "one score per batch,\nall weights at once",
        ((1, (14, -8), "left", "top"),) * 2,
    ),
}


def scores_of_a_member(method: str) -> int:
    """Return how many scores a member has: one, or one for each example."""
    return BATCH if ESTIMATORS[method].per_example else 1


def measured(method: str) -> tuple[np.ndarray, np.ndarray]:
    """Return members (M,), and the cosine of the whole estimate at each point, (points, M).

    At the estimator's own sigma and rank 1.
    """
    rows = [
        row
        for row in read_rows(TABLE)
        if (row["estimator"], row["layer"]) == (method, "all") and row["rank"] in ("1", "")
        if float(row["sigma"]) == ESTIMATORS[method].sigma
    ]
    cosines = {(int(row["members"]), row["point"]): float(row["cosine"]) for row in rows}
    members = sorted({count for count, _ in cosines})
    return np.array(members), np.array([[cosines[m, point] for m in members] for point in POINTS])


def draw() -> Figure:
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, 8.4), sharey=True)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.29, top=0.82, wspace=0.08)
    title = "What one score per batch, and one per example, tell of the gradient"
    figure.suptitle(title, fontsize=TITLE, fontweight="bold", y=0.965)
    both[0].set_ylabel("cosine with the gradient", fontsize=BODY, labelpad=8)
    for panel, (axes, unit) in enumerate(zip(both, ("members", "scores"), strict=True)):
        axes.set_title(f"against {unit}", fontsize=HEADING, fontweight="bold", pad=12)
        axes.set_xlabel(f"{unit} of a step", fontsize=BODY, labelpad=8)
        for method in ESTIMATORS:
            members, cosines = measured(method)
            x = members * (scores_of_a_member(method) if unit == "scores" else 1)
            _draw_curve(axes, method, x, cosines)
            _name_curve(axes, method, x, cosines, panel)
        _set_axes(axes)
    figure.text(
        0.5,
        0.085,
        f"Measured on batches of {BATCH} MNIST digits. Line: in the middle of a training by "
        "backprop; band: at its start and end.\nA member scores all examples: one mean, or "
        f"{BATCH} scores. NodePerturbation's last point has all "
        f"{NodePerturbation().units} orthogonal rows,\nwhich give the gradient to first order.",
        ha="center",
        va="center",
        fontsize=SMALL,
        color=GREY,
        linespacing=1.4,
    )
    return figure


def _draw_curve(axes: Axes, method: str, x: np.ndarray, cosines: np.ndarray) -> None:
    """Draw the middle of training as a line, start and end as the edges of a band."""
    paint, middle = colour(method), cosines[POINTS.index("middle")]
    axes.fill_between(x, cosines.min(0), cosines.max(0), color=paint, alpha=0.25, lw=0)
    axes.plot(x, middle, "o-", color=paint, lw=4, ms=9)


def _name_curve(axes: Axes, method: str, x: np.ndarray, cosines: np.ndarray, panel: int) -> None:
    """Write the estimator's name, and what a member of it is, beside a point."""
    text, places = LABELS[method]
    point, offset, ha, va = places[panel]
    axes.annotate(
        f"{ESTIMATORS[method].__name__}\n{text}",
        (x[point], cosines[POINTS.index("middle"), point]),
        offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        fontsize=SMALL,
        color=colour(method),
        linespacing=1.2,
    )


def _set_axes(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log", xlim=(20, 1e5), ylim=(0.01, 1.3))
    axes.set_xticks([100, 1_000, 10_000])
    axes.set_yticks([0.01, 0.03, 0.1, 0.3, 1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=SMALL, pad=7)
