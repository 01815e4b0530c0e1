"""Networks are exported to ONNX, as docs/deploy.md shows."""

import re
import sys

import pytest
import torch
from conftest import ROOT, run_command
from runs import read_json, train

from eggroll.int8 import Int8MLP
from model import ACTIVATIONS, MLP

FOLDER = "results/latest/eggroll/seed0"


@pytest.mark.parametrize("kind", ["eggroll", "node-perturbation-int8"])
def test_the_exported_file_has_the_accuracy_of_the_run(kind, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    train(kind, tmp_path / FOLDER)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/deploy.md").read_text(), re.DOTALL)
    assert FOLDER in code
    path = {"PYTHONPATH": str(ROOT)}
    done = run_command(sys.executable, "-c", code, cwd=tmp_path, env=path)
    assert done.returncode == 0, done.stderr
    accuracy = read_json(tmp_path / FOLDER / "summary.json")["test_accuracy"]
    assert f"test accuracy {accuracy:.2%}" in done.stdout


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_float_network_is_traced_for_any_batch(activation):
    check_traced(MLP(hidden_dim=32, activation=activation), torch.randn(5, 784))


def test_an_int8_network_is_traced_for_any_batch():
    network = Int8MLP(MLP(hidden_dim=32))
    check_traced(network, torch.randint(-127, 128, (5, 784), dtype=torch.int8), equal=True)


def check_traced(network, inputs, equal=False):
    """Compare with the network what torch.export made of it, for another batch."""
    shapes = {"x": {0: torch.export.Dim("batch")}}
    traced = torch.export.export(network, (inputs[:2],), dynamic_shapes=shapes).module()
    tolerance = {"rtol": 0, "atol": 0} if equal else {}
    torch.testing.assert_close(traced(inputs), network(inputs), **tolerance)
