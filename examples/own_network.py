"""A network of one's own, with a module that has no gradient: units that only know their rank.

python -m examples.own_network      (seconds; 89 % of 1,000 test digits)
"""

import torch
from torch import Tensor, nn

from eggroll import Evolution, ExampleMembers, accuracy, cross_entropy
from lab import data
from lab.cli import DataFlags


class Rank(nn.Module):
    """Each unit's place among the units, scaled to -1 .. 1."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.argsort(-1).argsort(-1) / (x.shape[-1] - 1) - 1


torch.manual_seed(0)
digits = data.load_for(DataFlags("mnist-sample"), torch.device("cpu"))
images, test_images = (digits.scale(part.images) for part in (digits.train, digits.test))

network = nn.Sequential(nn.Linear(784, 128), Rank(), nn.Linear(128, 10))
members = ExampleMembers(48, sigma=0.02, antithetic=True)
evolution = Evolution(network, cross_entropy(), members)
optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
for batch in torch.randint(len(images), (120, 128)):
    scores = evolution.evaluate(images[batch], digits.train.labels[batch])
    evolution.backward(scores)
    optimizer.step()
print(f"test accuracy {accuracy(network(test_images), digits.test.labels).mean():.1%}")
