"""Runs: their files, exact resumption after any interruption, and what can go wrong."""

import errno
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
import tqdm.std
from conftest import ROOT, call, run_command, run_script
from runs import (
    BACKPROP,
    EACH,
    KINDS,
    SMALL,
    STEPS,
    THERE,
    assert_one_line,
    interrupt_after,
    read_csv,
    read_json,
    train,
    weights,
)
from safetensors.torch import load_file

from experiment import data as data_module
from experiment import files, progress
from experiment import run as run_module
from experiment.data import Split
from experiment.progress import Progress


def metrics(folder):
    """Return the rows of metrics.csv without the time."""
    return [row | {"train_seconds": ""} for row in read_csv(folder / "metrics.csv")]


# ---- files ----


@EACH
def test_a_run_leaves_its_files(kind, tmp_path):
    folder = tmp_path / "run"
    done = train(kind, folder)
    config = read_json(folder / "config.json")
    assert config["flags"]["hidden_dim"] == 32 and config["flags"]["lr"] > 0
    assert {"python", "torch", "numpy", "platform"} == set(config["versions"])
    assert config["data"]["name"] == "mnist-sample" and len(config["data"]["sha256"]) == 64
    summary = read_json(folder / "summary.json")
    assert list(summary) == [
        *("method", "dataset", "seed", "epochs", "steps", "population", "test_accuracy"),
        *("validation_accuracy", "train_seconds", "compile_seconds", "peak_memory_mb"),
        *("device", "status"),
    ]
    assert (summary["method"], summary["status"]) == (kind, "finished")
    assert (summary["epochs"], summary["steps"]) == (2, 2 * STEPS)
    assert 0 <= summary["test_accuracy"] < 1 and summary["train_seconds"] > 0
    rows = read_csv(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert float(rows[-1]["test_accuracy"]) == summary["test_accuracy"]
    passes = 2 * ((summary["population"] or 0) + 1)
    assert int(rows[-1]["forward_passes_per_image"]) == passes
    assert load_file(folder / "model.safetensors")["layers.1.weight"].shape == (32, 32)
    assert (folder / "checkpoint.pt").exists()
    assert (folder / "train.log").read_text() == done.stdout
    assert "5,000 digits, NOT the full MNIST" in done.stdout
    assert (summary["population"] is None) == (kind == "backprop")
    assert kind == "backprop" or f"population {summary['population']}" in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert all(word in last for word in ("accuracy", " s of training", "MB", str(folder)))
    assert done.stderr == ""


@EACH
def test_a_seed_gives_the_same_bits_and_another_seed_does_not(kind, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(kind, tmp_path / name, "--seed", seed, "--epochs", "1")
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert a == b != c


FLAGS = [
    "--optimizer adam --lr 0.001 --weight-decay 0.01",
    "--momentum 0.8 --schedule cosine --lr 0.05 --bias --label-smoothing 0",
    "--schedule constant --batch-size 100 --eval-every 2 --quiet",
    "--activation relu --optimizer adamw --lr 0.002 --train-on-all --seed 7",
]


@pytest.mark.parametrize("flags", FLAGS)
def test_every_group_of_flags_trains(flags, tmp_path):
    done = train("backprop", tmp_path, *flags.split())
    summary = read_json(tmp_path / "summary.json")
    assert summary["test_accuracy"] > 0.7
    rows = read_csv(tmp_path / "metrics.csv")
    assert (rows[1]["test_accuracy"] == "") == ("--eval-every" in flags)
    assert (summary["validation_accuracy"] is None) == ("--train-on-all" in flags)
    assert (done.stdout == done.stderr == "") == ("--quiet" in flags)
    assert (tmp_path / "train.log").stat().st_size


def test_a_failed_write_leaves_the_last_complete_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_atomically(path, "complete")

    def disk_full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)  # where a full disk may first be noticed
    with pytest.raises(OSError, match=r"No space left.*summary\.json"):
        files.write_atomically(path, "half")
    assert path.read_text() == "complete"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


# ---- resuming ----


RESUMED = [(kind, "sgd", step) for kind in THERE for step in (12, STEPS)]
RESUMED += [(kind, "adam", 12) for kind in THERE if not kind.endswith("int8")]


@pytest.mark.parametrize(("kind", "optimizer", "step"), RESUMED)
def test_a_resumed_run_is_bit_identical(kind, optimizer, step, tmp_path, monkeypatch):
    flags = ["--optimizer", "adam", "--lr", "0.001"] if optimizer == "adam" else []
    train(kind, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        done = train(kind, tmp_path / "stopped", *flags, code=130)
    assert len(done.stderr.splitlines()) == 1 and f"step {step} of 56" in done.stderr
    assert read_json(tmp_path / "stopped" / "summary.json")["status"] == "interrupted"
    script, *typed = done.stderr.partition("python ")[2].split()
    done = call(script, *typed)  # the command that the line names
    assert done.returncode == 0 and f"resuming at step {step}" in done.stdout, done.stderr
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")


@EACH
def test_training_reads_nothing_of_the_test_set(kind, tmp_path, monkeypatch):
    train(kind, tmp_path / "usual")
    load = data_module.load

    def with_another_test_set(*given):
        data = load(*given)
        pixels = torch.randint_like(data.test.images, 256)
        return replace(data, test=Split(pixels, data.test.labels.flip(0)))

    monkeypatch.setattr(data_module, "load", with_another_test_set)
    train(kind, tmp_path / "other")
    assert weights(tmp_path / "usual") == weights(tmp_path / "other")
    first, second = (read_csv(tmp_path / name / "metrics.csv") for name in ("usual", "other"))
    for row, other in zip(first, second, strict=True):
        differing = {name for name in row if row[name] != other[name]}
        assert differing <= {"test_accuracy", "train_seconds"}
    assert first[-1]["test_accuracy"] != second[-1]["test_accuracy"]


def in_a_fork(work):
    """Run `work` in a copy of this process; returns its id."""
    # tqdm's own lock is shared with the copy, which may be killed while it holds it
    tqdm.tqdm.set_lock(threading.RLock())
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("kind", ["backprop", "node-perturbation"])
def test_a_run_that_is_killed_at_any_moment_is_bit_identical_when_resumed(
    kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_CHECKPOINTS", 0.02)
    script, *own = KINDS[kind]
    flags = (*own, *SMALL, "--epochs", "30", "--resume", "--out-dir")
    begun = time.monotonic()
    assert call(script, *flags, tmp_path / "whole").returncode == 0
    seconds = time.monotonic() - begun
    moments, kills = random.Random(), 0
    for _ in range(5):
        child = in_a_fork(lambda: call(script, *flags, tmp_path / "killed"))
        time.sleep(moments.uniform(0.05, 0.35) * seconds)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if not kills:  # other tests had slowed the whole run: begin again, and kill earlier
            shutil.rmtree(tmp_path / "killed")
            seconds /= 4
            continue
        if (tmp_path / "killed" / "checkpoint.pt").exists():  # complete at any moment
            torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    done = call(script, *flags, tmp_path / "killed")
    assert done.returncode == 0 and kills, done.stderr
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    assert read_json(tmp_path / "killed" / "summary.json")["status"] == "finished"


def start(out, *flags):
    """Start backprop in a process of its own; returns it once its first epoch is saved."""
    command = [sys.executable, ROOT / BACKPROP, *SMALL, "--out-dir", out, "--epochs", "300", *flags]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (out / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_the_run_and_ends_it_with_its_number(number, code, tmp_path):
    process = start(tmp_path)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code and len(stderr.splitlines()) == 1, stderr
    assert "--resume" in stderr
    assert read_json(tmp_path / "summary.json")["status"] == "interrupted"


def test_a_run_whose_output_is_no_longer_read_continues(tmp_path):
    process = start(tmp_path, "--epochs", "30")
    process.stdout.close()  # as `| head` does
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    assert "epoch 30/30" in (tmp_path / "train.log").read_text()


def test_a_finished_run_is_kept_unless_it_is_overwritten(tmp_path):
    train("backprop", tmp_path)
    before = metrics(tmp_path)
    assert_one_line(train("backprop", tmp_path, code=2), "--overwrite", "--resume", "--out-dir")
    done = train("backprop", tmp_path, "--resume")
    assert done.stdout == f"{tmp_path}: finished already\n"
    assert metrics(tmp_path) == before
    train("backprop", tmp_path, "--overwrite", "--epochs", "1")
    assert len(metrics(tmp_path)) == 2


def test_a_run_without_a_checkpoint_starts_at_step_0(tmp_path):
    train("backprop", tmp_path, "--resume")
    before = weights(tmp_path)
    for path in tmp_path.glob("*.*"):
        if path.name != "config.json":
            path.unlink()
    train("backprop", tmp_path, "--resume")
    assert weights(tmp_path) == before


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        train("backprop", tmp_path, code=130)
    (tmp_path / "checkpoint.pt").write_text("rubbish")
    assert_one_line(train("backprop", tmp_path, "--resume", code=2), "checkpoint.pt is damaged")
    assert (tmp_path / "checkpoint.pt").read_text() == "rubbish"


def test_the_number_of_threads_is_kept_when_resuming(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        train("backprop", tmp_path, "--threads", "2", code=130)
    assert_one_line(train("backprop", tmp_path, "--resume", "--threads", "1", code=2), "was 2")
    assert "2 threads" in train("backprop", tmp_path, "--resume").stdout


def test_two_runs_cannot_share_a_folder(tmp_path):
    lock = files.open_folder(tmp_path, resume=False, overwrite=False)
    assert_one_line(train("backprop", tmp_path, code=2), "another process is writing")
    lock.release()


# ---- trouble ----


@pytest.mark.parametrize("kind", ["backprop", "node-perturbation"])
def test_a_full_disk_is_one_line_and_loses_nothing(kind, tmp_path):
    """A limit on file size stands for the disk: the checkpoint does not fit."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:  # Python ignores SIGXFSZ, so that the write fails with EFBIG
        done = train(kind, tmp_path, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert_one_line(done, os.strerror(errno.EFBIG), "checkpoint.pt")
    assert not list(tmp_path.glob(".*.part"))
    train(kind, tmp_path, "--resume")


def test_divergence_is_named_and_keeps_the_last_good_checkpoint(tmp_path):
    done = train("backprop", tmp_path, "--lr", "1e6", code=2)
    assert_one_line(done, "training has diverged at step", "--lr")
    assert read_json(tmp_path / "summary.json")["status"] == "diverged"
    assert "failed at step" in (tmp_path / "train.log").read_text()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(weight.isfinite().all() for weight in state["network"].values())


def test_a_collapsed_class_is_named(tmp_path):
    done = train("backprop", tmp_path, "--lr", "1e-6", "--epochs", "1")
    assert re.search(r"epoch 1/1 .* collapsed classes: \d", done.stdout)


def test_an_invalid_out_dir_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_one_line(train("backprop", tmp_path / "file" / "run", code=2), str(tmp_path / "file"))


def test_a_clock_that_goes_backwards_harms_nothing(tmp_path, monkeypatch):
    hours = itertools.count(0, -3600)
    for module in (time, tqdm.std):
        monkeypatch.setattr(module, "time", lambda: float(next(hours)))
    train("backprop", tmp_path)
    assert 0 < read_json(tmp_path / "summary.json")["train_seconds"] < 60


def test_variables_of_another_launcher_change_nothing(tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "3"), ("LOCAL_RANK", "no number")):
        monkeypatch.setenv(name, value)
    train("backprop", tmp_path)


def test_libraries_print_nothing(tmp_path):
    script, *own = KINDS["node-perturbation"]
    done = run_script(script, *own, *SMALL, "--epochs", "1", "--out-dir", tmp_path)
    assert done.returncode == 0 and done.stderr == ""


# ---- the screen ----


def test_progress_names_fitness_accuracy_and_the_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    lines = train("backprop", tmp_path).stdout
    expected = r"step 30 of 56: fitness -\d\.\d+, batch accuracy \d+\.\d%, about \d+ s left"
    assert re.search(expected, lines)


def test_a_terminal_shows_a_bar_and_a_quiet_run_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for quiet in (False, True):
        bar = Progress(total=10, step=4, quiet=quiet)
        bar.show(5, fitness=-1.5, accuracy=0.25)
        bar.line("a line")
        bar.close(6)
        printed = capsys.readouterr()
        assert ("6/10" in printed.err and "a line" in printed.out) is not quiet
        assert bool(printed.err or printed.out) is not quiet


# ---- saved weights ----


@pytest.mark.parametrize("kind", THERE)
def test_evaluate_prints_the_accuracy_that_the_run_ended_with(kind, tmp_path):
    train(kind, tmp_path, *(["--bias"] if kind == "backprop" else []))
    done = call("evaluate.py", tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = read_json(tmp_path / "summary.json")["test_accuracy"]
    assert f"test accuracy {accuracy:.2%}, cross-entropy " in done.stdout
    if kind == "backprop":
        fitness = ROOT / "examples" / "even_digits.py"
        assert (
            "fitness 0."
            in call("evaluate.py", tmp_path, "--fitness", f"{fitness}:even_hits").stdout
        )


def test_a_run_starts_from_the_weights_of_another(tmp_path):
    train("backprop", tmp_path / "first")
    init_from = ("--init-from", tmp_path / "first" / "model.safetensors")
    train("backprop", tmp_path / "then", "--epochs", "1", *init_from)
    ends, begins = metrics(tmp_path / "first")[-1], metrics(tmp_path / "then")[0]
    assert ends["test_accuracy"] == begins["test_accuracy"]


def test_weights_of_another_network_are_refused_in_one_line(tmp_path):
    train("backprop", tmp_path / "run", "--epochs", "1")
    init_from = ("--init-from", tmp_path / "run" / "model.safetensors")
    for flags in (("--hidden-dim", "64"), ("--bias",)):
        done = train("backprop", tmp_path / "other", *init_from, *flags, code=2)
        assert_one_line(done, "holds another network: expected layers.0")
    (tmp_path / "run" / "model.safetensors").write_text("rubbish")
    assert_one_line(call("evaluate.py", tmp_path / "run"), "model.safetensors cannot be read")
    assert_one_line(call("evaluate.py", tmp_path / "nowhere"), "nowhere holds no run")


# ---- torchrun ----

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
NODES = (ROOT / "mnist_eggroll.py", "node-perturbation", *SMALL, "--population", "36")


def test_backprop_refuses_to_run_several_times(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in ((0, 1), (1, 0)):  # rank 0 alone prints
        monkeypatch.setenv("RANK", str(rank))
        done = train("backprop", tmp_path / "run", code=2)
        assert done.stderr.count("runs in one process") == len(done.stderr.splitlines()) == lines
    assert not (tmp_path / "run").exists()


def test_two_processes_give_the_bits_of_one_also_when_interrupted(tmp_path):
    flags = (*NODES, "--threads", "1", "--epochs", "6", "--resume", "--out-dir")
    command = [*map(str, (*TORCHRUN, *flags, tmp_path / "two"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    while not (tmp_path / "two" / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert stderr.count("interrupted at step") == 1, stderr
    assert stdout.count("epoch 0/6") == 1  # rank 0 alone prints
    assert read_json(tmp_path / "two" / "summary.json")["status"] == "interrupted"
    done = run_command(*command)
    assert done.returncode == 0 and done.stdout.count("finished: ") == 1, done.stderr
    script, *words = flags
    assert call(script.name, *words, tmp_path / "one").returncode == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")


# ---- the full MNIST, where MNIST_DIR names it ----


@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR is not set")
def test_one_epoch_of_mnist_reaches_96_percent_in_less_than_1_gb(tmp_path):
    done = run_script(BACKPROP, "--epochs", "1", "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    summary = read_json(tmp_path / "summary.json")
    assert summary["test_accuracy"] > 0.96 and summary["peak_memory_mb"] < 1_000
