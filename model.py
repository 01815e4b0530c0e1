"""The network of the experiment, and the activations between its layers."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def step(x: Tensor) -> Tensor:
    """Return 1 above 0, else 0."""
    return (x > 0).to(x.dtype)


def argmax_k(x: Tensor) -> Tensor:
    """Return 1 for the largest quarter of each example's units (all that tie), else 0."""
    return (x >= kth_largest(x, -(-x.shape[-1] // 4))).to(x.dtype)


def kth_largest(x: Tensor, k: int) -> Tensor:
    """(..., H) to (..., 1). NumPy's selection is six times as fast as torch's on a CPU."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return x.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    place = x.shape[-1] - k
    return torch.from_numpy(np.partition(x.detach().numpy(), place)[..., place : place + 1])


def int8_round(x: Tensor) -> Tensor:
    """Return GELU rounded to steps of 1 / 16 and clamped to what an int8 of them holds."""
    return (F.gelu(x) * 16).round().clamp(-127, 127) / 16


# (..., H) -> (..., H). The last four are piecewise constant: autograd's gradient through them is
# zero, and backprop trains the last layer alone.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "sign": torch.sign,
    "step": step,
    "argmax-k": argmax_k,
    "int8-round": int8_round,
}


class MLP(nn.Module):
    """784-256-256-10 with GELU by default.

    hidden_dim  units in both hidden layers, or a sequence with those of each, of any length
    activation  one of ACTIVATIONS, between the layers
    seed        of the initial weights: He's normal (fan-in); biases are 0. They are drawn on the
                CPU from a generator of their own, so that a seed gives the same network on every
                device
    init_scale  factor on the initial weights
    """

    def __init__(
        self,
        in_features: int = 784,
        hidden_dim: int | Sequence[int] = 256,
        out_features: int = 10,
        *,
        activation: str = "gelu",
        bias: bool = False,
        seed: int = 0,
        init_scale: float = 1.0,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation}"
            )
        self.activation = ACTIVATIONS[activation]
        hidden = [hidden_dim] * 2 if isinstance(hidden_dim, int) else hidden_dim
        sizes = [in_features, *hidden, out_features]
        layers = [nn.Linear(i, o, bias=bias) for i, o in pairwise(sizes)]
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            with torch.no_grad():
                layer.weight.mul_(init_scale)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (..., 10) of inputs (..., 784)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)


def mlp_of(config: Any) -> MLP:
    """Return the MLP that a script's flags describe; int8 has no flags activation and bias."""
    names = ("hidden_dim", "activation", "bias", "seed", "init_scale")
    return MLP(**{name: getattr(config, name) for name in names if hasattr(config, name)})
