"""Layers whose weights are signs: what is computed with is sign(W), and what is trained is W.

python -m examples.binary_weights                               (seconds; 92 % of 1,000 test digits)
python -m examples.binary_weights --dataset mnist --epochs 10   (minutes; 97.4 % of 10,000)

Members perturb the matrix of signs, and the estimate moves the W behind it: W collects what its
sign ought to be. That is the straight-through rule (Bengio et al. 2013, arXiv 1308.3432;
BinaryConnect, arXiv 1511.00363). Autograd's own gradient through a sign is zero: backprop would
leave every weight where it began.
"""

import math
from dataclasses import dataclass, field

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from eggroll import Evolution, ExampleMembers, accuracy, cross_entropy
from eggroll.seam import linear
from lab import cli, data
from lab.optim import make_schedule


@dataclass(frozen=True)
class Config:
    """Train binary weights, and say how many of the test digits are right."""

    data: cli.DataFlags = field(default_factory=lambda: cli.DataFlags("mnist-sample"))
    epochs: int = 10
    """Passes over the training images."""
    seed: int = 0
    """Keys the initial weights, the order of the examples and all noise."""


class BinaryLinear(nn.Linear):
    """y = x sign(W)^T sqrt(2 / I): signs of the size that keeps a signal's scale (He)."""

    def forward(self, x: Tensor) -> Tensor:
        # the layer multiplies by another tensor than its parameter, so it says which it stands for
        return linear(x, self.weight, self.bias, computes=self.signed_product)

    @staticmethod
    def signed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.sign() * math.sqrt(2 / weight.shape[1]), bias)


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS)
    digits = data.load_for(config.data, torch.device("cpu"))
    torch.manual_seed(config.seed)
    network = nn.Sequential(
        BinaryLinear(784, 256, bias=False),
        nn.GELU(),
        BinaryLinear(256, 256, bias=False),
        nn.GELU(),
        BinaryLinear(256, 10, bias=False),
    )
    members = ExampleMembers((48, 64, 16))
    evolution = Evolution(network, cross_entropy(), members, seed=config.seed)
    flags = cli.TrainingFlags(epochs=config.epochs, lr=0.06, lr_schedule="onecycle")
    optimizer = torch.optim.SGD(network.parameters(), lr=flags.lr, momentum=0.9)
    schedule = make_schedule(optimizer, flags, -(-len(digits.train) // 128))
    for _ in range(config.epochs):
        for rows in torch.randperm(len(digits.train)).split(128):
            batch = digits.train[rows]
            scores = evolution.evaluate(digits.scale(batch.images), batch.labels)
            evolution.backward(scores)
            optimizer.step()
            schedule.step()
    right = accuracy(network(digits.scale(digits.test.images)), digits.test.labels).mean()
    print(f"test accuracy {right:.2%}")


if __name__ == "__main__":
    cli.run_script(main, "examples.binary_weights", errors=())
