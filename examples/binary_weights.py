"""Train layers that compute with sign(W), by estimates that move W.

python -m examples.binary_weights                              # seconds
python -m examples.binary_weights --dataset mnist --epochs 10  # minutes

Each W collects what its sign ought to be: the straight-through rule (Bengio et al. 2013,
arXiv 1308.3432; BinaryConnect, arXiv 1511.00363). Autograd's gradient through a sign is zero, so
backprop would leave every weight where it began.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from eggroll import Evolution, NodePerturbation, accuracy, cross_entropy
from experiment.config import FloatConfig, check
from experiment.data import load
from experiment.device import set_threads
from experiment.optim import make_optimizer, make_schedule
from experiment.script import run_script


@dataclass(frozen=True)
class Flags:
    """Train binary weights, and print the test accuracy."""

    dataset: Literal["mnist", "fashion-mnist", "kmnist", "mnist-sample"] = "mnist-sample"
    """Images to train on; mnist-sample is 5,000 digits of MNIST that need no network."""
    data_dir: Path | None = None
    """Folder in torchvision's layout (None: $MNIST_DIR, else data)."""
    epochs: int = 10
    """Passes over the training images."""
    seed: int = 0
    """Random seed (weights, data order and noise)."""
    train_on_all: bool = False
    """Train on all 60,000 images (no validation split)."""
    threads: int | None = None
    """CPU threads (None: one per core)."""


class BinaryLinear(nn.Linear):
    """y = x sign(W)^T sqrt(2 / I), which keeps the scale of x (He)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.sign() * math.sqrt(2 / self.in_features), self.bias)


def main() -> None:
    flags = tyro.cli(Flags, config=(tyro.conf.FlagCreatePairsOff,))
    config = FloatConfig(**vars(flags), lr=0.06, schedule="onecycle")
    check(config)
    set_threads(config.threads)
    data = load(config, torch.device("cpu"))
    torch.manual_seed(config.seed)
    sizes = ((784, 256), (256, 256), (256, 10))
    first, second, last = (BinaryLinear(i, o, bias=False) for i, o in sizes)
    network = nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)
    estimator = NodePerturbation((48, 64, 16))
    evolution = Evolution(network, cross_entropy, estimator, seed=config.seed)
    optimizer = make_optimizer(network, config)
    schedule = make_schedule(optimizer, config, config.epochs * data.steps(config.batch_size))
    for epoch in range(config.epochs):
        for rows in data.batches(epoch, config.seed, config.batch_size):
            evolution.backward(evolution.evaluate(*data.batch(rows)))
            optimizer.step()
            schedule.step()
    logits = network(data.scale(data.test.images))
    print(f"test accuracy {accuracy(logits, data.test.labels).mean():.2%}")


if __name__ == "__main__":
    run_script(main, "examples.binary_weights")
