"""torch's optimizers, schedules and weight averages, chosen by flags."""

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lab.cli import TrainingFlags

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
}


def make_optimizer(network: nn.Module, flags: TrainingFlags) -> torch.optim.Optimizer:
    options = {"lr": flags.lr, "weight_decay": flags.weight_decay}
    if flags.optimizer in ("sgd", "rmsprop"):
        options["momentum"] = flags.momentum
    return OPTIMIZERS[flags.optimizer](network.parameters(), **options)


def step(optimizer: torch.optim.Optimizer, flags: TrainingFlags) -> None:
    """Follow what is in `.grad`, no further than --clip-norm."""
    if flags.clip_norm:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, flags.clip_norm)
    optimizer.step()


def make_schedule(
    optimizer: torch.optim.Optimizer, flags: TrainingFlags, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """A schedule that is stepped after every step of the optimizer, whatever its period."""
    total = flags.epochs * steps_per_epoch
    if flags.lr_schedule == "linear":
        return lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=total)
    if flags.lr_schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    decay = flags.lr_decay if flags.lr_schedule == "exponential" else 1.0
    return lr_scheduler.LambdaLR(optimizer, lambda step: decay ** (step // steps_per_epoch))


class AveragedWeights:
    """An average of the weights over training, that evaluation can use in their place."""

    def __init__(self, network: nn.Module, flags: TrainingFlags, total_steps: int):
        ema = get_ema_multi_avg_fn(flags.ema_decay) if flags.average_weights == "ema" else None
        self.model = AveragedModel(network, multi_avg_fn=ema)
        # the equal average leaves out the start, whose weights are far from the end's
        self.first = 0 if ema else int(flags.average_start * total_steps)

    def update(self, network: nn.Module, step: int) -> None:
        """After step number `step`; before the average begins it is the network itself."""
        if step <= self.first + 1:
            self.model.n_averaged.zero_()  # the next update then copies
        self.model.update_parameters(network)
