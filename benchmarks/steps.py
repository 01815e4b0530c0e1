"""Training steps of every method, as the scripts take them, on random images."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mnist_backprop
import mnist_eggroll
import mnist_eggroll_int8
from benchmarks.rows import Work
from eggroll import Evolution, GraphedStep, int8
from experiment.commands import COMMANDS
from experiment.config import Config
from experiment.data import Dataset, Split, quantised
from experiment.errors import UserError
from experiment.optim import make_optimizer, make_schedule
from model import MLP

BACKPROP, INT8 = "backprop", "node-perturbation-int8"
METHODS = tuple(COMMANDS)
BATCH, IMAGES = 128, 51_200
STEPS = 1_000_000  # of a schedule: more than are taken


class Training(NamedTuple):
    """A method's step on rows of the data, and what it changes."""

    data: Dataset
    config: Config
    train: Callable[[Tensor], Tensor]
    network: nn.Module
    optimizer: torch.optim.Optimizer
    evolution: Evolution | None = None

    def work(self) -> tuple[Work, bool]:
        """Return a call that takes a whole step, as in a script's loop, and if it is a graph."""
        step = GraphedStep(self.train, self.network, self.optimizer, self.evolution)
        schedule = make_schedule(self.optimizer, self.config, STEPS)
        rows, fitness = endless(self.data), torch.zeros((), device=self.data.mean.device)
        step.warm_up((next(rows),))

        def work() -> None:
            fitness.add_(step(next(rows)))
            schedule.step()

        return work, step.captured


def make(name: str, device: torch.device) -> Training:
    """Return the training of METHOD or METHOD:POPULATION. Raises UserError for another method."""
    method, colon, members = name.partition(":")
    population = int(members) if members.isdecimal() else None
    if method not in METHODS or (colon and not population):
        raise UserError(f"--methods must be METHOD or METHOD:POPULATION of {METHODS}, got {name}")
    data, network = random_data(device), MLP().to(device)
    if method == BACKPROP:
        return backprop(data, network)
    if method == INT8:
        return integers(data, network, population)
    config = mnist_eggroll.PRESETS[method]
    if population:
        config = replace(config, es=replace(config.es, population=population))
    fitness, smoothing = mnist_eggroll.make_fitness(config)
    evolution = Evolution(network, fitness, config.es, smoothing=smoothing)
    return evolving(data, config, evolution, make_optimizer(network, config))


def backprop(data: Dataset, network: nn.Module) -> Training:
    config = mnist_backprop.PRESETS[BACKPROP]
    optimizer = make_optimizer(network, config)

    def train(rows: Tensor) -> Tensor:
        images, labels = data.batch(rows)
        loss = F.cross_entropy(network(images), labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return -loss.detach()

    return Training(data, config, train, network, optimizer)


def integers(data: Dataset, network: nn.Module, population: int | None) -> Training:
    config = mnist_eggroll_int8.PRESETS[INT8]
    data, network = quantised(data, int8.INT8_SCALE), int8.Int8MLP(network).to(data.mean.device)
    members = int8.Int8NodePerturbation(population or config.population, config.sigma)
    fitness = int8.Int8CrossEntropy(config.label_smoothing)
    evolution = int8.Int8Evolution(network, fitness, members)
    return evolving(
        data, config, evolution, int8.Int8SGD(network, config.lr, config.momentum, BATCH)
    )


def evolving(
    data: Dataset, config: Config, evolution: Evolution, optimizer: torch.optim.Optimizer
) -> Training:
    evolution.inspect(data.scale(data.train.images[:BATCH]))

    def train(rows: Tensor) -> Tensor:
        evolution.backward(evolution.evaluate(*data.batch(rows)))
        optimizer.step()
        return evolution.mean_fitness

    return Training(data, config, train, evolution.network, optimizer, evolution)


def random_data(device: torch.device) -> Dataset:
    images = torch.randint(0, 256, (IMAGES, 784), dtype=torch.uint8, device=device)
    train = Split(images, torch.randint(0, 10, (IMAGES,), device=device))
    return Dataset("random", train, train[:0], train[:0], torch.full((784,), 128.0).to(device), 74)


def endless(data: Dataset) -> Iterator[Tensor]:
    for epoch in count():
        yield from data.batches(epoch, seed=0, batch_size=BATCH)
