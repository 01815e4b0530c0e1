"""The `linear` that a population hands to a network: W x plus each member's low-rank term.

Letters: P members, N pairs, B examples, R rank, O/I a layer's outputs/inputs.
"""

import torch
from torch import Tensor, nn

from eggroll.noise import LayerNoise, block_size


class PopulationError(ValueError):
    """A population that cannot be, or a network that it cannot perturb."""


def index_of(layer: nn.Linear, layers: list[nn.Linear]) -> int:
    """Which of the evolving layers this is. Raises PopulationError where it is none of them."""
    for index, known in enumerate(layers):
        if known is layer:
            return index
    raise PopulationError(
        f"linear() got {layer}, which is not an nn.Linear of the evolving network"
    )


def check_calls(layers: list[nn.Linear], called: list[bool]) -> None:
    """Raises PopulationError for a layer that the network did not call through `linear`."""
    for layer, was_called in zip(layers, called, strict=True):
        if not was_called:
            raise PopulationError(
                f"{layer} was not called through linear(); write linear(layer, x) "
                "instead of layer(x) in the network's forward"
            )


class PerturbedLinear:
    """y = x W^T +- (sigma / sqrt(R)) (x b^T) a for every member; W + sigma E is never formed.

    layers  every nn.Linear that evolves
    noise   the perturbation of each, for the same N pairs
    sigma   scale of the perturbations; a 0-d tensor where a compiled graph must not be tied to it

    Source: section 4 of the paper.
    """

    def __init__(self, layers: list[nn.Linear], noise: list[LayerNoise], sigma: float | Tensor):
        self.layers, self.noise, self.sigma = layers, noise, sigma
        self.called = [False] * len(layers)

    def __call__(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """x (P, ..., I) -> (P, ..., O)."""
        noise = self._noise_of(layer)
        pairs = len(noise)
        if x.shape[0] != 2 * pairs:
            raise PopulationError(
                f"linear() got {tuple(x.shape)}; the first axis must be the {2 * pairs} members "
                "(does the network move or merge its leading axis?)"
            )
        if x.stride(0) == 0:
            y = self._shared_input(layer, noise, x[0])
        else:
            y = self._own_input(layer, noise, x)
        if noise.bias is not None:
            signed = torch.stack([noise.bias, -noise.bias], dim=1).flatten(0, 1)
            y += self.sigma * signed.view(-1, *[1] * (y.dim() - 2), y.shape[-1])
        return y

    def check_every_layer_was_called(self) -> None:
        check_calls(self.layers, self.called)

    def _noise_of(self, layer: nn.Linear) -> LayerNoise:
        """A layer that is called twice keeps its noise."""
        index = index_of(layer, self.layers)
        self.called[index] = True
        return self.noise[index]

    def _shared_input(self, layer: nn.Linear, noise: LayerNoise, x: Tensor) -> Tensor:
        """Every member has the same x, (..., I): one base product and one x b^T serve them all."""
        pairs, _, out_features = noise.a.shape
        flat = x.reshape(-1, x.shape[-1])
        base = layer(flat)
        term = _product(_project_shared(flat, noise.b) * self._scale(noise), noise.a)
        # both signs share the term: the negative member costs a subtraction
        if torch.compiler.is_compiling():
            y = torch.stack([base + term, base - term], dim=1)
        else:
            y = term.new_empty(pairs, 2, *base.shape)
            torch.add(base, term, out=y[:, 0])
            torch.sub(base, term, out=y[:, 1])
        return y.view(2 * pairs, *x.shape[:-1], out_features)

    def _own_input(self, layer: nn.Linear, noise: LayerNoise, x: Tensor) -> Tensor:
        """Every member has its own x, (P, ..., I): a batched product per term, pair by pair."""
        pairs, _, out_features = noise.a.shape
        flat = x.reshape(pairs, -1, x.shape[-1])  # both signs of a pair, one after the other
        projected = torch.bmm(flat, noise.b.mT)  # (N, 2B, R)
        weight = layer.weight.T.expand(pairs, -1, -1)
        if layer.bias is None:
            y = torch.bmm(flat, weight)
        else:
            y = torch.baddbmm(layer.bias, flat, weight)
        if torch.compiler.is_compiling():
            plus, minus = projected.chunk(2, dim=1)
            y = y + _product(torch.cat([plus, -minus], dim=1) * self._scale(noise), noise.a)
        else:
            projected[:, projected.shape[1] // 2 :].neg_()
            y.baddbmm_(projected, noise.a, alpha=float(self._scale(noise)))
        return y.view(*x.shape[:-1], out_features)

    def _scale(self, noise: LayerNoise) -> float | Tensor:
        return self.sigma * noise.rank_scale


def _product(projected: Tensor, a: Tensor) -> Tensor:
    """(N, B, R) by (N, R, O): (N, B, O)."""
    if not torch.compiler.is_compiling():
        return torch.bmm(projected, a)
    # the compiler fuses outer products into what follows them, and not a matrix product
    outer = (projected[:, :, r, None] * a[:, r, None, :] for r in range(a.shape[1]))
    return sum(outer, start=next(outer))


def _project_shared(x: Tensor, b: Tensor) -> Tensor:
    """x b^T for x (B, I) and b (N, R, I): (N, B, R), one product per block of noise.

    Per block and not per chunk: a product's rounding may depend on its shape, and the chunk size
    must not change a bit.
    """
    parts = [x @ part.flatten(0, 1).T for part in b.split(block_size(x.device))]
    return torch.cat(parts, dim=1).unflatten(1, (-1, b.shape[1])).transpose(0, 1)
