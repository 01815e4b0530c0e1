"""Both scripts as a user runs them: every group of flags, bad input, Ctrl-C, resumption."""

import csv
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SAMPLE, run_command, run_script
from safetensors.torch import load_file

from lab.runlog import SUMMARY_KEYS

BACKPROP, EGGROLL = "mnist_backprop.py", "mnist_eggroll.py"
BOTH = pytest.mark.parametrize("script", [BACKPROP, EGGROLL])
SMALL = (*SAMPLE, "--hidden-dim", "32", "--epochs", "2")
POPULATION = ("--population", "64")
PAPER = ("--estimator", "population")
METHODS = ("backprop", "eggroll-per-example", "eggroll")


def flags_for(script, *flags):
    return [*SMALL, *(POPULATION if script == EGGROLL else ()), *flags]


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def train(script, out, *flags, code=0, **options):
    done = run_script(script, *flags_for(script, "--out-dir", out, *flags), **options)
    assert done.returncode == code, done.stderr
    return done


@BOTH
def test_a_run_leaves_its_files(script, tmp_path):
    done = train(script, tmp_path / "run")
    folder = tmp_path / "run"
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["hidden_dim"] == 32 and config["flags"]["lr"] > 0
    assert {"python", "torch"} <= set(config["versions"])
    summary = json.loads((folder / "summary.json").read_text())
    assert tuple(summary) == SUMMARY_KEYS
    assert summary["status"] == "finished" and summary["dataset"] == "mnist-sample"
    assert 0.1 < summary["test_accuracy"] < 1 and summary["train_seconds"] > 0
    rows = read_csv(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert float(rows[-1]["test_accuracy"]) == summary["test_accuracy"]
    weights = load_file(folder / "model.safetensors")
    assert weights["layers.1.weight"].shape == (32, 32)
    assert (folder / "checkpoint.pt").exists()
    log = (folder / "train.log").read_text()
    assert "mnist-sample" in log and "mnist-sample" in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert all(word in last for word in ("accuracy", " s of training", "MB", str(folder)))
    assert "Traceback" not in done.stderr


GROUPS = [
    (BACKPROP, ["--optimizer", "adam", "--lr", "0.001", "--weight-decay", "0.01"]),
    (BACKPROP, ["--momentum", "0.9", "--lr-schedule", "cosine", "--lr", "0.05", "--bias"]),
    (BACKPROP, ["--average-weights", "ema", "--ema-decay", "0.9", "--init", "orthogonal"]),
    (BACKPROP, ["--lr-decay", "0.5", "--batch-size", "100", "--eval-every", "2", "--quiet"]),
    (
        EGGROLL,
        [*PAPER, "--rank", "3", "--bias", "--shaping", "centered-rank", "--chunk-size", "1000"],
    ),
    (EGGROLL, [*PAPER, "--fitness", "accuracy", "--shaping", "sign", "--sigma", "0.05"]),
    (
        EGGROLL,
        [*PAPER, "--shaping", "none", "--lr", "0.01", "--momentum", "0", "--sigma-decay", "0.9"],
    ),
    (EGGROLL, [*PAPER, "--optimizer", "adam", "--lr", "0.003", "--winsorize", "0.05"]),
    (EGGROLL, [*PAPER, "--layers-per-member", "one", "--sampling", "batch-subspace"]),
    (EGGROLL, [*PAPER, "--population-growth", "3", "--clip-norm", "20", "--lr", "0.01"]),
    (EGGROLL, [*PAPER, "--preset", "gpu", "--lr", "0.01"]),
    (EGGROLL, [*PAPER, "--preset", "tools", "--share-a", "--population", "384", "--lr", "0.01"]),
    (EGGROLL, ["--average-weights", "equal", "--train-on-all", "--seed", "7", "--rank", "2"]),
    (EGGROLL, ["--bias", "--population-growth", "0.5", "--winsorize", "0.01", "--chunk-size", "5"]),
    (EGGROLL, ["--perturbation", "activations", "--sigma", "0.1", "--label-smoothing", "0.2"]),
    (EGGROLL, ["--noise", "gaussian", "--sampling", "gaussian", "--lr", "0.005"]),
    (EGGROLL, ["--fitness", "accuracy", "--difference", "central", "--sigma", "0.05"]),
]


@pytest.mark.parametrize(("script", "flags"), GROUPS)
def test_every_group_of_flags_trains(script, flags, tmp_path):
    train(script, tmp_path / "run", *flags)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.2
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    if "--eval-every" in flags:
        assert rows[1]["test_accuracy"] == "" and rows[2]["test_accuracy"]
    if "--average-weights" in flags:
        assert rows[-1]["unaveraged_test_accuracy"]
    if "--train-on-all" in flags:
        assert summary["validation_accuracy"] is None


@BOTH
def test_the_same_seed_gives_the_same_bits_and_another_does_not(script, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(script, tmp_path / name, "--seed", seed, "--epochs", "1")
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["layers.0.weight"], c["layers.0.weight"])


def test_scripts_share_their_flags_and_explain_them():
    shared = [
        "--epochs",
        "--batch-size",
        "--hidden-dim",
        "--lr",
        "--lr-decay",
        "--optimizer",
        "--seed",
        "--device",
        "--data-dir",
        "--dataset",
        "--out-dir",
        "--eval-every",
        "--quick",
        "--resume",
        "--quiet",
    ]
    for script in (BACKPROP, EGGROLL):
        done = run_script(script, "--help", env={"COLUMNS": "100"})
        assert done.returncode == 0
        assert all(flag in done.stdout for flag in shared)
        assert "training options" in done.stdout and "default" in done.stdout


BAD_FLAGS = [
    (EGGROLL, ["--population", "4095"], "try 4096"),
    (EGGROLL, ["--population", "0"], "--population 0 is below 1"),
    (EGGROLL, ["--rank", "0"], "--rank 0 is below 1"),
    (EGGROLL, ["--sigma", "0"], "--sigma 0.0 is not above 0"),
    (EGGROLL, ["--popultion", "64"], "--population"),
    (EGGROLL, ["--shaping", "sign"], "population estimator"),
    (EGGROLL, [*PAPER, "--noise", "orthogonal"], "add --layers-per-member one"),
    (EGGROLL, [*PAPER, "--share-a"], "--share-a needs members that perturb one layer each"),
    (EGGROLL, ["--groups", "7"], "try a population of"),
    (EGGROLL, ["--backend", "triton"], "try compile"),
    (EGGROLL, ["--winsorize", "0.5"], "--winsorize 0.5 is outside"),
    (BACKPROP, ["--active-units", "300"], "more than the 256 hidden units"),
    (EGGROLL, ["--dtype", "int8", "--optimizer", "adam"], "--optimizer sgd"),
    (BACKPROP, ["--epochs", "0"], "--epochs 0 is below 1"),
    (BACKPROP, ["--epochs", "many"], "--epochs"),
    (BACKPROP, ["--batch-size", "5000"], "--batch-size 5000 is more than"),
    (BACKPROP, ["--dataset", "cifar"], "mnist-sample"),
    (BACKPROP, ["--device", "cuda"], "try --device cpu"),
    (BACKPROP, ["--resume"], "--resume needs --out-dir"),
    (BACKPROP, ["--seed", "-1"], "--seed -1 is negative"),
]


@pytest.mark.parametrize(("script", "flags", "message"), BAD_FLAGS)
def test_a_bad_flag_gets_one_line_and_exit_code_2(script, flags, message, tmp_path):
    env = {"CUDA_VISIBLE_DEVICES": ""}
    done = run_script(script, *SAMPLE, *flags, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("config.json"))


def test_damaged_data_is_named_by_the_script(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"rubbish")
    done = run_script(BACKPROP, "--data-dir", tmp_path, "--out-dir", tmp_path / "run")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "train-images-idx3-ubyte is damaged" in done.stderr


def test_an_out_dir_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = train(BACKPROP, tmp_path / "file" / "run", code=2)
    assert "file" in done.stderr and "Traceback" not in done.stderr


@BOTH
def test_a_full_disk_gets_its_line_and_loses_nothing(script, tmp_path):
    """A limit on file size stands for the disk: the checkpoint no longer fits."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = train(script, tmp_path / "run", code=2, preexec_fn=limit)
    assert os.strerror(errno.EFBIG) in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob(".*.part"))
    assert len(read_csv(tmp_path / "run" / "metrics.csv")) >= 1


def test_divergence_is_named_and_keeps_the_last_checkpoint(tmp_path):
    done = train(BACKPROP, tmp_path / "run", "--lr", "1e6", code=2)
    assert "diverged" in done.stderr and "--lr" in done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_fitness_that_collapses_stops_the_run(tmp_path):
    """At this rate the weights blow up, and every number stays finite."""
    done = train(EGGROLL, tmp_path / "run", "--lr", "1", "--epochs", "4", code=2)
    assert "diverged" in done.stderr and "lr" in done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def start(script, out, *flags):
    command = [sys.executable, ROOT / script, *flags_for(script, "--out-dir", out, *flags)]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@BOTH
def test_ctrl_c_saves_and_resumption_gives_the_bits_of_an_uninterrupted_run(script, tmp_path):
    long = ["--epochs", "8" if script == EGGROLL else "60", "--average-weights", "ema"]
    train(script, tmp_path / "whole", *long)
    process = start(script, tmp_path / "stopped", *long)
    metrics = tmp_path / "stopped" / "metrics.csv"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "--resume" in stderr and "Traceback" not in stderr
    stopped = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert stopped["status"] == "interrupted"
    done = run_script(script, "--resume", "--out-dir", tmp_path / "stopped")
    assert done.returncode == 0, done.stderr
    whole, resumed = (load_file(tmp_path / r / "model.safetensors") for r in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    timings = {"train_seconds"}
    rows = [read_csv(tmp_path / run / "metrics.csv") for run in ("whole", "stopped")]
    rows = [[{k: v for k, v in r.items() if k not in timings} for r in table] for table in rows]
    assert rows[0] == rows[1]


def test_a_killed_run_leaves_complete_files_and_can_be_resumed(tmp_path):
    process = start(BACKPROP, tmp_path / "run", "--epochs", "60")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    wait_for(checkpoint.exists)
    time.sleep(0.3)
    process.kill()
    process.communicate()
    torch.load(checkpoint, weights_only=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "running"
    load_file(tmp_path / "run" / "model.safetensors")
    assert run_script(BACKPROP, "--resume", "--out-dir", tmp_path / "run").returncode == 0


def test_resumption_refuses_what_would_be_another_run(tmp_path):
    train(BACKPROP, tmp_path / "run")
    resume = ("--resume", "--out-dir", tmp_path / "run")
    done = run_script(BACKPROP, *resume, "--lr", "0.7")
    assert done.returncode == 2 and "--lr was 0.05" in done.stderr
    done = run_script(EGGROLL, *resume)
    assert done.returncode == 2
    done = run_script(BACKPROP, "--resume", "--out-dir", tmp_path / "nowhere")
    assert done.returncode == 2 and "no run to resume" in done.stderr
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"rubbish")
    done = run_script(BACKPROP, *resume)
    assert done.returncode == 2 and "damaged" in done.stderr


def test_a_finished_run_is_kept_unless_told_otherwise(tmp_path):
    train(BACKPROP, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    done = train(BACKPROP, tmp_path / "run", code=2)
    assert "--overwrite" in done.stderr
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before
    train(BACKPROP, tmp_path / "run", "--overwrite", "--epochs", "1")
    assert len(read_csv(tmp_path / "run" / "metrics.csv")) == 2


def test_print_config_trains_nothing(tmp_path):
    done = run_script(EGGROLL, "--print-config", "--population", "10", cwd=tmp_path)
    assert json.loads(done.stdout)["flags"]["population"] == 10
    assert not list(tmp_path.iterdir())


def test_the_announcement_names_the_estimator_and_the_other_one(tmp_path):
    done = train(EGGROLL, tmp_path / "paper", *PAPER, "--device", "cpu")
    assert "preset population-cpu" in done.stdout and "--preset gpu or tools" in done.stdout
    done = train(EGGROLL, tmp_path / "credit", "--device", "cpu")
    assert "per-example credit" in done.stdout and "--estimator population" in done.stdout


# ---- run_experiments.sh ----


def experiments(*flags, tmp_path, **env):
    env = {"RESULTS_DIR": tmp_path / "latest", "SEEDS": "0", "MNIST_DIR": tmp_path / "none", **env}
    command = [sys.executable, "-m", "lab.experiments", *flags]
    return run_command(*command, env={key: str(value) for key, value in env.items()})


PLOTS = [
    "accuracy_by_epoch",
    "accuracy_by_seconds",
    "accuracy_by_examples",
    "fitness",
    "time_and_memory",
]
TINY = (*SAMPLE, "--quick", "--hidden-dim", "16", "--population", "192")


def test_the_experiment_writes_its_report_and_goes_on_where_it_stopped(tmp_path):
    done = experiments(*TINY, tmp_path=tmp_path, SEEDS="0 1")
    assert done.returncode == 0, done.stderr
    latest = tmp_path / "latest"
    for name in PLOTS:
        assert (latest / f"{name}.png").stat().st_size > 5_000
        assert "mnist-sample" in (latest / f"{name}.svg").read_text()
    rows = read_csv(latest / "summary.csv")
    assert tuple(rows[0]) == SUMMARY_KEYS
    assert [(r["method"], r["seed"]) for r in rows] == [
        (method, seed) for method in METHODS for seed in "01"
    ]
    assert "mnist-sample" in (latest / "summary.md").read_text()
    assert (latest / "summary.md").read_text().split("\n\n", 1)[1] in done.stdout
    again = experiments(*TINY, tmp_path=tmp_path, SEEDS="0 1")
    assert again.stdout.count("finished already") == 6
    other = experiments(*TINY, "--lr", "0.02", tmp_path=tmp_path, METHODS="backprop")
    assert other.returncode == 0 and "made with other flags" in other.stdout
    assert len(list(tmp_path.glob("latest_until_*/eggroll/seed1"))) == 1


def test_without_data_or_network_the_experiment_falls_back_loudly(tmp_path):
    # a proxy that nobody listens on: every download fails at once
    env = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https")}
    flags = ("--quick", "--hidden-dim", "16", "--population", "192")
    done = experiments(*flags, tmp_path=tmp_path, METHODS="eggroll", **env)
    assert done.returncode == 0, done.stderr
    assert "GOING ON WITH mnist-sample" in done.stderr
    assert "| eggroll | mnist-sample |" in done.stdout
    asked = experiments(*flags, "--dataset", "mnist", tmp_path=tmp_path, **env)
    assert asked.returncode == 2 and "the download failed" in asked.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--popultion", "64"], "--population"),
        (["--population", "63"], "try 64"),
        (["--seed", "3"], "SEEDS"),
        (["--out-dir", "x"], "RESULTS_DIR"),
        (["--estimator", "population"], "METHODS"),
        (["--preset", "tools"], "METHODS"),
    ],
)
def test_the_experiment_checks_every_flag_before_it_starts(flags, message, tmp_path):
    done = experiments(*SAMPLE, *flags, tmp_path=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "latest").exists()


def test_the_experiment_explains_itself(tmp_path):
    done = experiments("--help", tmp_path=tmp_path)
    assert done.returncode == 0 and "SEEDS" in done.stdout


# ---- with the full MNIST, where MNIST_DIR names it ----

needs_mnist = pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR is not set")


@needs_mnist
@BOTH
def test_quick_runs_learn_on_the_full_mnist(script, tmp_path):
    done = run_script(script, "--quick", "--out-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    accuracy = json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"]
    assert accuracy > (0.95 if script == BACKPROP else 0.8)
