"""A device is chosen by name, and refused where it computes wrongly."""

import pytest
import torch
from conftest import call
from runs import SMALL, assert_one_line

from experiment.device import choose_device
from experiment.device_check import check_device
from experiment.errors import UserError

CPU = torch.device("cpu")


def without_strides(operation):
    """Return an operation that reads transposed float32 operands as if they were contiguous."""

    def read(operand):
        wrong = not isinstance(operand, torch.Tensor) or operand.dtype != torch.float32
        return operand if wrong else operand.as_strided(operand.shape, strides(operand.shape))

    def strides(shape):
        return torch.empty(shape, device="meta").stride()

    return lambda *operands: operation(*map(read, operands))


def test_the_cpu_computes_rightly():
    check_device(CPU)


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        (torch.nn.functional, "linear", "product with a transposed weight"),
        (torch, "baddbmm", "perturbation of low rank"),
        (torch, "addcmul", "move of each unit"),
        (torch, "bmm", "members of each block"),
        (torch.Tensor, "__matmul__", "gradient"),
        (torch.Tensor, "addcmul_", "update in place"),
        (torch.Tensor, "addcdiv_", "update in place"),
    ],
)
def test_an_operation_that_ignores_strides_is_found(module, name, reason, monkeypatch):
    monkeypatch.setattr(module, name, without_strides(getattr(module, name)))
    with pytest.raises(UserError, match=rf"computes wrongly \({reason}, by .*try --device cpu"):
        check_device(CPU)


def test_not_a_number_is_wrong(monkeypatch):
    right = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *operands: right(*operands) * float("nan"))
    with pytest.raises(UserError, match="computes wrongly"):
        check_device(CPU)


def test_a_device_that_fails_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)  # as on a virtual Mac
    done = call("mnist_eggroll.py", *SMALL, "--device", "mps", "--out-dir", tmp_path / "run")
    assert_one_line(done, "mps on this machine", "cannot compute (product: ", "try --device cpu")
    assert not (tmp_path / "run").exists()


def test_mps_is_never_chosen_unasked(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
