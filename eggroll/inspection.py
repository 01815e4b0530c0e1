"""Inspect a network on the first batch: its leading axis, and where members can split off."""

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from eggroll.blocks import Layer, PopulationError

# Output of a layer in the population's forward, of: position of the call, index of the layer, input
Forward = Callable[[int, int, Tensor], Tensor]
Run = Callable[[Forward, Tensor], Tensor]  # the network's outputs, whose layers compute so


def check_leading_axis(network: nn.Module, inputs: Tensor) -> None:
    """Raise PopulationError for a network that folds or moves the leading axis, the members.

    inputs  (B, ...)
    """
    apart = torch.stack([network(inputs), network(inputs.flip(0))])  # its own errors are the user's
    try:
        together = network(torch.stack([inputs, inputs.flip(0)]))
        agree = together.shape == apart.shape and _mostly_equal(together, apart)
        failure = ""
    except Exception as error:  # any shape error of any module
        agree, failure = False, f" ({' '.join(str(error).split())[:80]})"
    if not agree:
        raise PopulationError(
            f"the network must keep the leading axis of inputs {(2, *inputs.shape)}, the members"
            f"{failure}: address axes from the end (flatten(-3) for flatten(1), mean(-2) for "
            "mean(1))"
        )


def _mostly_equal(x: Tensor, y: Tensor) -> bool:
    """Compare with a tolerance, and let rounding flip a few step-like units."""
    x, y = x.float(), y.float()
    tolerance = 1e-3 * y.abs().mean() + 1e-6
    return bool(((x - y).abs() <= tolerance).float().mean() > 0.9)


class Probe:
    """A forward of the population that shows how values perturbed at one call go on.

    The call returns [y, moved, a mixture of both by unit]. Where the next nn.Linear reads the same
    mixture of its first two rows, what lies between is elementwise: members can split off there. It
    returns four rows, so that anything else that still reads three fails on the shapes.
    """

    def __init__(self, layers: list[Layer], position: int, y: Tensor):
        self.layers, self.position, self.readers, self.elementwise = layers, position, set(), True
        rng = torch.Generator().manual_seed(0)
        noise = torch.randn(y.shape, generator=rng).to(y.device) * (y.float().std() + 1)
        self.mask = (torch.rand(y.shape[-1], generator=rng) < 0.5).to(y.device)
        moved = y + noise.to(y.dtype)
        self.rows = torch.cat([y, moved, torch.where(self.mask, moved, y)])

    def __call__(self, position: int, index: int, x: Tensor) -> Tensor:
        if position == self.position:
            return self.rows
        if len(x) != len(self.rows):
            return self.layers[index].product(x)
        self.readers.add(position)
        mixed = x.shape[-1] != len(self.mask) or not _mostly_equal(
            x[2], torch.where(self.mask, x[1], x[0])
        )
        self.elementwise &= not mixed
        y = self.layers[index].product(x[:1])
        return y.expand(len(self.rows) + 1, *y.shape[1:]).clone()


def route(layer: Layer, layers: list[Layer], run: Run, inputs: Tensor) -> None:
    """Find where members of a layer split off, and whether they need inputs of their own.

    inputs  (B, ...)
    """
    position, call = next(iter(layer.calls.items()))
    probe = Probe(layers, position, call.y)
    try:
        run(probe, inputs[None])
        if probe.elementwise and len(layer.calls) == 1:
            layer.splits = frozenset(probe.readers)
    except RuntimeError:  # shapes: something else reads the perturbed values
        layer.expand = not _broadcasts(position, layers, run, inputs)


def _broadcasts(position: int, layers: list[Layer], run: Run, inputs: Tensor) -> bool:
    """Return whether inputs (1, B, ...) do where the call at `position` returns two rows."""

    def forward(at: int, index: int, x: Tensor) -> Tensor:
        y = layers[index].product(x)
        return torch.cat([y, y]) if at == position else y

    try:
        return len(run(forward, inputs[None])) == 2
    except RuntimeError:
        return False


def warn_of_fixed(network: nn.Module, evolving: Iterable[Layer]) -> None:
    """Name the parameters that no evolving layer uses."""
    evolved = {id(p) for layer in evolving for p in layer.module.parameters()}
    fixed = [name for name, p in network.named_parameters() if id(p) not in evolved]
    if fixed:
        names = ", ".join(fixed)
        warnings.warn(f"not evolved, since no nn.Linear uses them: {names}", stacklevel=4)
