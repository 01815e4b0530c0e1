"""The one network of the experiment, and the one seam through which a population perturbs it."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from eggroll.activations import make_activation
from eggroll.binary import BinaryLinear

Linear = Callable[[nn.Linear, Tensor], Tensor]


def plain_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The unperturbed layer: what backprop and evaluation pass through the seam."""
    return layer(x)


class MLP(nn.Module):
    """784-256-256-10 with GELU by default: every weight matrix is reached through `linear`.

    Backprop and evaluation call the network plainly. A population hands in a `linear` that adds
    each member's low-rank term, and every tensor inside then has a leading population axis.

    activation    one of eggroll.activations.ACTIVATIONS
    active_units  of argmax-k alone: units that are on, by default a quarter of the layer's
    binary_weights  every layer computes with the signs of its weights (eggroll.binary)
    """

    def __init__(
        self,
        in_features: int = 784,
        hidden_dim: int = 256,
        out_features: int = 10,
        *,
        activation: str = "gelu",
        active_units: int | None = None,
        binary_weights: bool = False,
        bias: bool = False,
        init: str = "he",
        seed: int = 0,
    ):
        super().__init__()
        sizes = [in_features, hidden_dim, hidden_dim, out_features]
        kind = BinaryLinear if binary_weights else nn.Linear
        self.layers = nn.ModuleList(kind(i, o, bias=bias) for i, o in pairwise(sizes))
        self.activation = make_activation(activation, active_units or -(-hidden_dim // 4))
        initialise(self.layers, init, seed)

    def forward(self, x: Tensor, linear: Linear = plain_linear) -> Tensor:
        """Logits (..., 10) of inputs (..., 784)."""
        *hidden, head = self.layers
        for layer in hidden:
            x = self.activation(linear(layer, x))
        return linear(head, x)


def initialise(layers: nn.ModuleList, init: str, seed: int) -> None:
    """Draw every weight afresh from `seed`: "he" (normal, fan-in) or "orthogonal"; biases are 0.

    "zero-head" is "he" with a last layer of zeros: all logits are equal at the start.

    Drawn on the CPU with a generator of its own, so that a seed gives the same network on every
    device and no global random state is touched.
    """
    if init not in ("he", "orthogonal", "zero-head"):
        raise ValueError(f"init {init!r} is not known (try 'he', 'orthogonal' or 'zero-head')")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        if init != "orthogonal":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        else:
            # sqrt(2) keeps the signal's scale through a rectifier-like activation, as He does
            nn.init.orthogonal_(layer.weight, gain=math.sqrt(2), generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    if init == "zero-head":
        nn.init.zeros_(layers[-1].weight)
