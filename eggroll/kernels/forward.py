"""Forward of a chunk of the population by kernels: the twin of `eggroll.population.Chunk`.

Nothing waits for the device or copies to it, so a CUDA graph may record these calls, and be
replayed after `key` and `sigma` are overwritten in place.

Letters: P members, N = stop - start antithetic pairs, B examples, R rank, O/I outputs/inputs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eggroll.kernels.check import KernelError, check_key, check_layer, check_sigma
from eggroll.kernels.hidden import hidden_own, hidden_shared
from eggroll.kernels.mlp import fits, mlp
from eggroll.kernels.project import project_own, project_shared
from eggroll.model import MLP


@torch.no_grad()
def forward(
    network: MLP,
    inputs: Tensor,  # (B, I)
    *,
    key: Tensor,  # int64 (2,): seed, step
    start: int,
    stop: int,
    rank: int,
    sigma: Tensor,  # float32 ()
    fuse: bool = True,
) -> Tensor:
    """Logits (P, B, 10) of the members of pairs start..stop.

    `fuse` takes all layers in one kernel where they fit; False goes layer by layer.
    Raises KernelError.
    """
    noise = {"key": key, "start": start, "stop": stop, "rank": rank, "sigma": sigma}
    if fuse and fits(network):
        for layer in network.layers:
            check_layer(layer)
        _check(inputs, network.layers[0], key, sigma)
        return mlp(network, inputs, **noise)
    x = inputs.expand(2 * (stop - start), *inputs.shape)
    last = len(network.layers) - 1
    for index, layer in enumerate(network.layers):
        gelu = index < last and network.activation is F.gelu
        x = linear(layer, x, layer_index=index, gelu=gelu, **noise)
        if index < last and not gelu:
            x = network.activation(x)
    return x


@torch.no_grad()
def linear(
    layer: nn.Linear,
    x: Tensor,  # (P, ..., I)
    *,
    key: Tensor,  # int64 (2,): seed, step
    layer_index: int,
    start: int,
    stop: int,
    rank: int,
    sigma: Tensor,  # float32 ()
    gelu: bool = False,
) -> Tensor:
    """Outputs (P, ..., O) of one layer for the members of pairs start..stop, GELU'd if asked.

    For any network's `linear(layer, x)` seam. A first axis of stride 0 means that all members
    share one input. Raises KernelError.
    """
    check_layer(layer)
    _check(x, layer, key, sigma)
    pairs = stop - start
    if x.shape[0] != 2 * pairs:
        raise KernelError(
            f"linear() got {tuple(x.shape)}; the first axis must be the {2 * pairs} members"
        )
    place = {"key": key, "layer_index": layer_index, "start": start}
    epilogue = {**place, "sigma": sigma, "gelu": gelu}
    if x.stride(0) == 0:
        flat = x[0].reshape(-1, x.shape[-1]).contiguous()
        u = project_shared(flat, stop=stop, rank=rank, **place)
        y = hidden_shared(flat @ layer.weight.T, u, layer.bias, **epilogue)
    else:
        flat = x.reshape(pairs, -1, x.shape[-1]).contiguous()  # both signs of a pair in a row
        u = project_own(flat, rank=rank, **place)
        y = hidden_own(flat, layer.weight, u, layer.bias, **epilogue)
    return y.view(*x.shape[:-1], layer.out_features)


def _check(x: Tensor, layer: nn.Linear, key: Tensor, sigma: Tensor) -> None:
    check_key(key)
    check_sigma(sigma)
    if x.dtype != layer.weight.dtype:
        raise KernelError(
            f"inputs are {x.dtype} and weights {layer.weight.dtype} "
            f"(try inputs.to({layer.weight.dtype}))"
        )
