"""Accuracy and cross-entropy of a network on a split."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiment.data import Dataset, Split

BATCH = 2_000  # small enough not to raise peak memory
CLASSES = 10
COLLAPSED = 0.01  # accuracy on a class below which it counts as collapsed
TRAIN_SUBSET = 10_000  # training examples that the training curve is measured on


@dataclass(frozen=True)
class Evaluation:
    accuracy: float  # a fraction
    cross_entropy: float  # mean, in nats
    by_class: list[float]  # accuracy on each class

    @property
    def collapsed_classes(self) -> list[int]:
        """Classes that the network hardly ever predicts."""
        return [label for label, right in enumerate(self.by_class) if right < COLLAPSED]


@torch.no_grad()
def logits_of(network: nn.Module, data: Dataset, split: Split) -> Tensor:
    """Return the logits of a split, (n, 10), in nats."""
    logits = network(data.scale(split.images))
    return logits if logits.is_floating_point() else logits * network.nats_per_logit


@torch.no_grad()
def evaluate(network: nn.Module, data: Dataset, split: Split) -> Evaluation:
    """Evaluate the network on one split of the data."""
    nats, predictions = 0.0, []
    for start in range(0, len(split), BATCH):
        part = split[slice(start, start + BATCH)]
        logits = logits_of(network, data, part)
        predictions.append(logits.argmax(-1))
        nats += F.cross_entropy(logits, part.labels, reduction="sum").item()
    right = (torch.cat(predictions) == split.labels).cpu().double()
    labels = split.labels.cpu()
    by_class = [right[labels == label].mean().item() for label in range(CLASSES)]
    return Evaluation(round(right.mean().item(), 6), round(nats / len(split), 6), by_class)


def evaluate_splits(network: nn.Module, data: Dataset) -> tuple[dict[str, float | str], list[int]]:
    """Return the evaluation columns of metrics.csv, and the collapsed classes."""
    train = evaluate(network, data, data.train[:TRAIN_SUBSET])
    test = evaluate(network, data, data.test)
    held_out = data.validation
    columns: dict[str, float | str] = {
        "train_accuracy": train.accuracy,
        "train_cross_entropy": train.cross_entropy,
        "validation_accuracy": evaluate(network, data, held_out).accuracy if held_out else "",
        "test_accuracy": test.accuracy,
    }
    return columns, test.collapsed_classes
