"""What stands between two layers, by name: with a gradient, and without one.

sign, step, argmax-k and int8-round are flat between their jumps. Autograd's gradient through them
is zero, so backprop moves the last layer alone; a population only ever looks at what comes out.

Letters: H units of a hidden layer.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]  # (..., H) -> (..., H)

ACTIVATIONS = ("gelu", "relu", "sign", "step", "argmax-k", "int8-round")

INT8_SCALE, INT8_MOST = 16, 127  # int8 stands for steps of 1 / 16, so for -7.94 to 7.94


def make_activation(name: str, active_units: int) -> Activation:
    """The activation of that name, (..., H) to (..., H).

    active_units  of argmax-k alone: how many units of each example are on

    Raises ValueError for another name.
    """
    functions = {
        "gelu": F.gelu,
        "relu": F.relu,
        "sign": torch.sign,
        "step": step,
        "argmax-k": partial(argmax_k, k=active_units),
        "int8-round": int8_round,
    }
    if name not in functions:
        raise ValueError(f"activation {name!r} is not known (try {', '.join(ACTIVATIONS)})")
    return functions[name]


def step(x: Tensor) -> Tensor:
    """1 above 0, else 0."""
    return (x > 0).to(x.dtype)


def argmax_k(x: Tensor, k: int) -> Tensor:
    """1 for the k largest units of each example, else 0. By how much they lead is lost.

    Where units tie for the last place, all of them are on.
    """
    least = x.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return (x >= least).to(x.dtype)


def int8_round(x: Tensor) -> Tensor:
    """GELU, rounded to the 255 numbers that an int8 in steps of 1 / 16 can hold."""
    return (F.gelu(x) * INT8_SCALE).round().clamp(-INT8_MOST, INT8_MOST) / INT8_SCALE
