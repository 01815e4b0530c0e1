"""torch's optimizers and schedules, chosen by flags."""

import torch
from torch import nn
from torch.optim import lr_scheduler

from lab.cli import TrainingFlags

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
WARM_UP = 0.2  # part of a onecycle schedule in which the learning rate rises


def make_optimizer(network: nn.Module, flags: TrainingFlags) -> torch.optim.Optimizer:
    options = {"lr": flags.lr, "weight_decay": flags.weight_decay}
    if flags.optimizer == "sgd":
        options["momentum"] = flags.momentum
    return OPTIMIZERS[flags.optimizer](network.parameters(), **options)


def make_schedule(
    optimizer: torch.optim.Optimizer, flags: TrainingFlags, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """A schedule that is stepped after every step of the optimizer."""
    total = flags.epochs * steps_per_epoch
    match flags.lr_schedule:
        case "linear":
            return lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=total)
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
        case "onecycle":  # one step more than is taken: the last would have nothing to do
            return lr_scheduler.OneCycleLR(
                optimizer, flags.lr, total + 1, pct_start=WARM_UP, cycle_momentum=False
            )
        case _:
            return lr_scheduler.ConstantLR(optimizer, 1.0)
