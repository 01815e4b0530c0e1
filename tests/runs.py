"""Small runs of every kind, for the tests of the scripts."""

import csv
import json

import pytest
from conftest import ROOT, SAMPLE, call

BACKPROP, EGGROLL = "mnist_backprop.py", "mnist_eggroll.py"
BOTH = pytest.mark.parametrize("script", [BACKPROP, EGGROLL])
SMALL = (*SAMPLE, "--hidden-dim", "32", "--epochs", "2")
PRICES = f"{ROOT / 'examples' / 'costly_confusion.py'}:minus_cost"
STEPS = 28  # of an epoch: 3,500 digits in batches of 128
KINDS = {
    "backprop": (BACKPROP,),
    "example members": (EGGROLL, "--population", "12"),
    "smoothed prices": (EGGROLL, "--fitness", PRICES, "--population", "12"),
    "batch members": (EGGROLL, "--members", "batch", "--population", "16"),
    "one-layer members": (
        EGGROLL,
        *["--members", "batch", "--perturb", "one", "--population", "12"],
    ),
    "int8": (EGGROLL, "--dtype", "int8", "--population", "12"),
    "int8 by votes": (EGGROLL, "--dtype", "int8", "--update", "votes", "--population", "12"),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def read_json(path):
    return json.loads(path.read_text())


def train(kind, out, *flags, code=0):
    script, *own = KINDS[kind]
    done = call(script, *SMALL, *own, "--out-dir", out, *flags)
    assert done.returncode == code, done.stderr
    return done


def assert_one_line(done, *messages):
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for message in messages:
        assert message in done.stderr


def settings(script, *flags):
    """Every flag as the script would use it."""
    done = call(script, "--print-config", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["flags"]
