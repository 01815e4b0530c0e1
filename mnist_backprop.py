"""Train the 784-256-256-10 MLP on MNIST by backpropagation: what EGGROLL is compared with.

python mnist_backprop.py            # 10 epochs of SGD
python mnist_backprop.py --quick    # a few seconds
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll import MLP, BackendError
from eggroll.backends import choose_backend
from lab import cli, data
from lab.cli import SharedConfig
from lab.optim import make_optimizer, step
from lab.training import Members, Training

METHOD = "backprop"

# What runs where no flag says otherwise. An epoch of mnist-sample is 32 steps, so it gets more.
PRESETS = {
    "full": {"epochs": 10, "lr": 0.05, "label_smoothing": 0.1},
    "quick": {"epochs": 2, "lr": 0.05, "label_smoothing": 0.1},
    "full-sample": {"epochs": 30, "lr": 0.05, "label_smoothing": 0.1},
    "quick-sample": {"epochs": 10, "lr": 0.05, "label_smoothing": 0.1},
}


@dataclass(frozen=True)
class BackpropFlags:
    """How the gradient is computed."""

    backend: Literal["eager", "compile"] = "eager"
    """compile: torch.compile, which on a CUDA GPU replays the step as a captured graph."""


@dataclass(frozen=True)
class Config(SharedConfig):
    """Train the MLP on MNIST by backpropagation."""

    backprop: BackpropFlags = field(default_factory=BackpropFlags)


def resolve(config: Config) -> Config:
    """The settings of this run, with the preset's where no flag was typed."""
    return cli.apply_preset(config, PRESETS[preset_name(config)])


def preset_name(config: Config) -> str:
    name = "quick" if config.run.quick else "full"
    return name + ("-sample" if config.data.dataset == data.SAMPLE else "")


def make_loss(
    network: MLP, label_smoothing: float, backend: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """Images (B, 784) and labels (B,) to the mean cross-entropy."""

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(network(images), labels, label_smoothing=label_smoothing)

    if backend == "eager":
        return loss_of
    # reduce-overhead is torch's name for captured graphs; on a CPU it changes nothing
    return torch.compile(loss_of, dynamic=False, mode="reduce-overhead")


def train(config: Config, device: torch.device) -> None:
    """One run, from the data to its files."""
    digits = data.load_for(config.data, device)
    network = MLP(**vars(config.network), seed=config.run.seed).to(device)
    optimizer = make_optimizer(network, config.training)

    backend = choose_backend(config.backprop.backend, device)
    loss_of = make_loss(network, config.training.label_smoothing, backend)

    members = Members(backend=backend)
    with Training(METHOD, config, digits, network, optimizer, device, members) as training:
        with training.warm_up() as (images, labels):
            loss_of(images, labels).backward()
        for images, labels in training.batches():
            loss = loss_of(images, labels)
            optimizer.zero_grad()
            loss.backward()
            step(optimizer, config.training)
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
    cli.run_script(main, "mnist_backprop.py", errors=(BackendError,))
