"""Shared by the tests: small networks and data, and scripts as a user runs them."""

import contextlib
import gc
import io
import os
import random
import runpy
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    # the workers of pytest-xdist would otherwise each take all cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_inputs_every_time():
    torch.manual_seed(0)


def write_idx(path, array_bytes, *shape):
    header = struct.pack(">BBBB", 0, 0, 8, len(shape)) + struct.pack(f">{len(shape)}I", *shape)
    path.write_bytes(header + array_bytes)


@pytest.fixture
def mnist_dir(tmp_path):
    """Return a folder in torchvision's layout that holds a few images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", 80), ("t10k", 20)):
        pixels = random.Random(prefix).randbytes(n * 784)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", pixels, n, 28, 28)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", bytes(i % 10 for i in range(n)), n)
    return tmp_path


def captured(name, flags, run):
    """Run a function as the command `name flags`; return its exit code, stdout and stderr."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    threads = torch.get_num_threads()
    with (
        mock.patch.object(sys, "argv", [name, *map(str, flags)]),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            run()
        except SystemExit as stop:
            code = stop.code or 0
    torch.set_num_threads(threads)  # --threads changes the process
    gc.collect()  # releases the folder of a run that failed
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


def call(script, *flags):
    """Run `python script flags` in this process, which saves seconds of imports."""
    return captured(script, flags, lambda: runpy.run_path(str(ROOT / script), run_name="__main__"))


def run_command(*command, env=None, cwd=ROOT, timeout=240, **options):
    """Run a command in a process of its own and capture its output."""
    threads = {"OMP_NUM_THREADS": "1"}  # the suite runs several at once
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **threads, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )


def run_script(script, *flags, **options):
    return run_command(sys.executable, ROOT / script, *flags, **options)
