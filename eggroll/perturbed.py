"""The `linear` that a population hands to a network: W x plus each member's low-rank term.

Letters: P members, N pairs, B examples, R rank, O/I a layer's outputs/inputs.
"""

import torch
from torch import Tensor, nn

from eggroll.binary import effective_weight
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


def shared_products(network: nn.Module, layers: list[nn.Linear], inputs: Tensor) -> list:
    """x W^T, (B, O), of each layer whose x is the same for all members; None for the others.

    Found by a look at two members without noise, for a batch of inputs (B, ...). Computed once for
    all chunks of a population.
    """
    products: list[Tensor | None] = [None] * len(layers)

    def linear(layer: nn.Linear, x: Tensor) -> Tensor:
        y = layer(x[0])
        if x.stride(0) == 0:
            products[index_of(layer, layers)] = y.reshape(-1, y.shape[-1])
        return torch.stack([y, y])

    network(inputs.expand(2, *inputs.shape), linear=linear)
    return products


class PerturbedLinear:
    """y = x W^T +- (sigma / sqrt(R)) (x b^T) a for every member; W + sigma E is never formed.

    layers  every nn.Linear that evolves
    noise   the perturbation of each, for the same N pairs
    sigma   scale of the perturbations; a 0-d tensor where a compiled graph must not be tied to it
    shared  x W^T of each layer whose x is the same for all members, as `shared_products` has it

    Source: section 4 of the paper.
    """

    def __init__(
        self,
        layers: list[nn.Linear],
        noise: list[LayerNoise],
        sigma: float | Tensor,
        shared: list[Tensor | None],
    ):
        self.layers, self.noise, self.sigma, self.shared = layers, noise, sigma, shared
        self.called = [False] * len(layers)

    def __call__(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """x (P, ..., I) -> (P, ..., O)."""
        index = index_of(layer, self.layers)
        self.called[index] = True
        noise = self.noise[index]  # a layer that is called twice keeps its noise
        pairs = len(noise)
        if x.shape[0] != 2 * pairs:
            raise PopulationError(
                f"linear() got {tuple(x.shape)}; the first axis must be the {2 * pairs} members "
                "(does the network move or merge its leading axis?)"
            )
        if x.stride(0) == 0:
            y = self._shared_input(self.shared[index], noise, x[0])
        else:
            y = self._own_input(layer, noise, x)
        if noise.bias is not None:
            signed = torch.stack([noise.bias, -noise.bias], dim=1).flatten(0, 1)
            y += self.sigma * signed.view(-1, *[1] * (y.dim() - 2), y.shape[-1])
        return y

    def check_every_layer_was_called(self) -> None:
        check_calls(self.layers, self.called)

    def _shared_input(self, base: Tensor, noise: LayerNoise, x: Tensor) -> Tensor:
        """Every member has the same x, (..., I): one base product and one x b^T serve them all."""
        pairs, _, out_features = noise.a.shape
        flat = x.reshape(-1, x.shape[-1])
        projected = _project_shared(flat, noise.b) * self._scale(noise)
        if torch.compiler.is_compiling():
            y = base + _outer_products(projected.unsqueeze(1), noise.a)
        else:
            term = torch.bmm(projected, noise.a)
            # both signs share the term: the negative member costs a subtraction
            y = term.new_empty(pairs, 2, *base.shape)
            torch.add(base, term, out=y[:, 0])
            torch.sub(base, term, out=y[:, 1])
        return y.view(2 * pairs, *x.shape[:-1], out_features)

    def _own_input(self, layer: nn.Linear, noise: LayerNoise, x: Tensor) -> Tensor:
        """Every member has its own x, (P, ..., I): a batched product per term, pair by pair."""
        pairs, _, out_features = noise.a.shape
        flat = x.reshape(pairs, -1, x.shape[-1])  # both signs of a pair, one after the other
        weight = effective_weight(layer).T.expand(pairs, -1, -1)
        if layer.bias is None:
            y = torch.bmm(flat, weight)
        else:
            y = torch.baddbmm(layer.bias, flat, weight)
        if torch.compiler.is_compiling():
            projected = _inner_products(flat, noise.b).unflatten(1, (2, -1)) * self._scale(noise)
            y = y.unflatten(1, (2, -1)) + _outer_products(projected, noise.a)
        else:
            projected = torch.bmm(flat, noise.b.mT)  # (N, 2B, R)
            projected[:, projected.shape[1] // 2 :].neg_()
            y.baddbmm_(projected, noise.a, alpha=float(self._scale(noise)))
        return y.view(*x.shape[:-1], out_features)

    def _scale(self, noise: LayerNoise) -> float | Tensor:
        return self.sigma * noise.rank_scale


# The compiler fuses sums of products into what comes before and after them, and not a matrix
# product: these two are for compiled code.


def _inner_products(x: Tensor, b: Tensor) -> Tensor:
    """x b^T for x (N, B, I) and b (N, R, I): (N, B, R)."""
    return torch.stack([(x * row.unsqueeze(1)).sum(-1) for row in b.unbind(1)], dim=-1)


def _outer_products(projected: Tensor, a: Tensor) -> Tensor:
    """+- projected a for (N, 1 or 2 signs, B, R) and (N, R, O): (N, 2, B, O)."""
    signed = torch.stack([a, -a], dim=1).unsqueeze(2)  # (N, 2, 1, R, O)
    terms = (projected[..., r, None] * signed[..., r, :] for r in range(a.shape[1]))
    return sum(terms, start=next(terms))


def _project_shared(x: Tensor, b: Tensor) -> Tensor:
    """x b^T for x (B, I) and b (N, R, I): (N, B, R), one product per block of noise.

    Per block and not per chunk: a product's rounding may depend on its shape, and the chunk size
    must not change a bit.
    """
    parts = [x @ part.flatten(0, 1).T for part in b.split(block_size(x.device))]
    return torch.cat(parts, dim=1).unflatten(1, (-1, b.shape[1])).transpose(0, 1)
