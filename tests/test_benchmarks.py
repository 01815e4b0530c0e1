"""Tests that each benchmark runs at a small size and that its rows say what they promise."""

import json
import sys

import pytest
import torch
from conftest import ROOT, run_command
from runs import read_csv

from benchmarks import bounds
from eggroll import BlockLowRank, Evolution, LowRank, NodePerturbation, cross_entropy
from model import MLP

SAMPLE = ("--dataset", "mnist-sample")


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
    rows = rows_of("speed.py", tmp_path, "--device", "cpu", "--population", "32", "--rounds", "1")
    assert [row["what"] for row in rows] == [
        "backprop",
        "eggroll",
        "eggroll-dense",
        "node-perturbation",
        "node-perturbation-int8",
    ]
    assert [row["population"] for row in rows] == ["", 65, 32, 240, 240]
    for row in rows:
        step, bound = row["step_seconds"], row["bound_seconds"]
        assert row["ratio_to_bound"] == pytest.approx(step / bound, rel=0.02)
        to_backprop = step / rows[0]["step_seconds"]
        assert row["ratio_to_backprop"] == pytest.approx(to_backprop, rel=0.02)


def counts(estimator):
    """Return the arithmetic of a step of the experiment's MLP, of batch 128."""
    evolution = Evolution(MLP(), cross_entropy, estimator)
    evolution.inspect(torch.zeros(128, 784))
    return bounds.evolution(evolution, 128)


FORWARD = 128 * (784 * 256 + 256 * 256 + 256 * 10)


def test_backprop_cannot_avoid_its_products_but_for_the_first_inputs_gradient():
    found = bounds.backprop([(784, 256), (256, 256), (256, 10)], 128)
    assert found == (3 * FORWARD - 128 * 784 * 256, 128 * (256 + 256), False)


def test_members_of_eggroll_share_what_follows_their_direction():
    found = counts(BlockLowRank((320, 640, 30), rank=2, units=16))  # 20, 40 and 30 directions
    noise = 128 * 2 * (20 * 784 + 40 * 256 + 30 * 256)  # x times B
    blocks = 128 * (20 * 256 * 256 + 40 * 256 * 10)
    after = 128 * 320 * 256 * 10
    estimate = 2 * (20 * 784 * 256 + 40 * 256 * 256 + 30 * 256 * 10)
    activations = 128 * (2 * 256 + 20 * 256 + 40 * 256 + 320 * 256)
    assert found == (FORWARD + noise + blocks + after + estimate, activations, False)


def test_node_perturbation_has_neither_noise_to_multiply_nor_a_sum_over_members():
    found = counts(NodePerturbation((96, 128, 16)))  # 6, 8 and 16 directions
    products = 128 * (6 * 256 * 256 + 8 * 256 * 10 + 96 * 256 * 10)
    activations = 128 * (2 * 256 + 6 * 256 + 8 * 256 + 96 * 256)
    assert found == (2 * FORWARD + products, activations, False)


def test_members_of_all_layers_share_the_first_product_alone():
    found = counts(LowRank(6))
    products = 128 * 784 * 256 + 6 * 128 * (256 * 256 + 256 * 10)
    noise = 128 * (3 * 784 + 6 * (256 + 256)) + 6 * 128 * (256 + 256 + 10)
    estimate = 3 * (784 * 256 + 256 * 256 + 256 * 10)
    assert found == (products + noise + estimate, 6 * 128 * (256 + 256), False)


def test_a_bound_is_at_the_best_rate_of_each_operation():
    rates = {("product", 10): 2.0, ("product", 40): 4.0, ("activation", 2): 1.0}
    each = bounds.seconds_of_each(rates)
    assert each == {"product": 0.1, "activation": 0.5}
    assert bounds.Counts(30, 4).seconds(each) == pytest.approx(5)
    each["int8 product"] = 0.2
    assert bounds.Counts(30, 0, True).seconds(each) == pytest.approx(6)


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


def test_gpu_script_does_not_start_without_a_card_or_mnist(tmp_path):
    # a "python" that says that there is a CUDA card
    env = {"OUT": str(tmp_path / "out"), "MNIST_DIR": str(tmp_path), "PYTHON": "true"}
    done = run_command(ROOT / "benchmarks" / "gpu.sh", env=env)
    assert done.returncode == 2 and "MNIST_DIR" in done.stderr
    done = run_command(ROOT / "benchmarks" / "gpu.sh", env=env | {"PYTHON": "false"})
    assert done.returncode == 2 and "no CUDA card" in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_script_continues_after_a_stage_that_fails(tmp_path):
    env = {"OUT": str(tmp_path), "PYTHON": "false"}
    done = run_command(ROOT / "benchmarks" / "gpu.sh", "--tiny", env=env)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("failed: speed-128 eggroll+128-seed0 speed")
    assert "report" in done.stdout
