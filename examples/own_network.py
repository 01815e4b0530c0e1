"""Evolve a network of your own, unchanged: an embedding, LayerNorm, a skip connection and ranks.

python -m examples.own_network    # seconds
"""

import torch
from torch import Tensor, nn

from eggroll import Evolution, NodePerturbation, accuracy, cross_entropy
from experiment.config import Config
from experiment.data import load

LEVELS = 8  # of ink that the embedding tells apart


class Rank(nn.Module):
    """Each unit's rank among the units, scaled to -1 .. 1: it has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.argsort(-1).argsort(-1) / (x.shape[-1] - 1) - 1


class Network(nn.Module):
    """An MLP with a residual block. Layers address axes from the end: inputs are (..., 784)."""

    def __init__(self, width: int = 128):
        super().__init__()
        # only nn.Linear evolves: the first batch warns that the embedding stays as it is drawn
        self.ink = nn.Embedding(LEVELS, width)
        norm = nn.LayerNorm(width, elementwise_affine=False)
        self.stem = nn.Sequential(nn.Linear(784, width), norm, nn.GELU())
        self.block = nn.Sequential(nn.Linear(width, width), Rank())
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        level = (LEVELS * (x.mean(-1) + 0.5)).long().clamp(0, LEVELS - 1)
        x = self.stem(x) + self.ink(level)
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
