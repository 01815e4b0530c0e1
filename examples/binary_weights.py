"""Layers whose weights are signs: what is computed with is sign(W), and what is trained is W.

python -m examples.binary_weights      (seconds; 92 % of 1,000 test digits)

Members perturb the matrix of signs, and the estimate moves the W behind it: W collects what its
sign ought to be. That is the straight-through rule (Bengio et al. 2013, arXiv 1308.3432;
BinaryConnect, arXiv 1511.00363). Autograd's own gradient through a sign is zero.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eggroll import Evolution, ExampleMembers, accuracy, cross_entropy
from eggroll.seam import linear
from lab import data
from lab.cli import DataFlags


class BinaryLinear(nn.Linear):
    """y = x sign(W)^T sqrt(2 / I): signs of the size that keeps a signal's scale (He)."""

    def forward(self, x: Tensor) -> Tensor:
        # the layer multiplies by another tensor than its parameter, so it says which it stands for
        return linear(x, self.weight, self.bias, computes=self.signed_product)

    @staticmethod
    def signed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.sign() * math.sqrt(2 / weight.shape[1]), bias)


torch.manual_seed(0)
digits = data.load_for(DataFlags("mnist-sample"), torch.device("cpu"))
images, test_images = (digits.scale(part.images) for part in (digits.train, digits.test))

network = nn.Sequential(
    BinaryLinear(784, 128, bias=False), nn.GELU(), BinaryLinear(128, 10, bias=False)
)
evolution = Evolution(network, cross_entropy(), ExampleMembers(48))
optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
for batch in torch.randint(len(images), (240, 128)):
    scores = evolution.evaluate(images[batch], digits.train.labels[batch])
    evolution.backward(scores)
    optimizer.step()
print(f"test accuracy {accuracy(network(test_images), digits.test.labels).mean():.1%}")
