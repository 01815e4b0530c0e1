"""A captured step: its operations, repeated on the same memory, train as the plain loop does."""

import pytest
import torch
from networks import batch, make
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eggroll import (
    BlockLowRank,
    Evolution,
    GraphedStep,
    LowRank,
    NodePerturbation,
    Smoothing,
    cross_entropy,
    evolution,
)
from eggroll.int8 import (
    Int8Accuracy,
    Int8CrossEntropy,
    Int8Evolution,
    Int8MLP,
    Int8NodePerturbation,
    Int8SGD,
    Int8Smoothing,
)
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


def sgd(network):
    return torch.optim.SGD(network.parameters(), lr=0.5**4, momentum=0.9, fused=True)


def backprop():
    network = make("mlp")
    optimizer = sgd(network)

    def train(inputs, labels):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(inputs), labels)
        loss.backward()
        optimizer.step()
        return -loss.detach()

    return train, network, optimizer, None


def evolving(fitness, estimator, samples=None, network="mlp"):
    network = make(network)
    optimizer, smoothing = sgd(network), Smoothing(2.0, samples) if samples else None
    return evolved(Evolution(network, fitness, estimator, 1, smoothing), optimizer)


def integers(fitness, smoothing=None):
    network, estimator = Int8MLP(make("without bias")), Int8NodePerturbation(24, 1 / 64, units=4)
    optimizer = Int8SGD(network, lr=0.5, examples=40)
    return evolved(Int8Evolution(network, fitness, estimator, 1, smoothing), optimizer)


def evolved(trainer, optimizer):
    trainer.inspect(batches(trainer)[0][0])
    trainer._loops = None  # C++ is no operation of torch

    def train(inputs, labels):
        trainer.backward(trainer.evaluate(inputs, labels))
        optimizer.step()
        return trainer.mean_fitness

    return train, trainer.network, optimizer, trainer


def batch_accuracy(outputs, labels):
    return (outputs.argmax(-1) == labels).float().mean(-1)


KINDS = {
    "backprop": backprop,
    "block low rank": lambda: evolving(cross_entropy, BlockLowRank(96, 0.05, units=4)),
    "rank 2": lambda: evolving(cross_entropy, BlockLowRank(96, 0.05, rank=2, units=4)),
    "low rank": lambda: evolving(cross_entropy, LowRank(60, 0.05)),
    "node perturbation": lambda: evolving(cross_entropy, NodePerturbation(24, 0.02, units=4)),
    "antithetic": lambda: evolving(cross_entropy, NodePerturbation(24, units=4, antithetic=True)),
    "smoothed": lambda: evolving(cross_entropy, BlockLowRank(96, units=4), 16),
    "smoothed batch": lambda: evolving(batch_accuracy, NodePerturbation(24, units=4), 16),
    "positions": lambda: evolving(cross_entropy, LowRank(60, 0.05), network="positions"),
    "int8": lambda: integers(Int8CrossEntropy(0.1)),
    "int8 smoothed": lambda: integers(Int8Accuracy(), Int8Smoothing(2.0, 16)),
}


def batches(trainer, steps=1):
    """Return batches whose inputs differ."""
    inputs, labels = batch(40)
    found = [(inputs * (1 + i / steps), labels.roll(i)) for i in range(steps)]
    if isinstance(trainer, Int8Evolution):
        return [((16 * x).round().clamp(-127, 127).to(torch.int8), y) for x, y in found]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_has_the_bits_of_the_plain_loop(kind, monkeypatch):
    monkeypatch.setattr(evolution, "check_finite", lambda *_: None)  # done otherwise on CUDA
    monkeypatch.setattr(kernels, "library", None)
    found = []
    for capture in (None, record):
        train, network, optimizer, trainer = KINDS[kind]()
        step = GraphedStep(train, network, optimizer, trainer)
        step.capture = capture
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=64)
        all_batches = batches(trainer, STEPS)
        cut = tuple(tensor[:30] for tensor in all_batches[0])
        before = [p.clone() for p in network.parameters()]
        step.warm_up(all_batches[0], cut)
        assert all(map(torch.equal, before, network.parameters()))
        fitness = []
        for number, each in enumerate(all_batches):
            fitness.append(step(*(cut if number % 10 == 9 else each)).item())
            schedule.step()
        found.append((fitness, [p.clone() for p in network.parameters()]))
        assert not all(map(torch.equal, before, network.parameters()))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))
