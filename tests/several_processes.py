"""What each process of test_distributed.py does: steps with every kind of members, without `lab`.

python several_processes.py FOLDER STEPS    # under torchrun, or alone

Leaves every kind's weights in FOLDER, and fails where two processes' weights differ in a bit.
"""

import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from eggroll import MLP, BatchMembers, Evolution, ExampleMembers, accuracy, cross_entropy, smoothed
from eggroll.int8 import Int8CrossEntropy, Int8MLP, Int8SGD

CPU = torch.device("cpu")


def right_answers(outputs, labels):
    """A user's fitness of the whole batch, (P,)."""
    return (outputs.argmax(-1) == labels).float().mean(-1)


def drawn(outputs, labels):
    """One that never answers the same twice."""
    return (outputs.argmax(-1) == labels) * torch.tensor([random.random() for _ in labels])


KINDS = {
    "example": (cross_entropy(), ExampleMembers((32, 32, 10))),
    "example-smoothed": (smoothed(accuracy, 2.0, 16), ExampleMembers(40)),
    "example-drawn": (smoothed(drawn, 2.0, 16), ExampleMembers(40)),
    "batch": (cross_entropy(2.0), BatchMembers(150)),
    "batch-one": (cross_entropy(2.0), BatchMembers(180, perturb="one")),
    "batch-user": (right_answers, BatchMembers(100)),
    "batch-drawn": (drawn, BatchMembers(70)),
    "int8": (Int8CrossEntropy(1.0, 0.1, CPU), ExampleMembers((32, 30, 9), sigma=0.01)),
}


def trained(kind: str, steps: int) -> torch.nn.Module:
    fitness, members = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    network = MLP(40, 32, 10, seed=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    images = torch.randn(64, 40, generator=generator)
    labels = torch.randint(0, 10, (64,), generator=generator)
    if kind == "int8":
        network = Int8MLP(network)
        optimizer = Int8SGD(network, 0.04, 0.9, "error-feedback", 64)
        images = (images * 32).clamp(-127, 127).to(torch.int8)
    evolution = Evolution(network, fitness, members)
    for _ in range(steps):
        evolution.backward(evolution.evaluate(images, labels))
        optimizer.step()
    return network


def main(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    several = dist.is_torchelastic_launched()
    if several:
        dist.init_process_group("gloo")
    for kind in KINDS:
        weights = trained(kind, steps).state_dict()
        if several:
            for weight in weights.values():
                first = weight.clone()
                dist.broadcast(first, 0)
                assert torch.equal(first, weight), f"{kind}, process {dist.get_rank()}"
        if not several or dist.get_rank() == 0:
            save_file(weights, folder / f"{kind}.safetensors")
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
