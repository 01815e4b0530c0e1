"""The seam between members and a network: what a population adds where F.linear is called.

A member never owns weights. While a population is evaluated a `Perturbed` mode is active, and every
call of F.linear with an evolving weight passes through it. The network itself is an ordinary
nn.Module and stays as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from eggroll.moved import formed

# (call number, position of the weight, bias, what the layer reads, its unperturbed product)
Visit = Callable[[int, int, Tensor | None, Tensor, Callable[[], Tensor]], Tensor]

_active: list["Perturbed"] = []


class Perturbed(TorchFunctionMode):
    """Hands every call of F.linear with one of `weights` (found by identity) to `visit`.

    Calls are numbered in the order in which the network makes them.
    """

    def __init__(self, weights: Sequence[Tensor], visit: Visit):
        self.weights, self.visit, self.calls = weights, visit, 0

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, product: Callable[[], Tensor]
    ) -> Tensor:
        for index, known in enumerate(self.weights):
            if weight is known:
                self.calls += 1
                return self.visit(self.calls - 1, index, bias, x, product)
        return product()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            return self.linear(
                named["input"], named["weight"], named.get("bias"), lambda: func(*args, **kwargs)
            )
        return func(*args, **kwargs)


def linear(
    x: Tensor,  # (..., I)
    weight: nn.Parameter,  # (O, I): the one that evolves
    bias: Tensor | None = None,  # (O,)
    *,
    computes: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """F.linear for a layer that multiplies by a function of its weight: its signs, its int8 values.

    `computes(x, weight, bias)` is what the layer does by itself, (..., O). Members perturb what it
    multiplies by, so the estimate is that of the multiplied matrix (straight-through).
    """

    def product() -> Tensor:
        return computes(x, weight, bias)

    if not _active:
        return product()
    if torch.compiler.is_compiling():
        return _active[-1].linear(x, weight, bias, product)
    with _pop_mode_temporarily():  # as inside of __torch_function__: no call in here is for it
        return _active[-1].linear(x, weight, bias, product)


def through(network: nn.Module, weights: Sequence[Tensor], visit: Visit, inputs: Tensor) -> Tensor:
    """The network's outputs, with every call of an evolving weight handed to `visit`."""
    mode = Perturbed(weights, visit)
    _active.append(mode)
    try:
        with mode:
            return network(inputs)
    finally:
        _active.pop()


@dataclass(frozen=True)
class Call:
    """What the unperturbed network did in one call of an evolving layer."""

    index: int  # of the weight among the evolving ones
    bias: Tensor | None
    x: Tensor  # (B, ..., I): what the layer read
    y: Tensor  # (1, B, ..., O): what it wrote


def record(
    network: nn.Module, weights: Sequence[Tensor], inputs: Tensor
) -> tuple[list[Call], Tensor]:
    """Every call of the unperturbed network, and its outputs (1, B, ...), for inputs (B, ...)."""
    calls: list[Call] = []

    def visit(call, index, bias, x, product):
        y = product()
        # copies: an in-place activation or skip would write into what is remembered
        calls.append(Call(index, bias, x[0].clone(), y.clone()))
        return y

    outputs = through(network, weights, visit, inputs.unsqueeze(0))
    return calls, outputs


def forward(
    network: nn.Module,
    weights: Sequence[Tensor],
    known: Sequence[Tensor],  # products of the first calls, as `record` remembers them
    add: Callable[[int, int, Tensor | None, Tensor, Tensor], Tensor],
    inputs: Tensor,  # (1, B, ...), or (P, B, ...) for a network that wants all members at once
) -> Tensor:
    """Outputs (P, B, ...) of members whose terms `add(call, index, bias, x, y)` adds to y."""

    def visit(call, index, bias, x, product):
        if call >= len(known):
            return add(call, index, bias, x, product())
        y = known[call].expand(len(inputs), *known[call].shape[1:])
        return add(call, index, bias, x, y.clone())

    return formed(through(network, weights, visit, inputs))
