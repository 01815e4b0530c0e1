"""Evaluate the weights that a run left behind, float32 or int8, on the test set of its dataset.

python evaluate.py results/latest/eggroll-per-example-int8/seed0
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from eggroll import MLP
from eggroll.integer import ONE, IntegerMLP
from lab import cli, data
from lab.cli import DataFlags, PathFlag
from lab.errors import UserError
from lab.evaluation import measure


@dataclass(frozen=True)
class Config:
    """Evaluate the weights that a run left behind, float32 or int8."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Of the run: it holds config.json and model.safetensors."""
    data_dir: PathFlag = None
    """Folder in torchvision's layout (default: $MNIST_DIR, else data)."""


def load_network(folder: Path) -> nn.Module:
    """The run's network with its weights. Raises UserError where they cannot be read."""
    path = folder / "model.safetensors"
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    flags = cli.read_saved_config(folder)["flags"]
    # a run may be older than a flag
    shape = ("hidden_dim", "activation", "active_units", "binary_weights", "bias")
    network: nn.Module = MLP(**{name: flags[name] for name in shape if name in flags})
    if weights["layers.0.weight"].dtype == torch.int8:
        network = IntegerMLP(network)
    network.load_state_dict(weights)
    return network


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    network = load_network(config.folder)
    flags = cli.read_saved_config(config.folder)["flags"]
    of_run = DataFlags(flags["dataset"], config.data_dir, flags["train_on_all"])
    digits = data.load_for(of_run, torch.device("cpu"))
    if isinstance(network, IntegerMLP):
        digits = data.quantised(digits, ONE)
    accuracy, nats = measure(network, digits, digits.test)
    print(f"test accuracy {accuracy:.2%}, cross-entropy {nats:.4f} nats, on {digits.name}")


if __name__ == "__main__":
    cli.run_script(main, "evaluate.py", errors=())
