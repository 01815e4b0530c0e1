"""Small trainings of every method, for the tests of captured steps and of CUDA."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from networks import batch, make
from torch import nn
from torch.nn import functional as F

from eggroll import (
    BlockLowRank,
    Evolution,
    GraphedStep,
    LowRank,
    NodePerturbation,
    Smoothing,
    cross_entropy,
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


class Training(NamedTuple):
    """A training step, and what it changes; `trainer` is None for backprop."""

    train: Callable
    network: nn.Module
    optimizer: torch.optim.Optimizer
    trainer: Evolution | None = None

    def step(self, **options):
        return GraphedStep(*self, **options)

    def batches(self, count=1):
        """Return batches whose inputs differ, on the network's device."""
        inputs, labels = batch(40)
        device = next(self.network.parameters()).device
        found = [(inputs * (1 + i / count), labels.roll(i)) for i in range(count)]
        if isinstance(self.trainer, Int8Evolution):
            found = [((16 * x).round().clamp(-127, 127).to(torch.int8), y) for x, y in found]
        return [(x.to(device), y.to(device)) for x, y in found]


def backprop(device="cpu"):
    network = make("mlp").to(device)
    optimizer = sgd(network)

    def train(inputs, labels):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(inputs), labels)
        loss.backward()
        optimizer.step()
        return -loss.detach()

    return Training(train, network, optimizer)


def sgd(network):
    return torch.optim.SGD(network.parameters(), lr=0.5**4, momentum=0.9, fused=True)


def evolving(fitness, estimator, samples=None, network="mlp"):
    def make_training(device="cpu"):
        moved = make(network).to(device)
        smoothing = Smoothing(2.0, samples) if samples else None
        return evolved(Evolution(moved, fitness, estimator, 1, smoothing), sgd(moved))

    return make_training


def integers(fitness, samples=None):
    def make_training(device="cpu"):
        network = Int8MLP(make("without bias")).to(device)
        estimator = Int8NodePerturbation(24, 1 / 64, units=4)
        smoothing = Int8Smoothing(2.0, samples) if samples else None
        trainer = Int8Evolution(network, fitness, estimator, 1, smoothing)
        return evolved(trainer, Int8SGD(network, lr=0.5, examples=40))

    return make_training


def evolved(trainer, optimizer):
    def train(inputs, labels):
        trainer.backward(trainer.evaluate(inputs, labels))
        optimizer.step()
        return trainer.mean_fitness

    training = Training(train, trainer.network, optimizer, trainer)
    trainer.inspect(training.batches()[0][0])
    trainer._loops = None  # C++ is no operation of torch
    return training


def batch_accuracy(outputs, labels):
    return (outputs.argmax(-1) == labels).float().mean(-1)


node = NodePerturbation(24, 0.02, units=4)
KINDS = {
    "backprop": backprop,
    "block low rank": evolving(cross_entropy, BlockLowRank(96, 0.05, units=4)),
    "rank 2": evolving(cross_entropy, BlockLowRank(96, 0.05, rank=2, units=4)),
    "low rank": evolving(cross_entropy, LowRank(60, 0.05)),
    "node perturbation": evolving(cross_entropy, node),
    "antithetic": evolving(cross_entropy, NodePerturbation(24, units=4, antithetic=True)),
    "smoothed": evolving(cross_entropy, BlockLowRank(96, units=4), 16),
    "smoothed batch": evolving(batch_accuracy, node, 16),
    "positions": evolving(cross_entropy, LowRank(60, 0.05), network="positions"),
    "head first": evolving(cross_entropy, BlockLowRank(96, 0.05), network="head first"),
    "int8": integers(Int8CrossEntropy(0.1)),
    "int8 smoothed": integers(Int8Accuracy(), 16),
}
