"""Plots say what the numbers say."""

import matplotlib.pyplot as plt
import pytest

from lab import plots


def curve(final, epochs=10, seconds=1.0):
    rows = []
    for epoch in range(epochs + 1):
        accuracy = 0.1 + (final - 0.1) * epoch / epochs
        rows.append({"epoch": epoch, "train_seconds": seconds * epoch, "test_accuracy": accuracy})
    return rows


CURVES = {"backprop": [curve(0.98), curve(0.982)], "eggroll": [curve(0.94, 3, 60.0)]}


@pytest.mark.parametrize(("column", "log"), [("epoch", False), ("train_seconds", True)])
@pytest.mark.parametrize("final", [0.3, 0.7, 0.85, 0.94, 0.98])
def test_labels_of_the_accuracy_axis_are_the_accuracies_that_they_stand_at(column, log, final):
    curves = CURVES | {"eggroll": [curve(final, 3, 60.0)]}
    figure = plots.accuracy_figure(curves, column, "label", log, "title")
    axes = figure.axes[0]
    figure.canvas.draw()
    labels = axes.get_yticklabels()
    assert len(labels) >= 4
    for label in labels:
        assert float(label.get_text().removesuffix(" %")) == pytest.approx(label.get_position()[1])
    plt.close(figure)


def test_the_final_accuracy_of_each_method_is_written_beside_its_curve():
    figure = plots.accuracy_figure(CURVES, "epoch", "epoch", False, "title")
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == {"98.1 %", "94.0 %"}
    plt.close(figure)


def test_a_method_has_one_colour_in_every_plot():
    assert plots.colour("eggroll") != plots.colour("backprop")
    assert plots.colour("another") == plots.colour("another")
