"""torch's optimizers and schedules, chosen by flags."""

from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from experiment.config import Config, FloatConfig

OF_THE_DEVICE = ("fused", "capturable")  # options that depend on it
WARM_UP = 0.2  # part of a onecycle schedule in which the learning rate rises


class Scaled(float):
    """A preset's learning rate, which a script adapts to other flags; a typed one is no Scaled."""


def make_optimizer(network: nn.Module, config: FloatConfig) -> torch.optim.Optimizer:
    """Return the optimizer that the flags name; on CUDA one that a graph can contain."""
    weights = list(network.parameters())
    cuda = weights[0].is_cuda
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": cuda}
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(weights, momentum=config.momentum, **options)
        case "adam":
            return torch.optim.Adam(weights, **options, capturable=cuda)
        case "adamw":
            return torch.optim.AdamW(weights, **options, capturable=cuda)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state that may have been saved on another device."""
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        saved.update((name, own[name]) for name in OF_THE_DEVICE if name in own)
    optimizer.load_state_dict(state)


def make_schedule(
    optimizer: torch.optim.Optimizer, config: Config, steps: int
) -> lr_scheduler.LRScheduler:
    """Return the learning rate's schedule over `steps` steps of the optimizer."""
    match config.schedule:
        case "linear":
            return lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        case "onecycle":  # one step more than are taken, since the last one has a rate of almost 0
            return lr_scheduler.OneCycleLR(
                optimizer, config.lr, steps + 1, pct_start=WARM_UP, cycle_momentum=False
            )
        case "constant":
            return lr_scheduler.ConstantLR(optimizer, 1.0)
