"""Compare the operations of training on a device with float64 on the CPU.

Releases of PyTorch have computed wrongly on MPS without an error, mostly where an operand is not
contiguous: PyTorch issues 118115 (addcdiv_), 122045 and 162730 (linear).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from experiment.errors import UserError

# Of the largest value; sums of 784 products in float32 are within 1e-6
TOLERANCE = 1e-3

# B = 128 examples, 784 inputs, 256 units in 32 blocks of 8, 3 directions of rank 2
SHAPES = {
    "x": (128, 784),
    "weight": (256, 784),
    "columns": (784, 256),
    "y": (1, 128, 256),
    "u": (3, 2, 128),
    "a": (3, 2, 256),
    "rows": (3, 1, 256),
    "scores": (3, 32, 128),
}
Tensors = dict[str, Tensor]


def product(t: Tensors) -> Tensor:
    return F.linear(t["x"], t["weight"])


def product_with_a_transposed_weight(t: Tensors) -> Tensor:
    return F.linear(t["x"], t["columns"].T)


def perturbation_of_low_rank(t: Tensors) -> Tensor:
    return torch.baddbmm(t["y"], t["u"].mT, t["a"])


def move_of_each_unit(t: Tensors) -> Tensor:
    return torch.addcmul(t["y"], t["y"].transpose(1, 2).contiguous().mT, t["rows"])


def members_of_each_block(t: Tensors) -> Tensor:
    moved = (t["rows"] * t["y"]).unflatten(-1, (32, 8)).movedim(-2, 0)
    return torch.bmm(moved.flatten(1, -2), t["weight"][:, :256].T.unflatten(0, (32, 8)))


def gradient(t: Tensors) -> Tensor:
    rows = t["rows"].unflatten(-1, (32, 8)).squeeze(1)
    delta = torch.einsum("nkb,nkg->bkg", t["scores"], rows).flatten(-2)
    return delta.T @ t["x"]


def update_in_place(t: Tensors) -> Tensor:
    gradient = t["weight"]
    return t["columns"].T.addcmul_(gradient, gradient).addcdiv_(gradient, gradient.square() + 1)


OPERATIONS: list[Callable[[Tensors], Tensor]] = [
    product,
    product_with_a_transposed_weight,
    perturbation_of_low_rank,
    move_of_each_unit,
    members_of_each_block,
    gradient,
    update_in_place,
]


def check_device(device: torch.device) -> None:
    """Raise UserError where a device computes one of OPERATIONS wrongly, or not at all."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for operation in OPERATIONS:
        name = operation.__name__.replace("_", " ")
        expected = operation({key: tensor.double() for key, tensor in tensors.items()})
        try:
            found = operation({key: tensor.clone().to(device) for key, tensor in tensors.items()})
            difference = (found.cpu() - expected).abs().max() / expected.abs().max()
        except RuntimeError as error:
            reason = f"cannot compute ({name}: {str(error)[:150]})"
        else:
            if difference < TOLERANCE:  # not where it is nan
                continue
            reason = f"computes wrongly ({name}, by {difference:.0%} of the largest value)"
        raise UserError(
            f"{device.type} on this machine, with torch {torch.__version__}, {reason}: "
            "try --device cpu"
        )
