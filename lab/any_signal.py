"""The figure of what --all adds: test accuracy by activation and by fitness, for each method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lab.plots import NAMES, STYLE, colour, save

PANELS = {  # title, and the label of a network that differs in nothing else
    "by activation (no gradient passes the last four)": "gelu",
    "by fitness (backprop needs a loss)": "cross-entropy",
}
ACTIVATIONS = ("gelu", "int8-round", "argmax-k", "step", "sign")
LABELS = {"even-digits": "even-digits (half of the images)"}
ROOM = (-4, 108)  # per cent, with space for the numbers beside the marks

Summaries = Sequence[Mapping[str, Any]]


def draw(summaries: Summaries, folder: Path) -> list[Path]:
    """any_signal.png and .svg: a mark for each label and method, the seeds' range as a bar."""
    found = [dict(s) | {"label": s["row"].partition("+")[2]} for s in summaries]
    panels = {title: [] for title in PANELS}
    for (title, usual), activation in zip(PANELS.items(), (True, False), strict=True):
        own = [s for s in found if s["label"] and (s["label"] in ACTIVATIONS) == activation]
        methods = {s["method"] for s in own}
        plain = [s | {"label": usual} for s in found if not s["label"] and s["method"] in methods]
        panels[title] = plain + own
    panels = {title: part for title, part in panels.items() if part}
    heights = [len({s["label"] for s in part}) + 0.5 for part in panels.values()]
    with plt.rc_context(STYLE):
        size = (9, 0.42 * sum(heights) + 0.5 * len(panels) + 1.6)
        figure, grid = plt.subplots(
            len(panels), figsize=size, layout="constrained", height_ratios=heights, sharex=True,
            squeeze=False,
        )  # fmt: skip
        for axes, (title, part) in zip(grid[:, 0], panels.items(), strict=True):
            draw_panel(axes, part)
            axes.set_title(title, loc="left", fontsize=12)
        axes.set(xlim=ROOM, xlabel="test accuracy (%)", xticks=range(0, 101, 20))
        where = " + ".join(sorted({s["dataset"] for s in found}))
        figure.suptitle(f"Any signal, any component: test accuracy on {where}", fontsize=14)
        methods = dict.fromkeys(s["method"] for part in panels.values() for s in part)
        marks = [Line2D([], [], color=colour(m), marker="o", ms=9, lw=0) for m in methods]
        names = [NAMES.get(method, method) for method in methods]
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
            side = ends.index(means[method]) if means[method] in ends else None
            mark(axes, place, means[method], colour(method), side if len(means) > 1 else 1)
    axes.set_yticks(range(len(labels)), [LABELS.get(label, label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def mark(axes: Axes, place: int, mean: float, paint: str, side: int | None) -> None:
    """A dot with its number: the best's (side 1) to the right, the worst's (0) to the left, else
    below."""
    axes.plot(mean, place, "o", ms=9, color=paint)
    offset, across = {0: ((-9, 0), "right"), 1: ((9, 0), "left"), None: ((0, -14), "center")}[side]
    axes.annotate(
        f"{mean:.1f}", (mean, place), offset, textcoords="offset points", va="center", ha=across,
        color=paint, fontweight="bold", fontsize=10,
    )  # fmt: skip
