"""Each benchmark at a tiny size: it writes the rows and the plot that it promises, and they agree
with each other. How long anything takes is nowhere asserted."""

import csv
import json
import math
import sys

import pytest
from conftest import ROOT, SAMPLE, run_command

import mnist_eggroll
from benchmarks import alignment, memory, peers, rows, speed

TINY = {
    "speed": "--example-population 4 4 4 --batch-population 6 --rounds 2",
    "memory": "--example-populations 12 --batch-populations 6 1000000",
    "alignment": "--quick --draws 1",
    "peers": "--only eggroll-example --population 30 --rounds 1 --turn 0.1 --seconds 0.5",
}
ON_DIGITS = ("alignment", "peers")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of a benchmark, run once; its CSV has been read back and its plot found."""
    done = {}

    def rows_of(name, columns, plot=True):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            done[name] = run(name, folder, columns, plot)
        return done[name]

    return rows_of


def run(name, folder, columns, plot):
    digits = SAMPLE if name in ON_DIGITS else ()
    files = ("--csv", folder / "rows.csv", "--json", folder / "rows.json")
    script = ROOT / "benchmarks" / f"{name}.py"
    done = run_command(sys.executable, script, *TINY[name].split(), *digits, *files)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads((folder / "rows.json").read_text())
    with (folder / "rows.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(found)
    for line, row in zip(table, found, strict=True):
        assert tuple(line) == columns
        assert set(row) == set(columns)
        assert line == {key: "" if value is None else str(value) for key, value in row.items()}
    plots = {"rows.png", "rows.svg"} if plot else set()
    assert {path.name for path in folder.iterdir()} == {"rows.csv", "rows.json"} | plots
    assert all((folder / name).stat().st_size > 1_000 for name in plots)
    return found


# ---- what they share ----


def test_everything_is_timed_in_turn_after_a_warm_up():
    calls = []
    work = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = rows.in_turn(work, peers.CPU, rounds=2)
    assert calls == ["a", "b"] * 3
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


# ---- speed ----


def test_speed_has_a_row_for_each_method(measured):
    found = measured("speed", speed.COLUMNS)
    assert [(row["what"], row["population"]) for row in found] == [
        ("backprop-bare", ""),
        ("backprop", ""),
        ("example-float32", "4+4+4"),
        ("example-int8", "4+4+4"),
        ("batch-float32", 6),
    ]
    assert {row["backend"] for row in found} == {"eager"}


def test_a_step_is_set_beside_its_floor_and_the_bare_step_of_backprop(measured):
    bare, *_ = found = measured("speed", speed.COLUMNS)
    for row in found:
        step, floor = row["step_seconds"], row["floor_seconds"]
        assert row["p10"] <= step <= row["p90"]
        assert row["ratio_to_floor"] == pytest.approx(step / floor, rel=0.05)
        assert row["ratio_to_backprop"] == pytest.approx(step / bare["step_seconds"], rel=0.05)
    assert bare["ratio_to_backprop"] == 1


def test_speed_measures_the_population_of_the_preset():
    typed = mnist_eggroll.PRESETS["eggroll"]["population"]
    assert "+".join(map(str, speed.Config().example_population)) == typed


def test_a_floor_passes_every_member_through_the_layers_after_its_own():
    passed = {"second": 0, "third": 0}

    def layer(name):
        def count(x):
            passed[name] += len(x) // speed.BATCH
            return x

        return count

    x = speed.torch.zeros(4 * speed.BATCH, 2)
    speed.members_floor([layer("second"), layer("third")], (10, 7), x)()
    assert passed == {"second": 10, "third": 17}


# ---- memory ----


def test_memory_compares_every_population_with_backprop(measured):
    found = measured("memory", memory.COLUMNS)
    assert [(row["method"], row["population"]) for row in found] == [
        ("backprop", ""),
        ("example", 12),
        ("batch", 6),
        ("batch", 1_000_000),
        ("naive", 6),
        ("naive", 1_000_000),
    ]
    base = found[0]["peak_memory_mb"]
    for row in found[:-1]:
        assert row["ratio_to_backprop"] == pytest.approx(row["peak_memory_mb"] / base, abs=0.001)


def test_naive_es_is_refused_before_the_machine_would_swap(measured):
    *others, refused = measured("memory", memory.COLUMNS)
    assert "refused: 1001 GB" in refused["note"]
    assert refused["peak_memory_mb"] == refused["ratio_to_backprop"] == ""
    assert not any(row["note"] for row in others)


# ---- alignment ----


def test_alignment_covers_kinds_points_and_layers(measured):
    found = measured("alignment", alignment.COLUMNS)
    cases = [case for point in alignment.POINTS for case in alignment.cases(quick=True)]
    assert len(found) == len(cases) * len(alignment.LAYERS)
    assert {row["kind"] for row in found} == {"batch", "example"}
    for row in found:
        assert -1 <= row["cosine"] <= 1
        ratio = row["cosine"] / row["theory"]
        assert row["ratio_to_theory"] == pytest.approx(ratio, abs=0.002)


def test_the_whole_network_of_batch_members_points_as_the_number_of_pairs_says(measured):
    for row in measured("alignment", alignment.COLUMNS):
        if row["kind"] == "batch" and row["layer"] == "all":
            weights = 784 * 256 + 256 * 256 + 256 * 10
            expected = 1 / math.sqrt(1 + (weights + 1) / (row["members"] / 2))
            assert row["theory"] == pytest.approx(expected, abs=1e-5)


def test_example_members_point_as_theory_says(measured):
    found = measured("alignment", alignment.COLUMNS)
    example = [row for row in found if row["kind"] == "example" and row["point"] == "start"]
    assert example
    for row in example:
        assert row["ratio_to_theory"] == pytest.approx(1, abs=0.1)
        if row["layer"] == "3":  # all 16 rows of the head's
            assert row["cosine"] > 0.99 and row["theory"] == 1


# ---- peers ----


def test_peers_measures_both_kinds_at_equal_population(measured):
    found = measured("peers", peers.COLUMNS, plot=False)
    assert [row["library"] for row in found] == ["eggroll-batch", "eggroll-example"]
    for row in found:
        assert row["population"] == 30
        assert row["train_seconds"] >= 0.5 and row["generations"] > 1
        assert row["accuracy"] > 0.2
    assert found[0]["ratio_to_ours"] == 1
    ratio = found[1]["seconds_per_generation"] / found[0]["seconds_per_generation"]
    assert found[1]["ratio_to_ours"] == pytest.approx(ratio, rel=0.01)


def test_libraries_that_are_not_installed_are_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(peers, "version", lambda name: None)
    monkeypatch.setattr(peers, "measure_all", lambda config, names: [])
    monkeypatch.setattr(sys, "argv", ["peers.py"])
    peers.main()
    named = "eggroll-example, evosax, evotorch, evox, evox-lora"
    assert capsys.readouterr().out == f"not installed: {named} (type: {peers.INSTALL})\n"


@pytest.mark.parametrize("name", ["speed", "alignment", "peers"])
def test_what_cannot_be_measured_is_named_in_one_line(name):
    flag = {"speed": "rounds", "alignment": "draws", "peers": "rounds"}[name]
    done = run_command(sys.executable, ROOT / "benchmarks" / f"{name}.py", f"--{flag}", "0")
    assert done.returncode == 2
    assert done.stderr.strip() == f"{name}.py: error: --{flag} 0 is below 1 (type 1 or more)"
