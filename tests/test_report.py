"""Tables and plots say what the numbers say."""

import csv
import json

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT, captured

from experiment import plots, report
from experiment.any_signal import any_signal_figure
from experiment.files import write_csv, write_json


def summary(row, seed, accuracy, seconds, **values):
    return {
        "row": row,
        "fitness": "cross-entropy",
        "method": row.partition("+")[0],
        "dataset": "mnist",
        "seed": seed,
        "epochs": 10,
        "population": None,
        "test_accuracy": accuracy,
        "train_seconds": seconds,
        "peak_memory_mb": 100.0,
        "device": "cpu: X, 2 threads",
        "status": "finished",
    } | values


def write_run(folder, row, seed, accuracy, **values):
    run = folder / row / f"seed{seed}"
    run.mkdir(parents=True)
    record = summary(row, seed, accuracy, 1.0, **values)
    del record["row"], record["fitness"]  # the folder and config.json name them
    write_json(run / "summary.json", record)
    fitness = "file.py:f" if row.endswith("macro-F1") else "cross-entropy"
    write_json(run / "config.json", {"flags": {"fitness": fitness, "seed": seed}})
    write_csv(run / "metrics.csv", curve(accuracy), list(curve(accuracy)[0]))


def curve(final, epochs=10, seconds=1.0):
    return [
        {
            "epoch": epoch,
            "train_seconds": seconds * epoch,
            "forward_passes_per_image": epoch,
            "test_accuracy": 0.1 + (final - 0.1) * epoch / epochs,
            "train_cross_entropy": 2.3 - epoch / epochs,
        }
        for epoch in range(epochs + 1)
    ]


# ---- tables ----


def test_the_table_states_mean_deviation_seeds_medians_and_ratio():
    rows = [
        summary("backprop", 0, 0.97, 10.0),
        summary("backprop", 1, 0.98, 12.0),
        summary("eggroll", 0, 0.98, 110.0, population=1440, fitness="a/own.py:f"),
    ]
    lines = report.markdown_tables(rows).splitlines()
    assert lines[0].count("|") == 9  # eight columns
    expected = "| backprop | cross-entropy |  | 10 | 97.50 ± 0.71 % (2) | 11.0 | 1.0x | 100 MB |"
    assert lines[2] == expected
    expected = "| eggroll | own.py:f | 1,440 | 10 | 98.00 % (1) | 110.0 | 10.0x | 100 MB |"
    assert lines[3] == expected
    assert lines[5].startswith("mnist, cpu: X, 2 threads.")


def test_devices_are_not_compared():
    rows = [summary("backprop", 0, 0.97, 10.0), summary("eggroll", 0, 0.9, 5.0, device="cuda: Y")]
    tables = report.markdown_tables(rows)
    assert tables.count("| method |") == 2 and "0.5x" not in tables and "cuda: Y" in tables


def test_committed_results_of_any_edition_make_a_table():
    for path in (ROOT / "results" / "reference").glob("**/summary.csv"):
        with path.open() as file:
            assert "| backprop |" in report.markdown_tables(list(csv.DictReader(file)))


def test_only_finished_runs_are_reported_in_the_order_of_the_methods(tmp_path):
    for row in ("new-method", "node-perturbation+sign", "node-perturbation", "eggroll", "backprop"):
        write_run(tmp_path, row, 0, 0.9)
    write_run(tmp_path, "backprop", 1, 0.9, status="interrupted")
    rows = [run.parent.name for run in report.finished_runs(tmp_path)]
    assert rows == [
        "backprop",
        "eggroll",
        "node-perturbation",
        "new-method",
        "node-perturbation+sign",
    ]


def report_command(*words):
    return captured("report", words, lambda: report.run_script(report.main, "experiment.report"))


def test_a_report_is_written_and_published(tmp_path):
    rows = ("backprop", "eggroll", "backprop+sign", "eggroll+sign", "eggroll+macro-F1")
    for row in rows:
        for seed in (0, 1):
            write_run(tmp_path / "latest", row, seed, 0.9 + seed / 100)
    done = report_command(tmp_path / "latest")
    assert done.returncode == 0 and "| eggroll+macro-F1 | file.py:f |" in done.stdout, done.stderr
    assert (tmp_path / "latest" / "any_signal.png").stat().st_size > 10_000
    assert report_command("publish", tmp_path / "latest", tmp_path / "kept").returncode == 0
    assert len(list((tmp_path / "kept").glob("*/seed*/metrics.csv"))) == 2 * len(rows)
    config = json.loads((tmp_path / "kept" / "eggroll" / "config.json").read_text())
    assert config["flags"]["seed"] == 0
    for name in ("accuracy_by_epoch.svg", "fitness.png", "time_and_memory.png", "summary.md"):
        assert (tmp_path / "kept" / name).exists()
    with (tmp_path / "kept" / "summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * len(rows)


@pytest.mark.parametrize(("words", "said"), [((), "got nothing"), (("{tmp}",), "no finished run")])
def test_a_report_of_nothing_is_one_line(words, said, tmp_path):
    done = report_command(*(word.format(tmp=tmp_path) for word in words))
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_readmes_table_is_replaced_between_the_markers():
    readme = f"# Title\n{report.BEGIN}\nold\n{report.END}\nrest\n"
    new = report.readme_with_table(readme)
    assert new.startswith(f"# Title\n{report.BEGIN}\n| method |") and "old" not in new
    assert new.endswith(f"{report.END}\nrest\n") and report.readme_with_table(new) == new


# ---- plots ----

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
    assert upper.get_ylim() == (95, 99) and lower.get_ylim()[1] == 95
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
