"""Shared by the tests: small networks, and the two scripts as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eggroll import MLP

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ("--dataset", "mnist-sample")


def pytest_configure(config):
    # the workers of pytest-xdist would otherwise each take all cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_inputs_every_time():
    torch.manual_seed(0)


@pytest.fixture
def small_network():
    """Sizes are odd and unequal, so that a transposed or mixed-up axis cannot go unseen."""
    return MLP(7, 5, 3, seed=1)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(11, 7, generator=generator)
    return inputs, torch.randint(0, 3, (11,), generator=generator)


def run_command(*command, env=None, cwd=ROOT, timeout=240, **options):
    """Run a command with its output captured."""
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
