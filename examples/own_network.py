"""A network of one's own, with a module that has no gradient: units that only know their rank.

python -m examples.own_network      (seconds; 89 % of 1,000 test digits)
"""

import torch
from torch import Tensor, nn

from eggroll import LayerwiseEvolution, accuracy, cross_entropy, plain_linear
from lab import data
from lab.cli import DataFlags


class Rank(nn.Module):
    """Each unit's place among the units, scaled to -1 .. 1."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.argsort(-1).argsort(-1) / (x.shape[-1] - 1) - 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.rank, self.head = nn.Linear(784, 128), Rank(), nn.Linear(128, 10)

    def forward(self, x: Tensor, linear=plain_linear) -> Tensor:
        return linear(self.head, self.rank(linear(self.first, x)))


torch.manual_seed(0)
digits, network = data.load_for(DataFlags("mnist-sample"), torch.device("cpu")), Net()
images, test_images = (digits.scale(part.images) for part in (digits.train, digits.test))
options = {"population": 384, "groups": 8, "difference": "central", "sigma": 0.02}
evolution = LayerwiseEvolution(network, cross_entropy(), **options)
optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
for batch in torch.randint(len(images), (120, 128)):
    evolution.estimate(images[batch], digits.train.labels[batch])
    optimizer.step()
print(f"test accuracy {accuracy(network(test_images), digits.test.labels).mean():.1%}")
