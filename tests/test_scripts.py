"""mnist_eggroll.py: presets, the population that is used, the learning rate, and the signal."""

import re

import pytest
import torch
from conftest import ROOT, call
from runs import SMALL, assert_one_line, read_csv, read_json

import mnist_eggroll
from eggroll import NodePerturbation
from model import MLP

SCRIPT = "mnist_eggroll.py"


def train(out, *flags, code=0):
    done = call(SCRIPT, *flags, "--out-dir", out)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize("preset", mnist_eggroll.PRESETS)
def test_every_preset_trains(preset, tmp_path):
    flags = (preset, *SMALL, "--epochs", "1", "--population", "48", "--lr", "0.02")
    train(tmp_path, *flags, *(["--rank", "2"] if preset.startswith("eggroll") else []))
    method = preset.removesuffix("-gpu") if "eggroll" in preset else "node-perturbation"
    assert read_json(tmp_path / "summary.json")["method"] == method
    flags = read_json(tmp_path / "config.json")["flags"]
    activation = preset if preset in ("sign", "step", "argmax-k", "int8-round") else "gelu"
    assert flags["activation"] == activation


@pytest.mark.parametrize(
    ("flags", "population", "printed"),
    [
        ("eggroll --population 65", 65, "population 65 (32 + 32 + 1 by layer)"),
        ("eggroll --population 96 32 8", 136, "population 136 (96 + 32 + 8 by layer)"),
        ("eggroll-dense --population 37", 36, "population 36,"),
        ("node-perturbation --population 1000", 528, "population 528 (256 + 256 + 16 by layer)"),
    ],
)
def test_the_population_that_is_used_is_printed(flags, population, printed, tmp_path):
    few = ("--dataset", "mnist-sample", "--epochs", "1", "--batch-size", "3500")
    done = train(tmp_path, *flags.split(), *few)
    assert printed in done.stdout
    assert read_json(tmp_path / "summary.json")["population"] == population


@pytest.mark.parametrize(
    ("preset", "population", "flags", "expected"),
    [
        ("node-perturbation", 120, {}, 0.05),
        ("node-perturbation", 528, {"epochs": 3}, 0.1),
        ("node-perturbation", 120, {"lr": 0.07}, 0.07),
        ("eggroll-dense", 208, {}, 0.015 * 0.25**0.5),
        ("eggroll", 16_640, {"epochs": 10}, 0.005 * 0.5**0.3),
    ],
)
def test_the_learning_rate_follows_population_and_epochs_unless_it_is_typed(
    preset, population, flags, expected
):
    usual = mnist_eggroll.PRESETS[preset]
    config = mnist_eggroll.replace(usual, **flags)
    assert mnist_eggroll.scaled_lr(config, usual, population) == pytest.approx(expected)


def test_a_typed_learning_rate_is_taken_as_it_is_even_the_presets_own(tmp_path):
    flags = ("node-perturbation", *SMALL, "--population", "48", "--epochs", "1")
    for name, typed, expected in (("usual", (), 0.1 * 50 / 240), ("typed", ("--lr", "0.1"), 0.1)):
        train(tmp_path / name, *flags, *typed)
        rate = read_json(tmp_path / name / "config.json")["flags"]["lr"]
        assert rate == pytest.approx(expected, rel=0.01)


def test_a_scaled_learning_rate_is_kept_when_resuming(tmp_path):
    flags = ("node-perturbation", *SMALL, "--population", "48")
    train(tmp_path / "whole", *flags, "--schedule", "constant")
    train(tmp_path / "run", *flags, "--schedule", "constant")
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been killed at the end
    assert train(tmp_path / "run", "node-perturbation", "--resume").returncode == 0
    for name in ("whole", "run"):
        rows = read_csv(tmp_path / name / "metrics.csv")
        rates = [float(row["learning_rate"]) for row in rows]
        assert rates == pytest.approx([0.1 * 50 / 240] * 3, rel=0.01)


def test_a_fitness_from_a_file_trains_and_its_mistakes_are_its_own(tmp_path):
    (tmp_path / "own.py").write_text(
        "def margin(outputs, labels):\n"
        "    right = outputs.gather(-1, labels.expand(outputs.shape[:-1])[..., None])[..., 0]\n"
        "    return right - outputs.mean(-1)\n"
        "def wrong(outputs, labels):\n    return outputs\n"
        "def breaks(outputs, labels):\n    return outputs[12345]\n"
    )
    flags = ("node-perturbation", *SMALL, "--population", "48")
    train(tmp_path / "run", *flags, "--fitness", f"{tmp_path / 'own.py'}:margin", "--lr", "0.004")
    assert read_json(tmp_path / "run" / "summary.json")["test_accuracy"] > 0.3
    done = train(tmp_path / "a", *flags, "--fitness", f"{tmp_path / 'own.py'}:wrong", code=2)
    assert_one_line(done, "the fitness must return shape (257, 128) or (257,), got (257, 128, 10)")
    with pytest.raises(IndexError):
        call(SCRIPT, *flags, "--fitness", f"{tmp_path / 'own.py'}:breaks", "--out-dir", tmp_path)


@pytest.mark.parametrize("preset", ["eggroll", "eggroll-dense", "node-perturbation"])
def test_accuracy_is_smoothed_unless_smoothing_is_0(preset, tmp_path):
    flags = (preset, *SMALL, "--epochs", "1", "--population", "66", "--fitness", "accuracy")
    for smoothing in ("2", "0"):
        train(tmp_path / smoothing, *flags, "--smoothing", smoothing)
        fitness = [row["train_fitness"] for row in read_csv(tmp_path / smoothing / "metrics.csv")]
        assert 0 < float(fitness[-1]) <= 1  # in the fitness's units, smoothed or not
    train(tmp_path / "default", *flags)
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("2", "0", "default")]
    assert weights[0] == weights[2] != weights[1]


INVALID = {
    "--population many": "--population",
    "--population 0": "population must be at least 1, got 0",
    "--population 64 64": "has 2 counts, and the network has 3 layers that evolve",
    "--sigma 0": "sigma must be > 0, got 0.0",
    "--units 12": "units must be a power of two, got 12 (try 16)",
    "--fitness acuracy": "--fitness must be a built-in name or FILE.py:FUNCTION",
    "--fitness accuracy --smoothing-samples 7": "even number (try 8)",
    "--fitness accuracy --smoothing=-1": "smoothing tau must be > 0, got -1.0",
    "--rank 2": "Unrecognized options: --rank",
    "--dtype int8": "Unrecognized options: --dtype",
}


@pytest.mark.parametrize("flags", INVALID)
def test_an_invalid_flag_of_eggroll_ends_before_anything_is_written(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = call(SCRIPT, "node-perturbation", *SMALL, *flags.split(), "--out-dir", tmp_path / "run")
    assert done.returncode == 2 and INVALID[flags] in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_the_loop_is_in_sight_and_the_scripts_differ_by_their_method():
    texts = [(ROOT / name).read_text().splitlines() for name in ("mnist_backprop.py", SCRIPT)]
    places = [
        next(i for i, line in enumerate(lines) if re.search(r"\.backward\(", line))
        for lines in texts
    ]
    assert places[0] < 65 and places[1] < 125
    loops = [{line.strip() for line in lines[-25:]} for lines in texts]
    assert {"optimizer.step()", "schedule.step()", "run.log_epoch()"} <= loops[0] & loops[1]


def test_a_seed_gives_the_same_initial_weights_at_every_scale():
    small, usual = MLP(seed=3, init_scale=0.5), MLP(seed=3)
    for half, whole in zip(small.parameters(), usual.parameters(), strict=True):
        assert torch.equal(2 * half, whole)


def test_presets_are_objects_whose_estimators_are_the_librarys():
    presets = mnist_eggroll.PRESETS
    assert presets["node-perturbation"].es == NodePerturbation()
    assert next(iter(presets)) == "eggroll"
