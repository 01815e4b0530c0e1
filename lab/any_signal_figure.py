"""The figure of `lab.any_signal`: test accuracy by activation, fitness and kind of members."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lab.plots import NAMES, STYLE, colour, save

TITLES = {
    "activation": "by activation (no gradient passes int8-round and those below it)",
    "fitness": "by fitness (backprop needs a loss)",
    "members": "by the rank of members, as many of each",
}
OWN_NAMES = NAMES | {"full-rank-es": "naive evolution strategies"}
ROOM = (-4, 108)  # per cent, with space for the numbers beside the marks

Summaries = Sequence[Mapping[str, Any]]


def draw(found: Summaries, folder: Path) -> list[Path]:
    """any_signal.png and .svg: a mark for each label and method, the seeds' range as a bar."""
    panels = {panel: [s for s in found if s["panel"] == panel] for panel in TITLES}
    panels = {panel: part for panel, part in panels.items() if part}
    heights = [len({s["label"] for s in part}) + 0.5 for part in panels.values()]
    with plt.rc_context(STYLE):
        size = (9, 0.42 * sum(heights) + 0.5 * len(panels) + 1.6)
        figure, grid = plt.subplots(
            len(panels), figsize=size, layout="constrained", height_ratios=heights, sharex=True,
            squeeze=False,
        )  # fmt: skip
        for axes, (panel, part) in zip(grid[:, 0], panels.items(), strict=True):
            draw_panel(axes, part)
            axes.set_title(TITLES[panel], loc="left", fontsize=12)
        axes.set(xlim=ROOM, xlabel="test accuracy (%)", xticks=range(0, 101, 20))
        where = " + ".join(sorted({s["dataset"] for s in found}))
        figure.suptitle(f"Any signal, any component: test accuracy on {where}", fontsize=14)
        methods = dict.fromkeys(s["method"] for s in found)
        marks = [Line2D([], [], color=colour(m), marker="o", ms=9, lw=0) for m in methods]
        names = [OWN_NAMES.get(method, method) for method in methods]
        figure.legend(marks, names, loc="outside lower center", ncols=2)
        return save(figure, folder, "any_signal")


def draw_panel(axes: Axes, part: Summaries) -> None:
    """One line per label, from the worst method's mark to the best's."""
    labels = list(dict.fromkeys(s["label"] for s in part))
    for place, label in enumerate(labels):
        seeds: dict[str, list[float]] = {}
        for summary in part:
            if summary["label"] == label:
                seeds.setdefault(summary["method"], []).append(100 * summary["test_accuracy"])
        means = {method: float(np.mean(own)) for method, own in seeds.items()}
        ends = min(means.values()), max(means.values())
        axes.hlines(place, *ends, color="#c8c8c8", lw=2, zorder=1)
        for method, own in seeds.items():
            axes.hlines(place, min(own), max(own), color=colour(method), lw=5, alpha=0.4)
            mark(axes, place, means[method], colour(method), best=means[method] == ends[1])
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def mark(axes: Axes, place: int, mean: float, paint: str, best: bool) -> None:
    """A dot with its number: the best's to the right, the others' to the left."""
    axes.plot(mean, place, "o", ms=9, color=paint)
    axes.annotate(
        f"{mean:.1f}", (mean, place), (9 if best else -9, 0), textcoords="offset points",
        va="center", ha="left" if best else "right", color=paint, fontweight="bold", fontsize=10,
    )  # fmt: skip
