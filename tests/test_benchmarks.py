"""Each benchmark runs at a tiny size and writes the rows and the plot that it promises."""

import json
import sys

import pytest
from conftest import ROOT, run_command

TINY = {
    "speed.py": (
        "--example-population",
        "4",
        "4",
        "4",
        "--batch-population",
        "32",
        "--rounds",
        "2",
    ),
    "memory.py": ("--example-populations", "12", "--batch-populations", "32"),
    "alignment.py": ("--quick", "--draws", "1", "--dataset", "mnist-sample"),
    "peers.py": (
        *("--only", "eggroll-example", "--population", "30", "--rounds", "1", "--turn", "0.1"),
        *("--seconds", "0.5", "--dataset", "mnist-sample"),
    ),
}


def rows_of(benchmark, folder):
    csv, found = folder / "rows.csv", folder / "rows.json"
    command = (sys.executable, ROOT / "benchmarks" / benchmark, *TINY[benchmark])
    done = run_command(*command, "--csv", csv, "--json", found)
    assert done.returncode == 0, done.stderr
    assert csv.exists() and "Traceback" not in done.stderr
    return json.loads(found.read_text())


def test_speed_has_a_row_for_each_method_with_its_floor(tmp_path):
    rows = rows_of("speed.py", tmp_path)
    whats = {"backprop-bare", "backprop", "example-float32", "example-int8", "batch-float32"}
    assert {row["what"] for row in rows} - {"batch-bfloat16"} == whats
    bare = next(row["step_seconds"] for row in rows if row["what"] == "backprop-bare")
    for row in rows:
        assert row["ratio_to_backprop"] == pytest.approx(row["step_seconds"] / bare, rel=0.05)
        floor = row["step_seconds"] / row["floor_seconds"]
        assert row["ratio_to_floor"] == pytest.approx(floor, rel=0.05)
    assert (tmp_path / "rows.png").exists()


def test_memory_compares_every_population_with_backprop(tmp_path):
    rows = rows_of("memory.py", tmp_path)
    assert [row["method"] for row in rows] == ["backprop", "example", "batch", "naive"]
    first = rows[0]["peak_memory_mb"]
    for row in rows:
        ratio = row["peak_memory_mb"] / first
        assert row["ratio_to_backprop"] == pytest.approx(ratio, abs=0.01)
    assert (tmp_path / "rows.png").exists()


def test_alignment_is_what_theory_says(tmp_path):
    rows = rows_of("alignment.py", tmp_path)
    example = [row for row in rows if row["kind"] == "example" and row["point"] == "start"]
    assert example and all(row["ratio_to_theory"] == pytest.approx(1, abs=0.1) for row in example)
    assert (tmp_path / "rows.png").exists()


def test_peers_measures_both_kinds_where_no_peer_is_installed(tmp_path):
    rows = rows_of("peers.py", tmp_path)
    assert {row["library"] for row in rows} == {"eggroll-batch", "eggroll-example"}
    assert all(row["accuracy"] > 0.2 for row in rows)


def test_frontier_makes_its_table_and_plot_of_whole_runs(tmp_path):
    flags = ("--tiny", "--dataset", "mnist-sample", "--device", "cpu", "--out-dir", tmp_path)
    done = run_command(sys.executable, ROOT / "benchmarks" / "frontier.py", *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "frontier.png").exists()
    assert "backprop" in (tmp_path / "frontier.md").read_text()


def test_the_gpu_script_works_on_a_cpu(tmp_path):
    env = {"OUT": str(tmp_path), "PYTHON": sys.executable}
    done = run_command(ROOT / "benchmarks" / "gpu.sh", "--tiny", env=env)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "population-32" / "summary.md").read_text()
    assert "eggroll-batch+accuracy" in table
