"""Small runs of every method, for the tests of the scripts."""

import csv
import json
import signal

import pytest
from conftest import ROOT, call

from experiment.run import Run

BACKPROP = "mnist_backprop.py"
SAMPLE = ("--dataset", "mnist-sample")
SMALL = (*SAMPLE, "--hidden-dim", "32", "--epochs", "2")
STEPS = 28  # per epoch: 3,500 images in batches of 128
KINDS = {
    "backprop": (BACKPROP,),
    "eggroll": ("mnist_eggroll.py", "eggroll", "--population", "66"),
    "eggroll-dense": ("mnist_eggroll.py", "eggroll-dense", "--population", "16"),
    "node-perturbation": ("mnist_eggroll.py", "node-perturbation", "--population", "12"),
    "node-perturbation-int8": ("mnist_eggroll_int8.py", "--population", "12"),
}
THERE = [kind for kind, (script, *_) in KINDS.items() if (ROOT / script).exists()]
EACH = pytest.mark.parametrize("kind", THERE)


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def read_json(path):
    return json.loads(path.read_text())


def train(kind, out, *flags, code=0):
    script, *own = KINDS[kind]
    done = call(script, *own, *SMALL, "--out-dir", out, *flags)
    assert done.returncode == code, done.stderr
    return done


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def interrupt_after(steps, monkeypatch):
    record = Run.record

    def stopping(self, fitness):
        record(self, fitness)
        if self.step == steps:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "record", stopping)


def assert_one_line(done, *messages):
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for message in messages:
        assert message in done.stderr
