"""Train with every estimator for some steps, under torchrun or alone.

python several_processes.py FOLDER STEPS

Leaves the weights in FOLDER, and fails where two processes' weights differ in a bit.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from eggroll import (
    BlockLowRank,
    Evolution,
    LowRank,
    NodePerturbation,
    Smoothing,
    accuracy,
    cross_entropy,
)
from eggroll.int8 import Int8CrossEntropy, Int8Evolution, Int8MLP, Int8NodePerturbation, Int8SGD
from experiment import distributed
from model import MLP


def accuracy_of_the_batch(outputs, labels):
    return (outputs.argmax(-1) == labels).float().mean(-1)


KINDS = {
    "block-low-rank": (cross_entropy, BlockLowRank(640), None),
    "rank-2": (accuracy_of_the_batch, BlockLowRank((320, 96, 40), rank=2), None),
    "low-rank": (cross_entropy, LowRank(150), None),
    "node-perturbation": (cross_entropy, NodePerturbation((32, 32, 10)), None),
    "antithetic": (cross_entropy, NodePerturbation(70, antithetic=True), None),
    "smoothed": (accuracy, NodePerturbation(40), 16),
    "smoothed-batch": (accuracy_of_the_batch, BlockLowRank(200), 16),
    "int8": (Int8CrossEntropy(label_smoothing=0.1), Int8NodePerturbation((32, 32, 10), 0.01), None),
}


def train(kind: str, steps: int) -> torch.nn.Module:
    fitness, estimator, samples = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    network = MLP(40, 32, 10, seed=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    images = torch.randn(64, 40, generator=generator)
    labels = torch.randint(0, 10, (64,), generator=generator)
    make_evolution = Evolution
    if kind == "int8":
        network, make_evolution = Int8MLP(network), Int8Evolution
        optimizer = Int8SGD(network, lr=0.04, examples=64)
        images = (images * 32).clamp(-127, 127).to(torch.int8)
    smoothing = Smoothing(2.0, samples) if samples else None
    evolution = make_evolution(network, fitness, estimator, 0, smoothing)
    for _ in range(steps):
        evolution.backward(evolution.evaluate(images, labels))
        optimizer.step()
    return network


def main(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    distributed.join(torch.device("cpu"))
    for kind in KINDS:
        network = train(kind, steps)
        distributed.check_same(network.parameters(), steps)
        if distributed.rank() == 0:
            save_file(network.state_dict(), folder / f"{kind}.safetensors")
    distributed.leave()
    assert not dist.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
