"""Small networks of all kinds, with odd and unequal sizes so that no mixed-up axis goes unseen."""

from functools import partial

import torch
from torch import nn

INPUTS, CLASSES = 7, 3


class HeadFirst(nn.Module):
    """A head that is registered first, LayerNorm, an in-place ReLU, and a skip by cat."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(6 + INPUTS, CLASSES), nn.Linear(INPUTS, 6)
        self.norm, self.relu = nn.LayerNorm(6), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.head(torch.cat([self.relu(self.norm(self.body(x))), x], -1))


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


class Tied(nn.Module):
    """Two layers with one weight, and a skip by a sum."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS)
        self.second.weight = self.first.weight
        self.head = nn.Linear(INPUTS, CLASSES, bias=False)

    def forward(self, x):
        return self.head(x + torch.tanh(self.second(torch.tanh(self.first(x)))))


class Positions(nn.Module):
    """Several positions for each example, (B, T, I), that are averaged."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(INPUTS, 10), nn.Linear(10, CLASSES)

    def forward(self, x):
        x = torch.stack([x, 2 * x, x.flip(-1)], -2)
        return self.head(torch.tanh(self.body(x)).mean(-2))


class Branches(nn.Module):
    """Two layers that read the same values, one of which gates the other."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(INPUTS, 9)
        self.gate, self.value = nn.Linear(9, 8), nn.Linear(9, 8, bias=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        return self.head(torch.sigmoid(self.gate(x)) * self.value(x))


class Words(nn.Module):
    """An Embedding between layers: what it reads is an argmax."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(INPUTS, 5), nn.Linear(4, CLASSES)
        self.words = nn.Embedding(5, 4)

    def forward(self, x):
        return self.head(self.words(self.body(x).argmax(-1)))


class Step(nn.Module):
    def forward(self, x):
        return (x > 0).to(x.dtype)


def mlp(bias=True, activation=nn.GELU):
    sizes = [(INPUTS, 12), (12, 10), (10, CLASSES)]
    first, second, head = (nn.Linear(i, o, bias=bias) for i, o in sizes)
    return nn.Sequential(first, activation(), second, activation(), head)


NETWORKS = {
    "mlp": mlp,
    "without bias": lambda: mlp(bias=False),
    "step units": lambda: mlp(activation=Step),
    "in place": lambda: mlp(activation=partial(nn.ReLU, inplace=True)),
    "head first": HeadFirst,
    "twice": Twice,
    "tied": Tied,
    "positions": Positions,
    "branches": Branches,
    "words": Words,
}
SMOOTH = [name for name in NETWORKS if name not in ("step units", "words")]


def make(name):
    torch.manual_seed(0)
    return NETWORKS[name]()


def batch(examples=11):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(examples, INPUTS, generator=generator)
    return inputs, torch.randint(0, CLASSES, (examples,), generator=generator)
