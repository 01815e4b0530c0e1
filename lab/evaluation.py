"""What a network is worth: accuracy and cross-entropy on the parts of a dataset."""

import torch
from torch import nn
from torch.nn import functional as F

from lab.data import Dataset, Split

BATCH = 2_000  # examples forwarded at once: evaluation must not set the peak of the memory
TRAIN_SUBSET = 10_000  # training examples that the training curve is measured on


def evaluate(network: nn.Module, data: Dataset) -> dict[str, float | str]:
    """The evaluation columns of metrics.csv; accuracies are fractions, cross-entropy is in nats."""
    accuracy, cross_entropy = measure(network, data, data.train[:TRAIN_SUBSET])
    validation = measure(network, data, data.validation)[0] if data.validation else ""
    return {
        "train_accuracy": accuracy,
        "train_cross_entropy": cross_entropy,
        "validation_accuracy": validation,
        "test_accuracy": measure(network, data, data.test)[0],
    }


@torch.no_grad()
def measure(network: nn.Module, data: Dataset, split: Split) -> tuple[float, float]:
    """Accuracy as a fraction, and mean cross-entropy in nats, over one split."""
    correct = nats = 0.0
    for start in range(0, len(split), BATCH):
        part = split[slice(start, start + BATCH)]
        logits = network(data.scale(part.images))
        if not logits.is_floating_point():  # an integer network says what its units are worth
            logits = logits * network.nats_per_logit
        correct += (logits.argmax(-1) == part.labels).sum().item()
        nats += F.cross_entropy(logits, part.labels, reduction="sum").item()
    return round(correct / len(split), 6), round(nats / len(split), 6)
