"""The scripts as a user runs them: what a run leaves, flags, help, saved weights."""

import os
import re
import shutil

import pytest
import torch
from conftest import SAMPLE, call
from runs import (
    BACKPROP,
    BOTH,
    EACH,
    EGGROLL,
    KINDS,
    STEPS,
    assert_one_line,
    read_csv,
    read_json,
    settings,
    train,
)
from safetensors.torch import load_file

import mnist_backprop
import mnist_eggroll
from lab import cli, progress, training
from lab.runlog import SUMMARY_KEYS

# ---- what a run leaves ----


@EACH
def test_a_run_leaves_its_files(kind, tmp_path):
    folder = tmp_path / "run"
    done = train(kind, folder)
    config = read_json(folder / "config.json")
    assert config["flags"]["hidden_dim"] == 32 and config["flags"]["lr"] > 0
    expected = "compile" if "int8" in kind and shutil.which("g++") else "eager"
    assert (config["flags"]["backend"], config["flags"]["threads"]) == (expected, 1)
    assert {"python", "torch"} <= set(config["versions"])
    summary = read_json(folder / "summary.json")
    assert tuple(summary) == SUMMARY_KEYS
    assert summary["status"] == "finished" and summary["dataset"] == "mnist-sample"
    assert 0.1 < summary["test_accuracy"] < 1 and summary["train_seconds"] > 0
    assert (summary["epochs"], summary["steps"]) == (2, 2 * STEPS)
    rows = read_csv(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert float(rows[-1]["test_accuracy"]) == summary["test_accuracy"]
    assert float(rows[-1]["forward_passes_per_image"]) == summary["forward_passes_per_image"]
    assert load_file(folder / "model.safetensors")["layers.1.weight"].shape == (32, 32)
    assert (folder / "checkpoint.pt").exists()
    assert "mnist-sample" in (folder / "train.log").read_text() and "NOT the full" in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert all(word in last for word in ("accuracy", " s of training", "MB", str(folder)))
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("kind", "population", "per_step", "passes"),
    [
        ("backprop", None, None, 2),
        ("example members", 12, 12 * 128, 2 * 13),
        ("batch members", 16, 16, 2 * 17),
    ],
)
def test_the_summary_counts_members_and_forward_passes(
    kind, population, per_step, passes, tmp_path
):
    """A batch member sees every image of a batch, an example member one of them."""
    train(kind, tmp_path)
    summary = read_json(tmp_path / "summary.json")
    assert (summary["population"], summary["members_per_step"]) == (population, per_step)
    assert summary["forward_passes_per_image"] == passes


def test_seconds_to_the_goal_are_those_of_the_first_evaluation_there(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "GOAL", 0.6)
    train("backprop", tmp_path / "reached", "--epochs", "3")
    rows = read_csv(tmp_path / "reached" / "metrics.csv")
    first = next(row for row in rows if float(row["test_accuracy"]) >= 0.6)
    reached = read_json(tmp_path / "reached" / "summary.json")["seconds_to_97_5"]
    assert reached == float(first["train_seconds"]) and first is not rows[-1]
    monkeypatch.setattr(training, "GOAL", 0.975)
    train("backprop", tmp_path / "missed")
    assert read_json(tmp_path / "missed" / "summary.json")["seconds_to_97_5"] is None


def test_a_loss_that_was_handed_in_is_asked_about_and_lost_digits_are_named(tmp_path):
    (tmp_path / "own.py").write_text(
        "def errors(outputs, labels):\n    return (outputs.argmax(-1) != labels).float()\n"
    )
    wrong_way = ("--fitness", f"{tmp_path / 'own.py'}:errors", "--population", "48")
    done = train("example members", tmp_path / "run", *wrong_way)
    assert done.stdout.count("is lower better") == 1
    assert re.search(r"epoch 2/2 .*never right: [\d, ]+", done.stdout)
    done = train("example members", tmp_path / "right", "--population", "48")
    assert "lower" not in done.stdout


GROUPS = [
    ("backprop", "--optimizer adam --lr 0.001 --weight-decay 0.01"),
    ("backprop", "--momentum 0.8 --lr-schedule cosine --lr 0.05 --bias --label-smoothing 0"),
    ("backprop", "--lr-schedule constant --batch-size 100 --eval-every 2 --quiet"),
    ("backprop", "--activation relu --optimizer adamw --lr 0.002 --lr-schedule onecycle"),
    ("example members", "--train-on-all --seed 7 --lr-schedule linear --label-smoothing 0.2"),
    ("example members", "--bias --antithetic --chunk-size 5 --sigma 0.01"),
    ("example members", "--fitness accuracy --sigma 0.05 --antithetic --population 48"),
    ("example members", "--shaping sign --lr 0.02 --population 48"),
    ("example members", "--activation argmax-k --population 48"),
    ("example members", "--activation sign --population 48 --batch-size 64"),
    ("batch members", "--rank 3 --bias --shaping centered-rank --population 64"),
    ("batch members", "--fitness accuracy --shaping sign --sigma 0.05 --population 64"),
    ("batch members", "--shaping none --no-antithetic --population 63 --lr 0.005"),
    (
        "batch members",
        "--optimizer adam --lr 0.003 --fitness cross-entropy --temperature 1.5 --population 64",
    ),
    ("batch members", "--dtype bfloat16 --population 64"),
    ("one-layer members", "--rank 2 --population 96 --lr 0.03"),
    ("int8", "--fitness accuracy --antithetic --population 48 --sigma 0.05"),
    ("int8", "--momentum 0.5 --lr 0.05 --lr-schedule linear --temperature 2"),
]


@pytest.mark.parametrize(("kind", "flags"), GROUPS)
def test_every_group_of_flags_trains(kind, flags, tmp_path):
    done = train(kind, tmp_path, *flags.split())
    summary = read_json(tmp_path / "summary.json")
    assert summary["test_accuracy"] > 0.14
    rows = read_csv(tmp_path / "metrics.csv")
    if "--eval-every" in flags:
        assert rows[1]["test_accuracy"] == "" and rows[2]["test_accuracy"]
    if "--train-on-all" in flags:
        assert summary["validation_accuracy"] is None
    if "--quiet" in flags:
        assert done.stdout == done.stderr == "" and (tmp_path / "train.log").stat().st_size


@EACH
def test_the_same_seed_gives_the_same_bits_and_another_does_not(kind, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(kind, tmp_path / name, "--seed", seed, "--epochs", "1")
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_chunk_of_the_population_changes_no_bit(tmp_path):
    for kind in ("example members", "batch members", "int8"):
        for size in (1, 1000):
            flags = ("--population", "192", "--chunk-size", size, "--epochs", "1")
            train(kind, tmp_path / f"{kind}{size}", *flags)
        one, other = (tmp_path / f"{kind}{size}" / "model.safetensors" for size in (1, 1000))
        assert one.read_bytes() == other.read_bytes()


def test_progress_names_fitness_accuracy_and_the_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    lines = train("example members", tmp_path).stdout
    wanted = rf"step 30 of {2 * STEPS}: fitness -\d\.\d+, batch accuracy \d+\.\d%, about \d+ s left"
    assert re.search(wanted, lines)


# ---- flags ----


@pytest.mark.parametrize(
    ("script", "module"), [(BACKPROP, mnist_backprop), (EGGROLL, mnist_eggroll)]
)
def test_help_fits_three_screens_and_names_every_flag(script, module, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    done = call(script, "--help")
    assert done.returncode == 0 and len(done.stdout.splitlines()) <= 150
    for name in cli.flat(module.Config()):
        assert "--" + name.replace("_", "-") in done.stdout
    assert "training options" in done.stdout and "preset" in done.stdout


@BOTH
def test_print_config_prints_every_flag_and_does_nothing(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = settings(script, "--lr", "0.03")
    module = mnist_eggroll if script == EGGROLL else mnist_backprop
    assert flags["lr"] == 0.03
    assert set(flags) == set(cli.flat(module.Config())) - set(cli.ABOUT_THIS_CALL)
    unset = {name for name, value in flags.items() if value is None}
    assert unset <= {"data_dir", "init_from", "update", "smoothing_samples"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("typed", "printed"),
    [
        ("1000", "population 528 (256 + 256 + 16 by layer)"),
        ("134", "population 134 ("),
        ("50", "population 50 ("),
        ("64+64+16", "population 144 (64 + 64 + 16 by layer)"),
    ],
)
def test_the_population_that_is_used_is_printed(typed, printed, tmp_path):
    flags = ("--hidden-dim", "256", "--epochs", "1", "--population", typed, "--batch-size", "3500")
    done = train("example members", tmp_path, *flags)
    assert printed in done.stdout
    used = int(printed.split()[1])
    assert read_json(tmp_path / "summary.json")["population"] == used


BAD_FLAGS = [
    (EGGROLL, "--population many", "--population many is no number (type 144 or 64+64+16)"),
    (EGGROLL, "--population 12.5", "is no number"),
    (EGGROLL, "--population 64++16", "is no number"),
    (EGGROLL, "--population 64+64", "names 2 layers, and 3 evolve"),
    (EGGROLL, "--population 300+64+16", "try 256+64+16"),
    (EGGROLL, "--population 0", "--population 0 is below 1"),
    (EGGROLL, "--population=-400", "--population -400 is below 1"),
    (EGGROLL, "--population 64+0+16", "is below 1"),
    (EGGROLL, "--population 2", "try 3"),
    (EGGROLL, "--members batch --population=-2", "population -2 is below 1"),
    (EGGROLL, "--members batch --population 64+64+16", "type their sum"),
    (EGGROLL, "--members batch --population 4095", "is odd; antithetic pairs need an even number"),
    (EGGROLL, "--members batch --population 4095", "try 4096"),
    (EGGROLL, "--antithetic --population 51", "try 52"),
    (EGGROLL, "--members batch --rank 0", "--rank 0 is below 1"),
    (EGGROLL, "--sigma 0", "--sigma 0.0 is not above 0"),
    (EGGROLL, "--shaping z-score", "try none, sign"),
    (EGGROLL, "--backend fused", "backend fused is for antithetic batch members"),
    (EGGROLL, "--fitness acuracy", "--fitness acuracy is not known"),
    (EGGROLL, "--dtype int8 --fitness own.py:f", "is not for --dtype int8 (try accuracy)"),
    (EGGROLL, "--chunk-size=-1", "--chunk-size -1 is negative"),
    (EGGROLL, "--smoothing=-1", "--smoothing -1.0 is negative"),
    (EGGROLL, "--fitness accuracy --smoothing-samples 7", "no antithetic pairs (try 8)"),
    (BACKPROP, "--backend fused", "try compile"),
    (BACKPROP, "--epochs 0", "--epochs 0 is below 1"),
    (BACKPROP, "--threads 0", "--threads 0 is below 1"),
    (BACKPROP, "--lr 0", "--lr 0.0 is not above 0"),
    (BACKPROP, "--momentum=-1", "--momentum -1.0 is negative"),
    (BACKPROP, "--batch-size 5000", "--batch-size 5000 is more than"),
    (BACKPROP, "--device cuda", "try --device cpu"),
    (BACKPROP, "--resume", "--resume needs --out-dir"),
    (BACKPROP, "--seed=-1", "--seed -1 is negative"),
    (BACKPROP, f"--seed {2**32}", "is too large"),
    (BACKPROP, "--label-smoothing 1", "--label-smoothing 1.0 is outside"),
]


@pytest.mark.parametrize(("script", "flags", "message"), BAD_FLAGS)
def test_a_bad_flag_gets_one_line_and_exit_code_2(script, flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line(call(script, *SAMPLE, *flags.split()), f"{script}: error: ", message)
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (EGGROLL, "--popultion 64", "--population"),
        (BACKPROP, "--epochs many", "--epochs"),
        (BACKPROP, "--dataset cifar", "mnist-sample"),
        (BACKPROP, "--sigma 0.1", "--sigma"),
    ],
)
def test_a_flag_that_cannot_be_read_is_explained(script, flags, message):
    done = call(script, *flags.split())
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


# what to type for each (flag, why) of the rules
WITHOUT_EFFECT = {
    ("momentum", "with --optimizer adam or adamw"): "--optimizer adam --momentum 0.5",
    ("data_dir", "with --dataset mnist-sample"): "--dataset mnist-sample --data-dir x",
    ("overwrite", "without --out-dir"): "--overwrite",
    ("overwrite", "with --resume"): "--overwrite --resume --out-dir run",
    ("perturb", "with example members"): "--perturb one",
    ("rank", "with example members"): "--rank 2",
    ("units", "with batch members"): "--members batch --units 32",
    ("update", "without --dtype int8"): "--update votes",
    ("dtype", "with example members"): "--dtype bfloat16",
    ("shaping", "with --update votes"): "--dtype int8 --update votes --shaping none",
    ("members", "with --dtype int8"): "--dtype int8 --members batch",
    ("bias", "with --dtype int8"): "--dtype int8 --bias",
    ("activation", "with --dtype int8"): "--dtype int8 --activation relu",
    ("optimizer", "with --dtype int8"): "--dtype int8 --optimizer adam",
    ("weight_decay", "with --dtype int8"): "--dtype int8 --weight-decay 0.1",
    ("smoothing", "with the cross-entropy of --dtype int8"): "--dtype int8 --smoothing 2",
    ("smoothing_samples", "without smoothing"): "--smoothing-samples 8",
    ("temperature", "without --fitness cross-entropy"): "--fitness accuracy --temperature 3",
    ("label_smoothing", "without --fitness cross-entropy"): (
        "--fitness accuracy --label-smoothing 0.1"
    ),
}
RULES = [
    (name, why) for names, _, why in (*cli.NO_EFFECT, *mnist_eggroll.NO_EFFECT) for name in names
]


@pytest.mark.parametrize(("name", "why"), RULES)
def test_a_flag_without_effect_is_refused(name, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if why == "with --resume":
        train("example members", tmp_path / "run", "--epochs", "1")
    done = call(EGGROLL, "--print-config", *WITHOUT_EFFECT[name, why].split())
    flag = name.replace("_", "-")
    assert_one_line(done, f"error: --{flag}", f"has no effect {why} (leave it out)")


# ---- saved weights ----


@pytest.mark.parametrize(
    ("first", "then"),
    [("backprop", "example members"), ("example members", "backprop"), ("int8", "int8 by votes")],
)
def test_a_run_starts_from_the_weights_of_another(first, then, tmp_path):
    train(first, tmp_path / "first")
    start_from = ("--init-from", tmp_path / "first" / "model.safetensors")
    train(then, tmp_path / "then", "--epochs", "1", *start_from)
    ends = read_csv(tmp_path / "first" / "metrics.csv")[-1]["test_accuracy"]
    begins = read_csv(tmp_path / "then" / "metrics.csv")[0]["test_accuracy"]
    assert ends == begins
    if then == "backprop":  # what a run started from is not needed to go on with it
        (tmp_path / "first" / "model.safetensors").unlink()
        (tmp_path / "then" / "summary.json").unlink()
        train(then, tmp_path / "then", "--epochs", "1", *start_from, "--resume")
        assert (tmp_path / "then" / "summary.json").exists()


def test_weights_of_another_network_are_refused_in_one_line(tmp_path):
    train("backprop", tmp_path / "run", "--epochs", "1")
    start_from = ("--init-from", tmp_path / "run" / "model.safetensors")
    for kind, flags in (
        ("backprop", ("--hidden-dim", "64")),
        ("int8", ()),
        ("backprop", ("--bias",)),
    ):
        done = train(kind, tmp_path / "other", *start_from, *flags, code=2)
        assert_one_line(done, "holds another network: layers.0")
    (tmp_path / "rubbish").write_text("rubbish")
    for name in ("rubbish", "nowhere"):
        done = train("backprop", tmp_path / "other", "--init-from", tmp_path / name, code=2)
        assert_one_line(done, f"{name} cannot be read")


@pytest.mark.parametrize("kind", ["backprop", "batch members", "int8"])
def test_evaluate_finds_the_accuracy_that_the_run_ended_with(kind, tmp_path):
    train(kind, tmp_path, *(["--bias"] if kind == "backprop" else []))
    done = call("evaluate.py", tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = read_json(tmp_path / "summary.json")["test_accuracy"]
    assert f"test accuracy {accuracy:.2%}, cross-entropy " in done.stdout


def test_evaluate_names_what_it_cannot_read(tmp_path):
    assert_one_line(call("evaluate.py", tmp_path / "nowhere"), "nowhere")
    train("backprop", tmp_path, "--epochs", "1")
    (tmp_path / "model.safetensors").write_text("rubbish")
    assert_one_line(call("evaluate.py", tmp_path), "model.safetensors cannot be read")


# ---- with the full MNIST, where MNIST_DIR names it ----


@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR is not set")
@pytest.mark.parametrize(("kind", "least"), [("backprop", 0.95), ("example members", 0.9)])
def test_one_epoch_of_the_full_mnist_is_learned(kind, least, tmp_path):
    script, *own = KINDS[kind]
    done = call(script, "--epochs", "1", *own, "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "summary.json")["test_accuracy"] > least
