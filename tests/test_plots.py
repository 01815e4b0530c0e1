"""Plots say what the numbers say, inside their frame."""

import matplotlib.pyplot as plt
import pytest
from reports import curve, summary

from experiment import plots
from experiment.any_signal import any_signal_figure

CURVES = {"backprop": [curve(0.98), curve(0.982)], "eggroll": [curve(0.94, 3, 60.0)]}
FINALS = pytest.mark.parametrize("final", [0.1, 0.85, 0.94, 1.0])


def figure_of(final, column, log):
    """Return the plot of three methods of known ends and one that ends at `final`."""
    curves = {"node-perturbation": [curve(0.979, 6)], "eggroll-dense": [curve(final, 3, 60.0)]}
    return plots.accuracy_figure(CURVES | curves, column, "label", log, "title")


def texts_of(axes):
    return [text for text in axes.texts if text.get_text()]  # others are lines to labels


@FINALS
def test_labels_of_the_accuracy_axis_are_the_values_at_their_ticks(final):
    figure = figure_of(final, "epoch", False)
    figure.canvas.draw()
    for number, axes in enumerate(figure.axes):
        labels = [label for label in axes.get_yticklabels() if label.get_text()]
        assert len(labels) >= (2 if number else 4)
        for label in labels:
            value = float(label.get_text().removesuffix(" %"))
            assert value == pytest.approx(label.get_position()[1])
    plt.close(figure)


@pytest.mark.parametrize(("column", "log"), [("epoch", False), ("train_seconds", True)])
@FINALS
def test_the_final_accuracy_of_each_method_is_written_inside_the_frame(final, column, log):
    figure = figure_of(final, column, log)
    figure.canvas.draw()
    written = [(axes, text) for axes in figure.axes for text in texts_of(axes)]
    numbers = sorted(text.get_text() for _, text in written)
    assert numbers == sorted(["98.1 %", "94.0 %", "97.9 %", f"{100 * final:.1f} %"])
    for axes, text in written:
        box = text.get_window_extent()
        assert axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max), text
    plt.close(figure)


def test_methods_far_below_the_others_are_drawn_in_a_strip_of_their_own():
    curves = {"backprop": [curve(0.98)], "eggroll": [curve(0.97)], "eggroll-dense": [curve(0.9)]}
    figure = plots.accuracy_figure(curves, "epoch", "epoch", False, "title")
    upper, lower = figure.axes
    assert upper.get_ylim() == pytest.approx((95, 99.24)) and lower.get_ylim()[1] == 95
    assert [text.get_text() for text in texts_of(lower)] == ["90.0 %"]
    plt.close(figure)


def test_the_any_signal_figure_has_a_number_for_each_label_and_method():
    rows = [
        summary("backprop", 0, 0.98, 1.0),
        summary("node-perturbation", 0, 0.97, 1.0),
        summary("backprop+sign", 0, 0.5, 1.0),
        summary("node-perturbation+sign", 0, 0.95, 1.0),
        summary("node-perturbation+macro-F1", 0, 0.96, 1.0),
    ]
    figure = any_signal_figure(rows, "mnist")
    panels = [{text.get_text() for text in texts_of(axes)} for axes in figure.axes]
    assert panels == [{"98.0", "97.0", "50.0", "95.0"}, {"97.0", "96.0"}]
    ticks = [[t.get_text() for t in axes.get_yticklabels()] for axes in figure.axes]
    assert ticks == [["gelu", "sign"], ["cross-entropy", "macro-F1"]]
    low, high = figure.axes[0].get_xlim()
    assert low > 90 and high < 101 and "arrows: below 95 %" in figure.axes[-1].get_xlabel()
    plt.close(figure)
