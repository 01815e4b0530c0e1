"""Tables and the page say what the numbers say."""

import base64
import json
from html.parser import HTMLParser

import pytest
from conftest import ROOT, call, captured
from reports import summary, write_run
from runs import read_csv

from experiment import plots, report, style
from experiment.errors import UserError
from experiment.tables import with_tables


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
        rows = read_csv(path)
        table = report.markdown_tables(rows)
        assert rows and all(f"| {row['row']} |" in table for row in rows)


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


class Page(HTMLParser):
    """Collects the cells, the text, and every attribute that makes a browser load something."""

    def __init__(self, html):
        super().__init__()
        self.cells, self.texts, self.loaded, self.tags = [], [], [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.cells and not self.cells[-1]:
            self.cells[-1] = data

    def pictures(self):
        """Return the data of all pictures; a source that is no data fails."""
        sources = [source.partition("data:image/png;base64,") for source in self.loaded]
        assert all(before == "" for before, _, _ in sources)
        return [base64.b64decode(data) for _, _, data in sources]


def report_command(*words):
    return captured("report", words, lambda: report.run_script(report.main, "experiment.report"))


def test_a_report_is_written_and_published(tmp_path, monkeypatch):
    monkeypatch.setitem(style.STYLE, "savefig.dpi", 30)  # to be quick
    rows = ("backprop", "eggroll", "backprop+sign", "eggroll+sign", "eggroll+macro-F1")
    for row in rows:
        for seed in (0, 1):
            write_run(tmp_path / "latest", row, seed, 0.9 + seed / 100)
    done = report_command(tmp_path / "latest")
    assert done.returncode == 0 and "| eggroll+macro-F1 | file.py:f |" in done.stdout, done.stderr
    pictures = Page((tmp_path / "latest" / "report.html").read_text()).pictures()
    images = [path.read_bytes() for path in (tmp_path / "latest").glob("*.png")]
    assert sorted(pictures) == sorted(images) and len(images) == 6
    assert report_command("publish", tmp_path / "latest", tmp_path / "kept").returncode == 0
    assert len(list((tmp_path / "kept").glob("*/seed*/metrics.csv"))) == 2 * len(rows)
    config = json.loads((tmp_path / "kept" / "eggroll" / "config.json").read_text())
    assert config["flags"]["seed"] == 0
    kept = [path.parent.name for path in (tmp_path / "kept").glob("*/model.safetensors")]
    assert sorted(kept) == ["backprop", "eggroll"]  # of the methods, not of other signals
    for name in ("accuracy_by_epoch.svg", "fitness.png", "time_and_memory.png", "summary.md"):
        assert (tmp_path / "kept" / name).exists()
    assert not (tmp_path / "kept" / "report.html").exists()  # its pictures lie beside it
    assert len(read_csv(tmp_path / "kept" / "summary.csv")) == 2 * len(rows)


def test_committed_results_are_drawn_again_from_the_same_numbers(tmp_path, monkeypatch):
    for seed in (0, 1):
        write_run(tmp_path / "latest", "backprop", seed, 0.9 + seed / 100)
        write_run(tmp_path / "latest", "eggroll+sign", seed, 0.8, population=64)
    drawn = []
    monkeypatch.setattr(plots, "draw_all", lambda *given: drawn.append(given) or [])
    assert report_command("publish", tmp_path / "latest", tmp_path / "kept").returncode == 0
    assert call("benchmarks/redraw.py", tmp_path / "kept").returncode == 0
    (curves, rows, _), (curves_again, rows_again, folder) = drawn
    assert folder == tmp_path / "kept" and curves == curves_again
    for name in ("row", "dataset", "device", "test_accuracy", "train_seconds", "peak_memory_mb"):
        assert [row[name] for row in rows] == [row[name] for row in rows_again]
    done = call("benchmarks/redraw.py", tmp_path / "nowhere")
    assert done.returncode == 2 and "summary.csv" in done.stderr


@pytest.mark.parametrize(("words", "said"), [((), "got nothing"), (("{tmp}",), "no finished run")])
def test_a_report_of_nothing_is_one_line(words, said, tmp_path):
    done = report_command(*(word.format(tmp=tmp_path) for word in words))
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


MARKER = "<!-- table: results/reference/third-edition/{} -->\n"


def test_tables_are_remade_between_their_markers():
    marker = MARKER.format("summary.csv")
    new = with_tables(f"# Title\n{marker}old\n<!-- end -->\nrest\n")
    assert new.startswith(f"# Title\n{marker}| method |") and "old" not in new
    assert new.endswith("<!-- end -->\nrest\n")
    assert with_tables(new) == new


def test_a_table_has_the_columns_that_its_marker_names():
    marker = MARKER.format("frontier.csv [method, epochs]")
    head, _, *rows = with_tables(f"{marker}<!-- end -->").split("\n")[1:]
    assert head == "| method | epochs |" and rows[0].startswith("| backprop |")
    assert "commit " in rows[-2] and rows[-1] == "<!-- end -->"
    for wrong in ("frontier.csv [nothing]", "nothing.csv"):
        with pytest.raises(UserError, match="nothing"):
            with_tables(f"{MARKER.format(wrong)}<!-- end -->")


# ---- the page ----

CONFIG = {
    "command": ["mnist_eggroll.py", "eggroll", "--fitness", "my own.py:f"],
    "device": "cpu: X, 2 threads",
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
    "commit": "0123abc",
}


def page_of(folder, *rows, **config):
    (folder / "plot.png").write_bytes(b"picture")
    tables, configs = report.make_tables(rows), [CONFIG | config, CONFIG | config]
    html = report.page(report.COLUMNS, tables, [folder / "plot.png"], configs, folder)
    return html, Page(html)


def test_the_page_holds_the_table_the_plots_the_environment_and_the_commands(tmp_path):
    _, page = page_of(tmp_path, summary("backprop", 0, 0.97, 10.0))
    assert page.cells[0] == "backprop" and "97.00 % (1)" in page.cells
    assert page.pictures() == [b"picture"]
    text = " ".join(page.texts)
    for expected in (
        "cpu: X, 2 threads, python 3.11.7, torch 2.15.0, commit 0123abc",
        "python mnist_eggroll.py eggroll --fitness 'my own.py:f'",
        f"python -m experiment.report {tmp_path}",
    ):
        assert expected in text
    assert text.count("commit 0123abc") == 1  # one line for all runs of one machine


def test_the_page_loads_nothing_and_escapes_text(tmp_path):
    name = "<script>alert(1)</script> & co"
    row = summary("backprop", 0, 0.97, 10.0, device=name, fitness="<b>.py:f")
    html, page = page_of(tmp_path, row, device=name, command=["run.py", "<i>"])
    assert page.pictures() and not {"script", "link", "iframe", "b", "i"} & page.tags
    assert "://" not in html and "url(" not in html and "@import" not in html
    text = " ".join(page.texts)
    assert f"mnist, {name}" in text and "<b>.py:f" in text and "'<i>'" in text  # as typed
