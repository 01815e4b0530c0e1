"""Runs that are stopped at any moment, and go on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, call
from runs import (
    BACKPROP,
    EACH,
    EGGROLL,
    KINDS,
    SMALL,
    STEPS,
    assert_one_line,
    read_csv,
    read_json,
    train,
)
from safetensors.torch import load_file

import mnist_backprop
from lab.runlog import RunFolder
from lab.training import Training


def ctrl_c_after(steps, monkeypatch):
    record = Training.record

    def stopping(self, fitness):
        record(self, fitness)
        if self.step == steps:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Training, "record", stopping)


@EACH
@pytest.mark.parametrize("more", ["", "adam"])
def test_ctrl_c_saves_and_resumption_gives_the_bits_of_an_uninterrupted_run(
    kind, more, tmp_path, monkeypatch
):
    if more and "int8" in kind:
        pytest.skip("int8 has an optimizer of its own")
    flags = ["--epochs", "3", *(["--optimizer", "adam", "--lr", "0.001"] if more else [])]
    train(kind, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        ctrl_c_after(STEPS + 12, patch)
        done = train(kind, tmp_path / "stopped", *flags, code=130)
    assert len(done.stderr.splitlines()) == 1 and f"step {STEPS + 12}" in done.stderr
    assert read_json(tmp_path / "stopped" / "summary.json")["status"] == "interrupted"
    script, *typed = done.stderr.partition("python ")[2].split()
    done = call(script, *typed)  # the command that the line names
    assert done.returncode == 0, done.stderr
    assert "going on from step 40" in done.stdout
    model = [tmp_path / run / "model.safetensors" for run in ("whole", "stopped")]
    assert model[0].read_bytes() == model[1].read_bytes()
    tables = [read_csv(tmp_path / run / "metrics.csv") for run in ("whole", "stopped")]
    for row in (*tables[0], *tables[1]):
        del row["train_seconds"]
    assert tables[0] == tables[1]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def start(out, *flags):
    """Backprop in a process of its own, once its first epoch is done."""
    command = [sys.executable, ROOT / BACKPROP, *SMALL, "--out-dir", out, "--epochs", "100", *flags]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for((out / "checkpoint.pt").exists)
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_to_stop_saves_and_ends_the_process_with_its_number(number, code, tmp_path):
    process = start(tmp_path)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code and len(stderr.splitlines()) == 1, stderr
    assert "--resume" in stderr
    assert read_json(tmp_path / "summary.json")["status"] == "interrupted"


def test_a_run_whose_output_nobody_reads_goes_on_to_its_end(tmp_path):
    process = start(tmp_path, "--epochs", "4")
    process.stdout.close()  # as `| head` does
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    assert read_json(tmp_path / "summary.json")["status"] == "finished"
    assert "epoch 4/4" in (tmp_path / "train.log").read_text()


def test_a_run_that_replaced_another_can_be_resumed(tmp_path, monkeypatch):
    train("backprop", tmp_path)
    with monkeypatch.context() as patch:
        ctrl_c_after(5, patch)
        train("backprop", tmp_path, "--overwrite", code=130)
    assert call(BACKPROP, "--resume", "--out-dir", tmp_path).returncode == 0
    assert_one_line(
        call(BACKPROP, "--resume", "--overwrite", "--out-dir", tmp_path),
        "--overwrite has no effect",
    )


def test_a_killed_run_leaves_complete_files_and_can_be_resumed(tmp_path):
    process = start(tmp_path)
    time.sleep(0.3)
    process.kill()
    process.communicate()
    torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert read_json(tmp_path / "summary.json")["status"] == "running"
    load_file(tmp_path / "model.safetensors")
    assert call(BACKPROP, "--resume", "--out-dir", tmp_path).returncode == 0
    assert read_json(tmp_path / "summary.json")["status"] == "finished"


def test_threads_and_backend_are_stored_and_kept(tmp_path, monkeypatch):
    """Both change bits, and what auto means may change between two calls."""
    with monkeypatch.context() as patch:
        ctrl_c_after(5, patch)
        train("backprop", tmp_path, "--threads", "2", code=130)
    flags = read_json(tmp_path / "config.json")["flags"]
    assert (flags["threads"], flags["backend"]) == (2, "eager")
    resume = ("--resume", "--out-dir", tmp_path)
    assert_one_line(call(BACKPROP, *resume, "--threads", "1"), "--threads was 2")
    assert_one_line(call(BACKPROP, *resume, "--backend", "compile"), "--backend was eager")
    monkeypatch.setattr(mnist_backprop, "choose_backend", lambda *_, **__: "compile")
    done = call(BACKPROP, *resume)
    assert done.returncode == 0 and "2 threads, eager" in done.stdout


def test_resumption_refuses_what_would_be_another_run(tmp_path):
    train("backprop", tmp_path / "run", "--epochs", "1")
    resume = ("--resume", "--out-dir", tmp_path / "run")
    done = call(BACKPROP, *resume, "--lr", "0.7", "--momentum", "0.5")
    assert_one_line(done, "--lr was 0.1 and is 0.7 now, --momentum was 0.9")
    assert_one_line(call(BACKPROP, *resume, "--hidden-dim", "64"), "--hidden-dim was 32")
    assert_one_line(call(EGGROLL, *resume), "holds a run of backprop")
    nowhere = ("--resume", "--out-dir", tmp_path / "nowhere")
    assert_one_line(call(BACKPROP, *nowhere), "no run to resume")


@pytest.mark.parametrize(
    ("file", "content"),
    [("checkpoint.pt", "rubbish"), ("config.json", "rubbish"), ("config.json", "{}")],
)
def test_a_damaged_run_is_not_resumed_and_keeps_its_files(file, content, tmp_path):
    train("backprop", tmp_path, "--epochs", "1")
    (tmp_path / file).write_text(content)
    (tmp_path / "checkpoint.previous.pt").unlink()
    done = call(BACKPROP, "--resume", "--out-dir", tmp_path)
    assert_one_line(done, str(tmp_path / file), "--overwrite")
    assert (tmp_path / file).read_text() == content and (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["backprop", "int8"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(kind, tmp_path):
    script, _ = KINDS[kind][0], train(kind, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    content = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    done = call(script, "--resume", "--out-dir", tmp_path)
    assert done.returncode == 0 and "going on from checkpoint.previous.pt" in done.stderr
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_without_a_checkpoint_a_resumed_run_starts_at_step_0(tmp_path):
    train("example members", tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    for name in ("checkpoint.pt", "model.safetensors", "metrics.csv", "summary.json"):
        (tmp_path / name).unlink()
    (tmp_path / "checkpoint.previous.pt").unlink()
    done = call(EGGROLL, "--resume", "--out-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_finished_run_is_kept_unless_told_otherwise(tmp_path):
    train("backprop", tmp_path)
    before = (tmp_path / "metrics.csv").read_bytes()
    assert_one_line(train("backprop", tmp_path, code=2), "--overwrite", "--resume")
    assert (tmp_path / "metrics.csv").read_bytes() == before
    train("backprop", tmp_path, "--overwrite", "--epochs", "1")
    assert len(read_csv(tmp_path / "metrics.csv")) == 2


def test_two_runs_do_not_share_a_folder(tmp_path):
    other = RunFolder(tmp_path, resume=False, overwrite=False)
    assert_one_line(train("backprop", tmp_path, code=2), "another process")
    del other
