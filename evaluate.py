"""Evaluate the weights that a run left behind, float32 or int8, on the test set of its dataset.

python evaluate.py results/latest/eggroll-int8/seed0
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from eggroll import MLP
from eggroll.int8 import INT8_SCALE, Int8MLP
from lab import cli, data, user_fitness
from lab.cli import DataFlags, PathFlag
from lab.evaluation import logits_of, measure
from lab.network import start_from


@dataclass(frozen=True)
class Config:
    """Evaluate the weights that a run left behind, float32 or int8."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Of the run: it holds config.json and model.safetensors."""
    data_dir: PathFlag = None
    """Folder in torchvision's layout (default: $MNIST_DIR, else data)."""
    fitness: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:FUNCTION")] = None
    """A function of your own, as --fitness of mnist_eggroll.py has it: its mean is printed too."""


def load_network(folder: Path, flags: dict[str, Any]) -> nn.Module:
    """The run's network with its weights. Raises UserError where they cannot be read."""
    options = {name: flags[name] for name in ("hidden_dim", "activation", "bias")}
    network: nn.Module = MLP(**options)
    if flags.get("dtype") == "int8":
        network = Int8MLP(network)
    start_from(folder / "model.safetensors", network)
    return network


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    flags = cli.read_saved_config(config.folder)["flags"]
    network = load_network(config.folder, flags)
    of_run = DataFlags(flags["dataset"], config.data_dir, flags["train_on_all"])
    digits = data.load_for(of_run, torch.device("cpu"))
    if isinstance(network, Int8MLP):
        digits = data.quantised(digits, INT8_SCALE)
    found = measure(network, digits, digits.test)
    nats = found.cross_entropy
    print(f"test accuracy {found.accuracy:.2%}, cross-entropy {nats:.4f} nats, on {digits.name}")
    for digit, right in enumerate(found.by_digit):
        print(f"  {digit}: {right:7.2%}")
    if config.fitness:
        print(f"fitness {mean_fitness(config.fitness, network, digits):.6g}: {config.fitness}")


def mean_fitness(name: str, network: nn.Module, digits: data.Dataset) -> float:
    """A user's fitness of the network on the whole test set, or its mean over the images."""
    outputs = logits_of(network, digits, digits.test).unsqueeze(0)
    return user_fitness.load(name)(outputs, digits.test.labels).float().mean().item()


if __name__ == "__main__":
    cli.run_script(main, "evaluate.py", errors=())
