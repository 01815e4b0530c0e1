"""What the members of a layer read where each has moved only a few units: three states of a unit.

A unit of an example is as it was, or moved up, or moved down, whichever member moved it. So what
comes between two layers and works on each unit by itself (GELU, sign, rounding) is computed three
times in place of once per member, and the next layer multiplies only what has moved:

    W h_member = W h + W[:, moved units] (h_member - h)[moved units]

Any other operation gets the members' tensor, formed. Nothing else knows: see `MovedUnits`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
# Pointwise too, though not marked so
COPIES = (aten.clone, aten._to_copy)


class MovedUnits(Tensor):
    """A tensor (P, B, ..., O) of P members, held as the states that its units can have.

    states  (3, B, ..., O): as they were, moved up, moved down
    signs   (P, 1, ..., G): +1 up or -1 down, of the G units of a member's block
    blocks  (P,): which G neighbouring units those are
    """

    @staticmethod
    def __new__(cls, states: Tensor, signs: Tensor, blocks: Tensor):
        shape = (len(signs), *states.shape[1:])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=states.dtype, device=states.device)

    def __init__(self, states: Tensor, signs: Tensor, blocks: Tensor):
        self.states, self.signs, self.blocks = states, signs, blocks
        self.whole: Tensor | None = None  # once it was formed: another operation may write into it

    def __repr__(self) -> str:
        return f"MovedUnits({tuple(self.shape)}, {self.dtype})"

    def formed(self) -> Tensor:
        """The tensor that it stands for."""
        if self.whole is None:
            before, up, down = self.states.split(1)
            signs = spread(self.signs, self.blocks, self.shape[-1])
            self.whole = torch.where(signs == 0, before, torch.where(signs > 0, up, down))
        return self.whole

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function that works on each unit by itself, at once for all three states."""
        if self.whole is None:
            return MovedUnits(function(self.states), self.signs, self.blocks)
        return function(self.whole)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """F.linear of it, (P, B, ..., K)."""
        if self.whole is not None:
            return F.linear(self.whole, weight, bias)
        unmoved = F.linear(self.states[0], weight, bias)
        found = torch.baddbmm(
            unmoved.flatten(0, -2), self._moves().flatten(1, -2), self._columns(weight)
        )
        return found.view(len(self), *unmoved.shape)

    def _moves(self) -> Tensor:
        """How far the units of each member's block moved, (P, B, ..., G)."""
        states = in_blocks(self.states, self.signs.shape[-1]).movedim(-2, 1)
        before, up, down = states.index_select(1, self.blocks)
        return torch.where(self.signs > 0, up, down).sub_(before)

    def _columns(self, weight: Tensor) -> Tensor:
        """Of weight (K, O), those that each member's block meets: (P, G, K)."""
        rows = in_blocks(weight, self.signs.shape[-1]).flatten(1).t().contiguous()
        return rows.view(-1, self.signs.shape[-1], len(weight)).index_select(0, self.blocks)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear and isinstance(args[0], MovedUnits):
            return args[0].linear(*args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = _of_each_state(func, args, kwargs) if _is_pointwise(func) else None
        if found is not None:
            return found
        result = func(*_formed(args), **_formed(kwargs))
        written = func._schema.is_mutable and isinstance(args[0], MovedUnits)
        return args[0] if written else result


def spread(signs: Tensor, blocks: Tensor, units: int) -> Tensor:
    """Signs (P, ..., G) in their places among all units, (P, ..., units), with zeros elsewhere."""
    size, (members, *others) = signs.shape[-1], signs.shape[:-1]
    rows = signs.new_zeros(members, -(-units // size), *others, size)
    rows[torch.arange(members, device=signs.device), blocks] = signs
    return rows.movedim(1, -2).flatten(-2)[..., :units]


def in_blocks(x: Tensor, size: int) -> Tensor:
    """x (..., O) as (..., blocks, size), the last block filled up with zeros."""
    missing = -x.shape[-1] % size
    return (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, size))


def formed(x: Any) -> Any:
    """The tensor that x stands for, if it is MovedUnits; else x."""
    return x.formed() if isinstance(x, MovedUnits) else x


def _formed(args: Any) -> Any:
    return tree_map_only(MovedUnits, formed, args)


def _is_pointwise(func: Any) -> bool:
    """Whether an operation works on each unit by itself, and always alike."""
    drawn = torch.Tag.nondeterministic_seeded in func.tags
    return func.overloadpacket in COPIES or (torch.Tag.pointwise in func.tags and not drawn)


def _of_each_state(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> MovedUnits | None:
    """A pointwise operation on the three states; None where its operands differ in more."""
    operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    moved = [x for x in operands if isinstance(x, MovedUnits)]
    first, plain = moved[0], [x for x in operands if not isinstance(x, MovedUnits)]
    shape = first.states.shape
    alike = all(x.signs is first.signs and x.whole is None for x in moved)
    alone = all(x.dim() < len(shape) or x.shape[0] == 1 for x in plain)
    if not (alike and alone) or any(x.states.shape != shape for x in moved):
        return None
    if func._schema.is_mutable and args[0] is not first:
        return None
    states = func(
        *tree_map_only(MovedUnits, lambda x: x.states, tuple(args)),
        **tree_map_only(MovedUnits, lambda x: x.states, kwargs),
    )
    if func._schema.is_mutable:
        return first
    return MovedUnits(states, first.signs, first.blocks) if states.shape == shape else None
