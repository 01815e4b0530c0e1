"""Tests that each benchmark runs at a small size and that its rows say what they promise."""

import json
import shutil
import sys
import tarfile

import pytest
import torch
from conftest import ROOT, run_command
from reports import write_run
from runs import read_csv
from torch import nn

from benchmarks import bounds, steps
from benchmarks.baselines import Twins
from eggroll import BlockLowRank, Evolution, LowRank, NodePerturbation, cross_entropy
from eggroll.blocks import Draw, Layer
from experiment.errors import UserError
from model import MLP

SAMPLE = ("--dataset", "mnist-sample")
INT8 = "node-perturbation-int8"


def rows_of(benchmark, folder, *flags):
    rows, plot = folder / "rows.json", folder / "rows.png"
    files = ("--csv", folder / "rows.csv", "--json", rows)
    done = run_command(sys.executable, ROOT / "benchmarks" / benchmark, *flags, *files)
    assert done.returncode == 0, done.stderr
    found = json.loads(rows.read_text())
    assert plot.exists() and len(read_csv(folder / "rows.csv")) == len(found)
    assert all(row["torch"] and row["device"].startswith("cpu") for row in found)
    return found


def test_speed_compares_each_method_with_its_lower_bound_and_with_backprop(tmp_path):
    names = ["backprop", "eggroll:32", "eggroll-dense:32", "node-perturbation", f"{INT8}:33"]
    methods = ("--methods", *names, "--rounds", "1")
    rows = rows_of("speed.py", tmp_path, "--device", "cpu", *methods)
    assert [row["what"] for row in rows] == names
    assert [row["population"] for row in rows] == ["", 65, 32, 240, 33]
    for row in rows:
        step, bound = row["step_seconds"], row["bound_seconds"]
        assert row["ratio_to_bound"] == pytest.approx(step / bound, rel=0.02)
        to_backprop = step / rows[0]["step_seconds"]
        assert row["ratio_to_backprop"] == pytest.approx(to_backprop, rel=0.02)


@pytest.mark.parametrize("name", ["genetic", "eggroll:many", "eggroll:"])
def test_unknown_methods_are_named(name):
    with pytest.raises(UserError, match=f"METHOD:POPULATION.*got {name}"):
        steps.make(name, torch.device("cpu"))


def test_ceilings_has_a_row_for_each_operation(tmp_path):
    rows = rows_of("ceilings.py", tmp_path, "--device", "cpu")
    assert {row["what"] for row in rows} >= {"product", "activation", "byte copied", "launch"}
    assert all(0 < row["seconds_of_one"] < 1e-3 for row in rows)


def test_profiles_list_the_operations_of_each_method(tmp_path):
    script, file = ROOT / "benchmarks" / "profiles.py", tmp_path / "profiles.txt"
    flags = ("--methods", "backprop", "eggroll:32", "--device", "cpu", "--file", file)
    assert run_command(sys.executable, script, *flags).returncode == 0
    text = file.read_text()
    assert text.count("20 steps, cpu") == 2 and "aten::mm" in text


def counts(estimator):
    """Return the arithmetic of a step of the experiment's MLP, of batch 128."""
    evolution = Evolution(MLP(), cross_entropy, estimator)
    evolution.inspect(torch.zeros(128, 784))
    return bounds.evolution(evolution, 128)


FORWARD = 128 * (784 * 256 + 256 * 256 + 256 * 10)


def test_backprop_cannot_avoid_its_products_but_for_the_first_inputs_gradient():
    found = bounds.backprop([(784, 256), (256, 256), (256, 10)], 128)
    assert found[:3] == (3 * FORWARD - 128 * 784 * 256, 0, 128 * (256 + 256))


def test_members_of_eggroll_share_what_follows_their_direction():
    found = counts(BlockLowRank((320, 640, 30), rank=2, units=16))  # 20, 40 and 30 directions
    noise = 128 * 2 * (20 * 784 + 40 * 256 + 30 * 256)  # x times B
    blocks = 128 * (20 * 256 * 256 + 40 * 256 * 10)
    after = 128 * 320 * 256 * 10
    estimate = 2 * (20 * 784 * 256 + 40 * 256 * 256 + 30 * 256 * 10)
    activations = 128 * (2 * 256 + 20 * 256 + 40 * 256 + 320 * 256)
    assert found[:3] == (FORWARD + estimate, noise + blocks + after, activations)


def test_node_perturbation_has_neither_noise_to_multiply_nor_a_sum_over_members():
    found = counts(NodePerturbation((96, 128, 16)))  # 6, 8 and 16 directions
    products = 128 * (6 * 256 * 256 + 8 * 256 * 10 + 96 * 256 * 10)
    activations = 128 * (2 * 256 + 6 * 256 + 8 * 256 + 96 * 256)
    assert found[:3] == (2 * FORWARD, products, activations)


def test_members_of_all_layers_share_the_first_product_alone():
    found = counts(LowRank(300))  # in two draws
    products = 300 * 128 * (256 * 256 + 256 * 10)
    noise = 128 * (150 * 784 + 300 * (256 + 256)) + 300 * 128 * (256 + 256 + 10)
    estimate = 150 * (784 * 256 + 256 * 256 + 256 * 10)
    activations = 128 * (2 * 256 + 300 * (256 + 256))
    assert found[:3] == (FORWARD + estimate, products + noise, activations)


def test_a_bound_is_at_the_best_rate_of_each_operation():
    rates = {("product", 10): 2.0, ("product", 40): 4.0, ("activation", 2): 1.0}
    each = bounds.seconds_of_each(rates)
    assert each == {"product": 0.1, "activation": 0.5}
    assert bounds.Counts(20, 10, 4).seconds(each) == pytest.approx(5)
    each["bfloat16 product"] = 0.2
    kinds = ("product", "bfloat16 product")
    assert bounds.Counts(20, 10, 4, kinds).seconds(each) == pytest.approx(6)


@pytest.mark.parametrize("compiler", ["there", "missing"])
def test_every_operation_has_a_rate(compiler, monkeypatch):
    if compiler == "missing":
        monkeypatch.setitem(vars(bounds.CEILINGS), "library", None)
    calls = bounds.operations(torch.device("cpu"))
    kinds = {kind for kind, _ in calls}
    assert kinds == {"product", "int8 product", "activation"}
    assert len(calls) == (5 if bounds.CEILINGS.library else 3)
    for call in calls.values():
        call()


def test_alignment_is_what_theory_says(tmp_path):
    rows = rows_of("alignment.py", tmp_path, "--device", "cpu", "--quick", *SAMPLE)
    assert {row["estimator"] for row in rows} == {"eggroll", "eggroll-dense", "node-perturbation"}
    assert [row["layer"] for row in rows[:4]] == ["1", "2", "3", "all"]
    for row in rows:
        if (row["point"], row["layer"]) == ("start", "all"):
            assert row["ratio_to_theory"] == pytest.approx(1, abs=0.15)
            assert row["norm"] == pytest.approx(row["norm_in_theory"], rel=0.2)


def test_frontier_has_a_row_for_each_method_and_skips_finished_runs(tmp_path):
    flags = ("--tiny", *SAMPLE, "--device", "cpu", "--methods", "backprop", "eggroll")
    command = (sys.executable, ROOT / "benchmarks" / "frontier.py", *flags, "--out-dir", tmp_path)
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "frontier.csv")
    assert [row["method"] for row in rows] == ["backprop", "eggroll"]
    assert float(rows[0]["test_accuracy"]) > 50
    assert "| 97.5 % |" in (tmp_path / "frontier.md").read_text()
    checkpoint = next(tmp_path.glob("runs/backprop*/seed0/checkpoint.pt"))
    written = checkpoint.stat().st_mtime_ns
    assert run_command(*command).returncode == 0
    assert checkpoint.stat().st_mtime_ns == written


def test_ablations_have_a_row_for_each_value_and_skip_finished_runs(tmp_path):
    flags = ("--tiny", *SAMPLE, "--threads", "1", "--settings", "baseline", "--out-dir", tmp_path)
    command = (sys.executable, ROOT / "benchmarks" / "ablations.py", *flags)
    assert run_command(*command).returncode == 0
    rows = read_csv(tmp_path / "ablations.csv")
    assert [row["value"] for row in rows] == ["mean", "unperturbed", "twin"]
    assert len({row["validation_accuracy"] for row in rows}) == 3
    assert float(rows[0]["memory_mb"]) > 100
    assert (tmp_path / "ablations.png").exists()
    written = [path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/seed0/checkpoint.pt")]
    assert len(written) == 3 and run_command(*command).returncode == 0
    assert written == [p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/seed0/checkpoint.pt")]


def test_the_time_of_ten_epochs_follows_from_an_interrupted_run(tmp_path):
    write_run(tmp_path, "eggroll", 0, 0.975, steps=938, population=39_000, train_seconds=200.0)
    (tmp_path / "eggroll" / "seed0").rename(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["flags"] |= {"batch_size": 128, "smoothing": 0}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    done = run_command(sys.executable, ROOT / "benchmarks" / "population.py", tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = read_csv(tmp_path / "population.csv")
    assert row["seconds_of_ten_epochs"] == "1000" and row["epochs"] == "2.0"
    assert row["signal"] == "accuracy" and row["test_accuracy"] == "97.50"
    path = tmp_path / "run" / "summary.json"
    summary = json.loads(path.read_text())
    for epochs, taken, shown in ((1, 600, "97.50 after 1"), (0, 200, None)):
        path.write_text(json.dumps(summary | {"epochs": epochs, "steps": taken}))
        done = run_command(sys.executable, ROOT / "benchmarks" / "population.py", tmp_path)
        if shown:
            assert read_csv(tmp_path / "population.csv")[0]["test_accuracy"] == shown
    assert done.returncode == 2 and "has finished an epoch" in done.stderr
    done = run_command(sys.executable, ROOT / "benchmarks" / "population.py", tmp_path / "none")
    assert done.returncode == 2 and "expected a folder of runs" in done.stderr


def test_twins_estimate_the_gradient_from_pairs_of_opposite_members():
    layer = Layer(nn.Linear(6, 16, bias=False))
    draw = Draw((0,), 0, 4, 2, 0, 0, units=8)
    noise = Twins(8).sample(layer, draw, torch.Generator().manual_seed(0))
    assert torch.equal(noise.a[:2], -noise.a[2:]) and torch.equal(noise.b[:2], noise.b[2:])


def test_gpu_script_does_not_start_without_a_card_or_mnist(tmp_path):
    # a "python" that says that there is a CUDA card
    env = {"OUT": str(tmp_path / "out"), "MNIST_DIR": str(tmp_path), "PYTHON": "true"}
    done = run_command(ROOT / "benchmarks" / "gpu.sh", env=env)
    assert done.returncode == 2 and "MNIST_DIR" in done.stderr
    done = run_command(ROOT / "benchmarks" / "gpu.sh", env=env | {"PYTHON": "false"})
    assert done.returncode == 2 and "no CUDA card" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not shutil.which("timeout"), reason="gpu.sh needs GNU's timeout")
def test_gpu_script_continues_after_a_stage_that_fails(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *ceilings*) exit 3 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    done = run_command(
        ROOT / "benchmarks" / "gpu.sh",
        "--tiny",
        env={"OUT": str(out), "PYTHON": str(python)},
        timeout=600,
    )
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "failed: ceilings", done.stdout
    for name in ("steps", "more-steps", "memory", "more-memory"):
        assert json.loads((out / f"{name}.json").read_text())
    rows = {row["row"] for row in read_csv(out / "runs" / "summary.csv")}
    methods = {"backprop", "eggroll", "node-perturbation", INT8}
    raw = {"eggroll+unsmoothed-accuracy", "eggroll-dense+unsmoothed-accuracy"}
    assert rows == methods | {"eggroll-dense", "eggroll+accuracy"} | raw
    with tarfile.open(out / "results.tar.gz") as archive:
        names = archive.getnames()
    assert {"./profiles.txt", "./steps.csv", "./runs/summary.csv"} <= set(names)
    assert not any("checkpoint" in name for name in names)
