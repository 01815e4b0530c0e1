"""What the kernels can be given; anything else is refused before a launch."""

import torch
from torch import Tensor, nn

from eggroll.kernels import tiles


class KernelError(ValueError):
    """Arguments that the kernels cannot serve: a dtype, a shape or a key."""


def check_layer(layer: nn.Linear) -> None:
    """Raises KernelError for weights that are neither float32 nor bfloat16, or not contiguous."""
    if layer.weight.dtype not in tiles.TRITON:
        raise KernelError(
            f"weights are {layer.weight.dtype}; the kernels take float32 and bfloat16 "
            "(try network.bfloat16())"
        )
    if not layer.weight.is_contiguous():
        raise KernelError("weights are not contiguous (try layer.weight.data.contiguous())")


def check_key(key: Tensor) -> None:
    """Raises KernelError for a key that is not torch.tensor([seed, step])."""
    if key.dtype != torch.int64 or key.shape != (2,) or not key.is_contiguous():
        raise KernelError(
            f"key is {key.dtype} of shape {tuple(key.shape)} "
            "(try torch.tensor([seed, step], device=device))"
        )


def check_sigma(sigma: Tensor) -> None:
    """Raises KernelError for a sigma that is not one float32 on the device."""
    if not isinstance(sigma, Tensor) or sigma.dtype != torch.float32 or sigma.numel() != 1:
        raise KernelError(f"sigma is {sigma!r} (try torch.tensor(0.02, device=device))")
