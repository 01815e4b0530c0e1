"""A captured step: its operations, repeated on the same memory, train as the plain loop does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainings import KINDS

from eggroll import evolution
from eggroll.int8.arithmetic import kernels

STEPS = 50


class Recorder(TorchDispatchMode):
    """Repeats operations on the same memory, as a CUDA graph does: Python does not run again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "Python reads a value"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            pairs = zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True)
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(work, generators):
    """Capture as the CPU can; generators are those that Python knows after a first call."""
    work()
    known = generators()
    with Recorder() as recorder:
        work()
    assert generators() == known
    return recorder.replay


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:not evolved")
def test_a_captured_step_has_the_bits_of_the_plain_loop(kind, monkeypatch):
    monkeypatch.setattr(evolution, "check_finite", lambda *_: None)  # done otherwise on CUDA
    monkeypatch.setattr(kernels, "library", None)
    found = []
    for capture in (None, record):
        training = KINDS[kind]()
        step, weights = training.step(), list(training.network.parameters())
        step.capture = capture
        schedule = torch.optim.lr_scheduler.LinearLR(training.optimizer, 1.0, 0.0, total_iters=64)
        batches = training.batches(STEPS)
        cut = tuple(tensor[:30] for tensor in batches[0])
        before = [weight.clone() for weight in weights]
        step.warm_up(batches[0], cut)
        assert all(map(torch.equal, before, weights))
        assert step.captured == (capture is not None)
        fitness = []
        for number, batch in enumerate(batches):
            fitness.append(step(*(cut if number % 10 == 9 else batch)).item())
            schedule.step()
        found.append((fitness, [weight.clone() for weight in weights]))
        assert not all(map(torch.equal, before, weights))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


@pytest.mark.parametrize("kind", ["backprop", "block low rank"])
def test_a_step_that_cannot_be_captured_is_a_plain_call(kind):
    def fail(work, generators):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    training = KINDS[kind]()
    step, (batch,) = training.step(), training.batches()
    step.capture = fail
    with pytest.warns(UserWarning, match="no CUDA graph .operation not permitted when stream"):
        step.warm_up(batch)
    assert step(*batch) == KINDS[kind]().train(*batch)
    assert training.optimizer.param_groups[0]["lr"] == 0.5**4


def test_cpus_and_those_who_ask_for_it_have_plain_calls():
    assert KINDS["backprop"]().step().capture is None
    assert KINDS["backprop"]().step(graph=False).capture is None
