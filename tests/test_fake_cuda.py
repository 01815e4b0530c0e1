"""Steps on CUDA tensors without a card: fake tensors have a device and a shape, and no values.

An operation on tensors of two devices fails, and so does Python where it reads a value.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from trainings import KINDS

from eggroll import evolution, noise
from eggroll.int8 import fitness, node_perturbation
from experiment.data import Dataset, Split

CACHES = (
    noise._signs_of_bytes,
    noise.hadamard,
    fitness.logarithms,
    node_perturbation.thresholds,
)


class CardGenerator(torch.Generator):
    """A generator of the CPU that says that it is one of the card: real ones need a card."""

    device = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """Make torch believe in a card with bfloat16."""
    monkeypatch.setattr(evolution, "generator", lambda *_: CardGenerator())
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    yield
    for cache in CACHES:  # they hold fake tensors now
        cache.cache_clear()


class NoCopies(TorchDispatchMode):
    """Fails where a tensor of the CPU that is more than a number meets the card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
        assert all(x.is_cuda or x.dim() == 0 for x in tensors), f"{func} meets the CPU"
        return result


def on_card(x):
    return torch.empty(x.shape, dtype=x.dtype, device="cuda")


def move_to_card(training):
    """Replace all tensors of a training by fake ones."""
    network, optimizer, trainer = training.network, training.optimizer, training.trainer
    moved = {}
    for module in (*network.modules(), *trainer._copy.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in moved:
                grad = parameter.requires_grad
                moved[parameter] = nn.Parameter(on_card(parameter), requires_grad=grad)
            module._parameters[name] = moved.get(parameter)
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), 0.1, device="cuda")  # as in a captured step
    if isinstance(optimizer, torch.optim.SGD):
        optimizer.step = lambda: None  # torch's fused kernels know no fake tensors
    states = [(moved[key], optimizer.state.pop(key)) for key in list(optimizer.state)]
    for parameter, state in states:
        optimizer.state[parameter] = tree_map_only(torch.Tensor, on_card, state)
    trainer._finite = torch.ones((), dtype=torch.bool, device="cuda")
    if trainer.smoothing:
        trainer.smoothing.scale = on_card(trainer.smoothing.scale)


@pytest.mark.parametrize("in_bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "backprop"])
@pytest.mark.filterwarnings("ignore:not evolved")
@pytest.mark.usefixtures("card")
def test_no_step_mixes_devices_or_waits_for_the_card(kind, in_bfloat16):
    training = KINDS[kind]()
    (inputs, labels), trainer = training.batches()[0], training.trainer
    with FakeTensorMode():
        move_to_card(training)
        trainer.in_bfloat16 = in_bfloat16 and not kind.startswith("int8")
        images = torch.empty(50, inputs.shape[1], dtype=torch.uint8, device="cuda")
        split = Split(images, torch.zeros(50, dtype=torch.int64, device="cuda"))
        data = Dataset("", split, split, split, torch.empty(inputs.shape[1], device="cuda"), 1.0)
        rows = torch.empty(len(labels), dtype=torch.int64, device="cuda")
        for mode in (nullcontext(), NoCopies()):  # what is cached is copied to the card once
            with mode:
                images, labels = data.batch(rows)
                result = training.train(images.to(inputs.dtype), labels)
    assert result.is_cuda and result.dtype == torch.float32
