"""Evolve a network of your own, unchanged: LayerNorm, a skip connection, and units that only rank.

python -m examples.own_network    # seconds
"""

import torch
from torch import Tensor, nn

from eggroll import Evolution, NodePerturbation, accuracy, cross_entropy
from experiment.config import Config
from experiment.data import load


class Rank(nn.Module):
    """Each unit's rank among the units, scaled to -1 .. 1: it has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.argsort(-1).argsort(-1) / (x.shape[-1] - 1) - 1


class Network(nn.Module):
    """An MLP with a residual block. Layers address axes from the end: inputs are (..., 784)."""

    def __init__(self, width: int = 128):
        super().__init__()
        # a LayerNorm's own weight and bias would stay as they are: only nn.Linear evolves
        norm = nn.LayerNorm(width, elementwise_affine=False)
        self.stem = nn.Sequential(nn.Linear(784, width), norm, nn.GELU())
        self.block = nn.Sequential(nn.Linear(width, width), Rank())
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.block(x))


def main() -> None:
    torch.manual_seed(0)
    data = load(Config(dataset="mnist-sample"), torch.device("cpu"))
    network = Network()
    evolution = Evolution(network, cross_entropy, NodePerturbation(48, sigma=0.02, antithetic=True))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(4):
        for rows in data.batches(epoch, seed=0, batch_size=128):
            evolution.backward(evolution.evaluate(*data.batch(rows)))
            optimizer.step()
    logits = network(data.scale(data.test.images))
    print(f"test accuracy {accuracy(logits, data.test.labels).mean():.1%}")


if __name__ == "__main__":
    main()
