"""Directions, and the members that split off from them.

A direction is one perturbation of all units of a layer's output. It serves K members, one for each
block of G units: what follows elementwise is computed once per direction, and at the next linear
layer each member takes its own block of the direction and the unperturbed values elsewhere. So
P = K n members cost n directions. Where units mix before the next linear layer, or none follows,
K is 1: a member perturbs all units of the layer.

Shapes: n directions, K blocks, G units of a block, P members, B examples, I / O inputs / outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Product = Callable[[Tensor], Tensor]  # a layer's own output (..., O) of x (..., I)


class PopulationError(ValueError):
    """Invalid population settings, or a network that a population cannot run through."""


class Call(NamedTuple):
    """A call of a layer in the unperturbed forward pass."""

    layer: int
    x: Tensor  # (1, B, ..., I)
    y: Tensor  # (1, B, ..., O)


@dataclass
class Layer:
    """An nn.Linear of the network, and what is known of it after a forward pass."""

    module: nn.Linear
    calls: dict[int, Call] = field(default_factory=dict)  # by position among all calls
    splits: frozenset[int] = frozenset()  # positions of the calls where its members split off
    expand: bool = False  # inputs need one row per member: a leading axis of 1 does not broadcast

    @property
    def evolves(self) -> bool:
        # integer tensors cannot require a gradient
        weight = self.module.weight
        return bool(self.calls) and (weight.requires_grad or not weight.is_floating_point())

    @property
    def outputs(self) -> int:
        return self.module.out_features

    @property
    def inputs(self) -> int:
        """Inputs, with the one that the bias stands for."""
        return self.module.in_features + self.has_bias

    @property
    def has_bias(self) -> bool:
        return self.module.bias is not None and self.module.bias.requires_grad

    def product(self, x: Tensor) -> Tensor:
        """Return the layer's own output, (..., O), of x (..., I)."""
        return type(self.module).forward(self.module, x)

    def product_in_float32(self, x: Tensor) -> Tensor:
        """Return the layer's own output in float32, (..., O), where autocast would round it."""
        linear = self.module
        with torch.autocast(x.device.type, enabled=False):
            if type(linear) is not nn.Linear or not x.is_cuda or x.dtype == torch.float32:
                return self.product(x.float())
            weight = linear.weight.to(x.dtype).T
            y = torch.mm(x.flatten(0, -2), weight, out_dtype=torch.float32)  # no copy of x
            y = y if linear.bias is None else y + linear.bias
            return y.view(*x.shape[:-1], self.outputs)

    def with_one(self, x: Tensor) -> Tensor:
        """Append the input that the bias stands for, which is always 1."""
        return torch.cat([x, torch.ones_like(x[..., :1])], -1) if self.has_bias else x


class Draw(NamedTuple):
    """Directions whose noise is drawn together, from one key for each layer."""

    layers: tuple[int, ...]  # that each member perturbs
    number: int  # of the draw, among those of these layers
    directions: int
    blocks: int  # members of a direction
    start: int  # of its members in the step's scores
    first_call: int  # position of the first call that is perturbed
    splits: frozenset[int] = frozenset()  # positions of the calls where members split off
    units: int = 0  # of a block

    @property
    def members(self) -> int:
        return self.directions * self.blocks


class Chunk(NamedTuple):
    """Directions of a draw that are evaluated together."""

    draw: Draw
    directions: slice

    @property
    def members(self) -> slice:
        """Their place in the step's scores."""
        start, blocks = self.draw.start, self.draw.blocks
        return slice(start + self.directions.start * blocks, start + self.directions.stop * blocks)

    def by_direction(self, scores: Tensor) -> Tensor:
        """Order scores (K n, ...), which come block by block, direction by direction."""
        return scores.unflatten(0, (self.draw.blocks, -1)).transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True)
class Blocks:
    """Shared by the estimators whose members perturb one block of units of one layer.

    population  a number, for which every layer gets the same number of directions; or a count for
                each layer, in the order of registration. At least one direction for each layer
    """

    population: int | tuple[int, ...]
    sigma: float
    units: int

    def __post_init__(self):
        counts = self.population if isinstance(self.population, tuple) else (self.population,)
        if min(counts, default=0) < 1:
            raise PopulationError(f"population must be at least 1, got {self.population}")
        if not self.sigma > 0:
            raise PopulationError(f"sigma must be > 0, got {self.sigma}")
        if self.units < 1:
            raise PopulationError(f"units must be at least 1, got {self.units}")

    def blocks(self, layer: Layer) -> int:
        """K of a layer: 1 where its members cannot split off."""
        return -(-layer.outputs // self.units) if layer.splits else 1

    def block_units(self, layer: Layer) -> int:
        """G of a layer."""
        return self.units if self.blocks(layer) > 1 else layer.outputs

    def rounded(self, directions: float, layer: Layer) -> int:
        """Return a number of directions that the layer can have."""
        return max(round(directions), 1)

    def draws(self, layers: Mapping[int, Layer]) -> list[Draw]:
        """Plan one draw per layer. Raises PopulationError for counts of other layers."""
        blocks = [self.blocks(layer) for layer in layers.values()]
        if isinstance(self.population, int):
            wanted = [self.population / sum(blocks)] * len(layers)
        elif len(self.population) == len(layers):
            wanted = [count / k for count, k in zip(self.population, blocks, strict=True)]
        else:
            raise PopulationError(
                f"population {self.population} has {len(self.population)} counts, and the network "
                f"has {len(layers)} layers that evolve (try a number, {sum(self.population)})"
            )
        draws, start = [], 0
        for (index, layer), k, directions in zip(layers.items(), blocks, wanted, strict=True):
            n, splits = self.rounded(directions, layer), layer.splits if k > 1 else frozenset()
            place = start, min(layer.calls)
            draws.append(Draw((index,), 0, n, k, *place, splits, self.block_units(layer)))
            start += draws[-1].members
        return draws

    def split(self, layer: Layer, x: Tensor, draw: Draw, product: Product) -> Tensor:
        """Output (K n, B, ..., O) for each block of each direction, from x (1 + n, B, ..., I).

        A member's input is the unperturbed x[0] but for its own block, so only that is multiplied.
        product  returns the layer's own output, (1, B, ..., O), of x[:1]
        """
        y, blocks = product(x[:1]), (draw.blocks, draw.units)
        moved = pad(x[1:] - x[:1], draw.units).unflatten(-1, blocks).movedim(-2, 0)
        columns = pad(layer.module.weight, draw.units).T.unflatten(0, blocks)  # (K, G, O)
        products = torch.bmm(moved.flatten(1, -2), columns).view(-1, *y.shape[1:])
        return products.add_(y) if products.dtype == y.dtype else products + y


def pad(x: Tensor, size: int) -> Tensor:
    """Pad the last axis with zeros to a multiple of `size`."""
    return F.pad(x, (0, -x.shape[-1] % size)) if x.shape[-1] % size else x
