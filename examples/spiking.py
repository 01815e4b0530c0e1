"""Train spiking units with hard thresholds, which no gradient passes, and no surrogate gradient.

python -m examples.spiking                             # seconds
python -m examples.spiking --dataset mnist --epochs 4  # minutes

Leaky integrate-and-fire units see the image for a few time steps. A layer needs nothing of the
layers after it, so it runs through all time steps before they do, and each nn.Linear is called
once. Backprop through the same units trains the last layer alone, for comparison.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from eggroll import Evolution, NodePerturbation, cross_entropy
from examples import binary_weights
from experiment.config import FloatConfig, check
from experiment.data import Dataset, load
from experiment.device import keep_freed_memory, set_threads
from experiment.evaluation import evaluate
from experiment.optim import make_optimizer, make_schedule
from experiment.script import run_script
from model import MLP

TIME_STEPS = 4
LEAK = 0.9  # share of the potential that is left after a time step
Backward = Callable[[Tensor, Tensor], None]  # fills .grad, from inputs (B, 784) and labels (B,)


@dataclass(frozen=True)
class Flags(binary_weights.Flags):
    """Train spiking units by evolution and by backprop, and print the test accuracies."""

    epochs: int = 4
    """Passes over the training images."""


def spikes(currents: Tensor) -> Tensor:
    """Return the spikes, 0 or 1, of leaky integrate-and-fire units: (..., T, units) to the same.

    A unit adds up its current, and spikes where its potential reaches 1, which is then subtracted.
    """
    potential, fired = torch.zeros_like(currents[..., 0, :]), torch.empty_like(currents)
    for current, spike in zip(currents.unbind(-2), fired.unbind(-2), strict=True):
        potential.mul_(LEAK).add_(current)
        torch.ge(potential.detach(), 1, out=spike)  # a comparison has no gradient to detach
        potential.sub_(spike)
    return fired


class SpikingMLP(MLP):
    """The MLP with spiking units; the logits are the last layer's of the rates of spikes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (..., 10) of inputs (..., 784)."""
        first, second, last = self.layers
        current = first(x).unsqueeze(-2)  # the same at every time step
        fired = spikes(current.expand(*current.shape[:-2], TIME_STEPS, -1))
        fired = spikes(second(fired))
        return last(fired.mean(-2))


def train(network: nn.Module, data: Dataset, config: FloatConfig, backward: Backward) -> str:
    """Train the network; return its test accuracy and the seconds of training, in words."""
    optimizer = make_optimizer(network, config)
    schedule = make_schedule(optimizer, config, config.epochs * data.steps(config.batch_size))
    start = time.perf_counter()
    for epoch in range(config.epochs):
        for rows in data.batches(epoch, config.seed, config.batch_size):
            backward(*data.batch(rows))
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start
    accuracy = evaluate(network, data, data.test).accuracy
    return f"test accuracy {accuracy:.2%} after {seconds:.0f} s"


def evolved(network: nn.Module, config: FloatConfig) -> Backward:
    """Return evolution's backward pass."""
    estimator = NodePerturbation((96, 256, 16), sigma=0.04, antithetic=True)
    fitness = partial(cross_entropy, label_smoothing=config.label_smoothing)
    evolution = Evolution(network, fitness, estimator, config.seed)
    return lambda images, labels: evolution.backward(evolution.evaluate(images, labels))


def backpropagated(network: nn.Module, config: FloatConfig) -> Backward:
    """Return backprop's backward pass."""

    def backward(images: Tensor, labels: Tensor) -> None:
        network.zero_grad()
        F.cross_entropy(network(images), labels, label_smoothing=config.label_smoothing).backward()

    return backward


def main() -> None:
    flags = tyro.cli(Flags, config=(tyro.conf.FlagCreatePairsOff,))
    config = FloatConfig(**vars(flags), lr=0.06, init_scale=0.5, label_smoothing=0.1)
    check(config)
    set_threads(config.threads)
    keep_freed_memory()
    data = load(config, torch.device("cpu"))
    for name, method in (("backprop", backpropagated), ("evolution", evolved)):
        network = SpikingMLP(seed=config.seed, init_scale=config.init_scale)
        print(f"{name}: {train(network, data, config, method(network, config))}", flush=True)


if __name__ == "__main__":
    run_script(main, "examples.spiking")
