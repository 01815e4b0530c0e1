"""Signs as int8, drawn without a floating number.

Letters: M members, O a layer's outputs, G groups of examples.
"""

from functools import lru_cache

import torch
from torch import Tensor

from eggroll.directions import hadamard, order_of, random_signs

KINDS = ("orthogonal", "rademacher")


def draw_integer_directions(
    kind: str, groups: int, members: int, outputs: int, like: Tensor, generator: torch.Generator
) -> Tensor:
    """A for every member of each group, (G, M, O), of KINDS as eggroll.directions has them.

    Raises ValueError for more orthogonal members than there are orthogonal rows.
    """
    if kind == "rademacher":
        return random_signs((groups, members, outputs), like, generator)
    matrix = _int8_hadamard(order_of(outputs), like.device)[:, :outputs]
    if members > len(matrix):
        raise ValueError(f"{members} rows of {len(matrix)}: there are no more orthogonal ones")
    keys = torch.empty(groups, len(matrix), dtype=torch.int64, device=like.device)
    chosen = keys.random_(generator=generator).argsort(dim=1)[:, :members]
    return matrix[chosen] * random_signs((groups, 1, outputs), like, generator)


@lru_cache(maxsize=8)
def _int8_hadamard(order: int, device: torch.device) -> Tensor:
    return hadamard(order).to(device, torch.int8)
