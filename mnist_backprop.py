"""Train the 784-256-256-10 MLP on MNIST by backpropagation: what EGGROLL is compared with.

python mnist_backprop.py            # 10 epochs of SGD
python mnist_backprop.py --quick    # a few seconds
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll import MLP, BackendError
from eggroll.compiled import Compiled, choose_backend
from lab import cli, data, processes
from lab.cli import SharedConfig
from lab.optim import make_optimizer
from lab.training import Training

METHOD = "backprop"

# What runs where no flag says otherwise. An epoch of mnist-sample is 28 steps, so it gets more.
PRESET = {"lr": 0.1, "lr_schedule": "onecycle", "label_smoothing": 0.1}
EPOCHS = {"full": 10, "quick": 2, "full-sample": 30, "quick-sample": 10}


@dataclass(frozen=True)
class Config(SharedConfig):
    """Train the MLP on MNIST by backpropagation."""


def resolve(config: Config, device: torch.device) -> Config:
    """The settings of this run, with the preset's where no flag was typed. Raises UserError."""
    config = cli.apply_preset(config, PRESET | {"epochs": EPOCHS[data.length(config)]})
    if config.run.backend == "fused":
        raise BackendError("--backend fused is for EGGROLL's batch members (try compile)")
    worth = device.type == "cuda"  # on a CPU, compiling takes longer than the run
    return cli.resolve_run(config, choose_backend(config.run.backend, device, worth=worth))


def make_loss(network: MLP, label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Images (B, 784) and labels (B,) to the mean cross-entropy."""

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(network(images), labels, label_smoothing=label_smoothing)

    return loss_of


def train(config: Config, device: torch.device) -> None:
    """One run, from the data to its files."""
    digits = data.load_for(config.data, device)
    network = MLP(**cli.network_options(config)).to(device)
    optimizer = make_optimizer(network, config.training)
    loss_of = make_loss(network, config.training.label_smoothing)
    loss_of = Compiled(loss_of, config.run.backend, device)

    with Training(METHOD, config, digits, network, optimizer, device) as training:
        with training.warm_up() as (images, labels):
            loss_of(images, labels).backward()
        for images, labels in training.batches():
            loss = loss_of(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            training.record(fitness=-loss.detach())


def main() -> None:
    processes.only_one("mnist_backprop.py")
    config = cli.parse(Config, cli.describe(__doc__, {METHOD: PRESET | {"epochs": EPOCHS["full"]}}))
    device = cli.resolve_device(config.run.device)
    config = resolve(config, device)
    if config.run.print_config:
        cli.print_config(METHOD, config, device)
        return
    train(config, device)


if __name__ == "__main__":
    cli.run_script(main, "mnist_backprop.py", errors=(BackendError,))
