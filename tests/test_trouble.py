"""What can go wrong around a run: disk, mirrors, compilers, clocks, a learning rate."""

import errno
import itertools
import os
import resource
import time

import pytest
import tqdm.std
from conftest import call, run_script
from runs import (
    BACKPROP,
    BOTH,
    EGGROLL,
    SMALL,
    assert_one_line,
    read_csv,
    read_json,
    train,
)


def test_damaged_data_is_named_in_one_line(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"rubbish")
    done = call(BACKPROP, "--data-dir", tmp_path, "--out-dir", tmp_path / "run")
    assert_one_line(done, "train-images-idx3-ubyte is damaged")


def test_an_out_dir_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_one_line(train("backprop", tmp_path / "file" / "run", code=2), str(tmp_path / "file"))


@pytest.mark.parametrize("kind", ["backprop", "example members"])
def test_a_full_disk_gets_its_line_and_loses_nothing(kind, tmp_path):
    """A limit on file size stands for the disk: the checkpoint no longer fits."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:  # python ignores SIGXFSZ, so that the write fails with EFBIG
        done = train(kind, tmp_path / "run", code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert_one_line(done, os.strerror(errno.EFBIG), "checkpoint.pt")
    assert not list((tmp_path / "run").glob(".*.part"))
    assert len(read_csv(tmp_path / "run" / "metrics.csv")) >= 1


def test_divergence_is_named_and_keeps_the_last_checkpoint(tmp_path):
    assert_one_line(train("backprop", tmp_path, "--lr", "1e6", code=2), "diverged", "--lr")
    assert read_json(tmp_path / "summary.json")["status"] == "failed"
    assert "failed at step" in (tmp_path / "train.log").read_text()


def test_a_fitness_that_collapses_stops_the_run(tmp_path):
    """At this rate the weights blow up, and every number stays finite."""
    flags = ("--lr", "3", "--lr-schedule", "constant", "--epochs", "8")
    flags = (*flags, "--fitness", "cross-entropy")
    assert_one_line(train("batch members", tmp_path, *flags, code=2), "diverged: the fitness fell")
    assert read_json(tmp_path / "summary.json")["status"] == "failed"


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_broken_compiler_costs_a_line_and_the_run_goes_on_eagerly(dtype, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("g++", "c++", "clang++"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "CXX": str(tools / "g++")}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    flags = (*SMALL, "--population", "12", "--backend", "compile", "--dtype", dtype)
    flags = (*flags, "--out-dir", tmp_path / "run")
    done = run_script(EGGROLL, *flags, env=env)
    assert done.returncode == 0, done.stderr
    warnings = done.stderr.splitlines()
    assert len(warnings) == 1 and "going on with backend eager" in warnings[0], done.stderr
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "finished"


@pytest.mark.parametrize("folder", ["with a space", "not there"])
def test_kernels_compile_whatever_tmpdir_is(folder, tmp_path):
    (tmp_path / "with a space").mkdir()
    flags = (*SMALL, "--population", "12", "--dtype", "int8", "--epochs", "1")
    env = {"TMPDIR": str(tmp_path / folder)}
    done = run_script(EGGROLL, *flags, "--out-dir", tmp_path / "run", env=env)
    assert done.returncode == 0 and done.stderr == ""
    assert "threads, compile" in done.stdout


def test_a_clock_that_goes_backwards_harms_nothing(tmp_path, monkeypatch):
    hours = itertools.count(0, -3600)
    for module in (time, tqdm.std):
        monkeypatch.setattr(module, "time", lambda: float(next(hours)))
    train("backprop", tmp_path)
    summary = read_json(tmp_path / "summary.json")
    assert summary["status"] == "finished" and 0 < summary["train_seconds"] < 60


def test_variables_of_another_launcher_change_nothing(tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "3"), ("LOCAL_RANK", "no number")):
        monkeypatch.setenv(name, value)
    train("backprop", tmp_path)


@BOTH
def test_libraries_add_no_noise_of_their_own(script, tmp_path):
    """Such as "No CUDA runtime is found", where there is a compiler to look for."""
    done = run_script(script, *SMALL, "--epochs", "1", "--out-dir", tmp_path)
    assert done.returncode == 0 and done.stderr == ""
