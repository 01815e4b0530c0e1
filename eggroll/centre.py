"""The two `linear`s that a network meets when members perturb one layer each.

First the network runs unperturbed, once, and `Centre` remembers what each layer read and wrote.
Then, for the members of one layer, `MovedLayer` hands out what is remembered up to that layer,
moves its outputs, and lets the layers after it follow.

Letters: M members, B examples, R rank, O/I a layer's outputs/inputs, G groups of examples.
"""

import torch
from torch import Tensor, nn

from eggroll.perturbed import PopulationError, check_calls, index_of
from eggroll.population import linear_layers


class Centre:
    """The unperturbed network on one batch, inputs (B, ...).

    inputs, outputs  of each layer, (1, B, ..., I) and (1, B, ..., O)
    calls            indices of the layers in the order in which the network calls them
    result           what the network returned, (1, B, ...)

    Raises PopulationError for a layer that is not called through `linear`, or called twice.
    """

    def __init__(self, network: nn.Module, inputs: Tensor):
        self.layers = linear_layers(network)
        self.inputs: list[Tensor | None] = [None] * len(self.layers)
        self.outputs: list[Tensor | None] = [None] * len(self.layers)
        self.calls: list[int] = []
        self.result = network(inputs.unsqueeze(0), linear=self)
        check_calls(self.layers, [output is not None for output in self.outputs])

    def __call__(self, layer: nn.Linear, x: Tensor) -> Tensor:
        index = index_of(layer, self.layers)
        if index in self.calls:
            raise PopulationError(
                f"{layer} is called twice; members that perturb one layer each need layers that "
                "are called once (use Evolution, whose members perturb all layers)"
            )
        self.calls.append(index)
        self.inputs[index], self.outputs[index] = x, layer(x)
        return self.outputs[index]

    def out_features(self, index: int) -> int:
        return self.layers[index].out_features

    def rows(self, index: int) -> Tensor:
        """What a layer read, (E, I), with a 1 at the end of each row where it has a bias."""
        rows = self.inputs[index].flatten(0, -2)
        if self.layers[index].bias is None:
            return rows
        return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


class MovedLayer:
    """Outputs of layer `index` moved by sum over r of moves[:, r] * a[group of the example, :, r].

    outputs  the centre's, of each layer
    calls    the centre's
    moves    (M, R, B, ...): sigma / sqrt(R) * u
    a        (G, M, R, O)
    """

    def __init__(
        self,
        layers: list[nn.Linear],
        outputs: list[Tensor],
        calls: list[int],
        index: int,
        moves: Tensor,
        a: Tensor,
    ):
        self.layers, self.outputs, self.index = layers, outputs, index
        self.before = calls[: calls.index(index)]
        self.moves, self.a = moves, a

    def __call__(self, layer: nn.Linear, x: Tensor) -> Tensor:
        index = index_of(layer, self.layers)
        if index in self.before:
            return self.outputs[index]
        if index == self.index:
            return self.outputs[index] + self._movement()
        return layer(x)

    def _movement(self) -> Tensor:
        """(M, B, ..., O)"""
        members, rank, examples, *positions = self.moves.shape
        group = torch.arange(examples, device=self.a.device) % len(self.a)
        a = self.a[group].permute(1, 2, 0, 3)  # (M, R, B, O)
        a = a.reshape(members, rank, examples, *[1] * len(positions), -1)
        terms = (self.moves[:, r, ..., None] * a[:, r] for r in range(rank))
        return sum(terms, start=next(terms))


def forward_of_members(
    network: nn.Module,
    layers: list[nn.Linear],
    outputs: list[Tensor],
    calls: list[int],
    index: int,
    moves: Tensor,
    a: Tensor,
    inputs: Tensor,
) -> Tensor:
    """Outputs (M, B, ...) of the members that move layer `index`, for inputs (B, ...)."""
    linear = MovedLayer(layers, outputs, calls, index, moves, a)
    return network(inputs.unsqueeze(0), linear=linear)
