"""Plot of runs with another fitness or another activation: one line for each, a mark per method."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiment.style import Label, accuracy_range, colour, line_format, write_labels

ACTIVATIONS = ("int8-round", "argmax-k", "step", "sign")

Summaries = Sequence[Mapping[str, Any]]


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
    rows = [seeds for part in panels.values() for seeds in part.values()]
    means = [float(np.mean(own)) for seeds in rows for own in seeds.values()]
    low, high = accuracy_range(means)
    room = 0.12 * (high - low)  # for numbers beside the marks
    grid[-1, 0].set_xlim(low - room, high + room)
    arrows = f"; arrows: below {low} %" if min(means) < low else ""
    grid[-1, 0].set_xlabel(f"test accuracy (%); pale: range of the seeds{arrows}")
    methods = dict.fromkeys(method for seeds in rows for method in seeds)
    marks = [Line2D([], [], color=colour(m), marker=line_format(m)[0], ms=9, lw=0) for m in methods]
    figure.suptitle(f"Any signal, any component: test accuracy on {where}", fontsize=14)
    figure.legend(marks, list(methods), loc="outside lower center", ncols=2)
    labels = {}
    for axes, (title, part) in zip(grid[:, 0], panels.items(), strict=True):
        axes.set_title(title, loc="left", fontsize=12)
        labels[axes] = _draw_panel(axes, part, low)
    for axes, own in labels.items():  # once all rows have names, which change the width
        write_labels(figure, axes, own, fontweight="bold", fontsize=10)
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


def _draw_panel(axes: Axes, panel: Mapping[str, Mapping[str, list]], low: float) -> list[Label]:
    """Draw one line per label, from the worst method's mark to the best's; returns the numbers."""
    axes.set_yticks(range(len(panel)), list(panel))
    axes.set_ylim(len(panel) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    labels = []
    for place, seeds in enumerate(panel.values()):
        means = {method: float(np.mean(own)) for method, own in seeds.items()}
        span = [max(low, end(means.values())) for end in (min, max)]
        axes.plot(span, [place, place], color="#c8c8c8", lw=2, zorder=1)
        for method, mean in means.items():
            paint, x = colour(method), max(low, mean)
            ends = [max(low, end(seeds[method])) for end in (min, max)]
            axes.plot(ends, [place, place], color=paint, lw=5, alpha=0.4)
            axes.plot(x, place, "<" if mean < low else line_format(method)[0], ms=9, color=paint)
            labels.append(Label(f"{mean:.1f}", ends[1], place, paint))
    return labels
