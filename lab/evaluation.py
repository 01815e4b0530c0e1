"""What a network is worth: accuracy and cross-entropy on the parts of a dataset."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.data import Dataset, Split

BATCH = 2_000  # examples forwarded at once: evaluation must not set the peak of the memory
DIGITS = 10
LOST = 0.01  # accuracy on a digit below which it counts as lost
TRAIN_SUBSET = 10_000  # training examples that the training curve is measured on


@dataclass(frozen=True)
class Quality:
    """Of a network on one split."""

    accuracy: float  # a fraction
    cross_entropy: float  # mean, in nats
    by_digit: list[float]  # fraction right of each digit's images

    @property
    def lost(self) -> list[int]:
        """Digits that the network hardly ever recognises."""
        return [digit for digit, right in enumerate(self.by_digit) if right < LOST]


def evaluate(network: nn.Module, data: Dataset) -> tuple[dict[str, float | str], list[int]]:
    """The evaluation columns of metrics.csv, and the digits that the network has lost."""
    train = measure(network, data, data.train[:TRAIN_SUBSET])
    test = measure(network, data, data.test)
    held_out = data.validation
    columns = {
        "train_accuracy": train.accuracy,
        "train_cross_entropy": train.cross_entropy,
        "validation_accuracy": measure(network, data, held_out).accuracy if held_out else "",
        "test_accuracy": test.accuracy,
    }
    return columns, test.lost


@torch.no_grad()
def logits_of(network: nn.Module, data: Dataset, split: Split) -> Tensor:
    """Logits of a split, (n, 10), in nats."""
    logits = network(data.scale(split.images))
    # an integer network says what its units are worth
    return logits if logits.is_floating_point() else logits * network.nats_per_logit


@torch.no_grad()
def measure(network: nn.Module, data: Dataset, split: Split) -> Quality:
    """Accuracy, and mean cross-entropy in nats, over one split."""
    nats, answers = 0.0, []
    for start in range(0, len(split), BATCH):
        part = split[slice(start, start + BATCH)]
        logits = logits_of(network, data, part)
        answers.append(logits.argmax(-1))
        nats += F.cross_entropy(logits, part.labels, reduction="sum").item()
    right = (torch.cat(answers) == split.labels).double()
    by_digit = [right[split.labels == digit].mean().item() for digit in range(DIGITS)]
    return Quality(round(right.mean().item(), 6), round(nats / len(split), 6), by_digit)
