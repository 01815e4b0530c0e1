"""Train the 784-256-256-10 MLP on MNIST by backpropagation: what EGGROLL is compared with.

python mnist_backprop.py            # 10 epochs of SGD
python mnist_backprop.py --quick    # a few seconds
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from eggroll import MLP
from lab import cli, data
from lab.cli import SharedConfig
from lab.optim import make_optimizer
from lab.training import Training

METHOD = "backprop"

# What runs where no flag says otherwise. An epoch of mnist-sample is 32 steps, so it gets more.
PRESETS = {
    "full": {"epochs": 10, "lr": 0.1},
    "quick": {"epochs": 2, "lr": 0.1},
    "full-sample": {"epochs": 30, "lr": 0.1},
    "quick-sample": {"epochs": 10, "lr": 0.1},
}


@dataclass(frozen=True)
class Config(SharedConfig):
    """Train the MLP on MNIST by backpropagation."""


def resolve(config: Config) -> Config:
    """The settings of this run, with the preset's where no flag was typed."""
    return cli.apply_preset(config, PRESETS[preset_name(config)])


def preset_name(config: Config) -> str:
    name = "quick" if config.run.quick else "full"
    return name + ("-sample" if config.data.dataset == data.SAMPLE else "")


def train(config: Config, device: torch.device) -> None:
    """One run, from the data to its files."""
    digits = data.load_for(config.data, device)
    network = MLP(
        hidden_dim=config.network.hidden_dim,
        bias=config.network.bias,
        init=config.network.init,
        seed=config.run.seed,
    ).to(device)
    optimizer = make_optimizer(network, config.training)

    with Training(METHOD, config, digits, network, optimizer, device) as training:
        with training.warm_up() as (images, labels):
            F.cross_entropy(network(images), labels).backward()
        for images, labels in training.batches():
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            training.record(fitness=-loss.detach())


def main() -> None:
    config = cli.parse(Config, cli.describe(__doc__, PRESETS))
    device = cli.resolve_device(config.run.device)
    config = resolve(config)
    if config.run.print_config:
        cli.print_config(METHOD, config, device)
        return
    train(config, device)


if __name__ == "__main__":
    cli.run_script(main, "mnist_backprop.py", errors=())
