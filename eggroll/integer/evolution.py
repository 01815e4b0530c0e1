"""The trainer in integers: members that perturb one layer each, as in eggroll.layerwise.

network = IntegerMLP(MLP())
evolution = IntegerEvolution(network, integer_log_likelihood(), population=2304, groups=16)
optimizer = IntegerOptimizer(network, lr=0.04)
for inputs, labels in batches:  # int8 (B, 784)
    evolution.estimate(inputs, labels)
    optimizer.step(len(labels))

A member moves one layer by sigma A B^T, with A and B signs and sigma = 2^-shift, so that its part
of the layer's outputs, (x . B) A sigma, is exact in the units of the sum that it is added to.

Letters: M members of one layer, B examples, O/I a layer's outputs/inputs, G groups of examples.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eggroll.backends import FirstShape
from eggroll.directions import most_members, random_signs
from eggroll.integer.arithmetic import MOST, int_matmul
from eggroll.integer.credit import credit_by_example, votes_of_members, weighed_signs
from eggroll.integer.fitness import IntegerFitness
from eggroll.integer.network import FINE, ONE, IntegerMLP, follow
from eggroll.integer.noise import KINDS, draw_integer_directions
from eggroll.noise import generator_seed
from eggroll.perturbed import PopulationError
from eggroll.sharing import share_equally

CREDITS = ("example", "member")
CPU_CHUNK = 16  # members evaluated at once: their activations should stay in the cache
ACCELERATOR_CHUNK = 512
MOST_SHIFT = FINE - (ONE.bit_length() - 1)  # a smaller sigma would need finer sums


@dataclass(frozen=True)
class Drawn:
    """The perturbations of one layer for one batch: signs."""

    a: Tensor  # (G, M, O) int8
    b: Tensor  # (M, I) int8
    u: Tensor  # (M, B) int32, what B does to what the layer reads


class IntegerEvolution:
    """Leaves an int32 estimate in every layer of an IntegerMLP; no floating tensor on the way.

    fitness     logits (M, B, 10) int32, labels (B,) -> scores (M, B) int32
    population  members per step, shared by the groups, and in each by the layers
    credit      "example": each example's own fitness. "member": votes, one score per member
    noise       kind of A, one of eggroll.integer.noise.KINDS; B is always signs, one for all groups
    sigma       of the perturbations in real weights: 2^-shift, with shift from 0 to MOST_SHIFT
    groups, seed, chunk_size, backend  as in eggroll.layerwise

    Each member is compared with the unperturbed network (forward differences).
    Raises PopulationError for what cannot be.
    """

    def __init__(
        self,
        network: IntegerMLP,
        fitness: IntegerFitness,
        *,
        population: int,
        credit: str = "example",
        sigma: float = 2**-8,
        noise: str = "orthogonal",
        groups: int = 1,
        seed: int = 0,
        chunk_size: int | None = None,
        backend: str = "eager",
    ):
        for what, name, names in (("credit", credit, CREDITS), ("noise", noise, KINDS)):
            if name not in names:
                raise PopulationError(
                    f"{what} {name!r} is not for integers (try {' or '.join(names)})"
                )
        self.network, self.fitness, self.population = network, fitness, population
        self.credit, self.noise, self.groups = credit, noise, groups
        self.shift = shift_of(sigma)
        self.seed, self.step = seed, 0
        self.device = network.layers[0].weight.device
        self.chunk = chunk_size or (CPU_CHUNK if self.device.type == "cpu" else ACCELERATOR_CHUNK)
        self.hidden: list[Tensor] = []  # activations of the last batch, for the log
        fused = FirstShape if backend == "compile" else lambda function: function
        # of each layer: FirstShape compiles for one shape
        self.score = [fused(scores_of_members) for _ in network.layers]
        self.weigh = [fused(weighed_signs) for _ in network.layers]
        self.members()  # raises at once what the first step would raise

    def members(self) -> list[int]:
        """How many members of each group perturb each layer."""
        layers = self.network.layers
        least = self.groups * len(layers)
        if self.population % self.groups or self.population < least:
            whole = self.groups * max(len(layers), round(self.population / self.groups))
            raise PopulationError(
                f"population {self.population} cannot be shared evenly by {self.groups} groups "
                f"and {len(layers)} layers (try {whole})"
            )
        most = [most_members(self.noise, 1, len(layer.weight)) for layer in layers]
        return share_equally(self.population // self.groups, most)

    @torch.no_grad()
    def estimate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Leave the ascent direction in each layer's `estimate`; inputs (B, I) int8.

        Returns the unperturbed network's scores summed over the batch, 0-d int64.
        """
        read, wrote = self.network.all_outputs(inputs)
        baseline = self.fitness(wrote[-1].unsqueeze(0), labels)
        group = torch.arange(len(labels), device=self.device) % self.groups
        for index, count in enumerate(self.members()):
            drawn = self.draw(index, count, read[index])
            scores = self.evaluate(index, drawn, wrote[index], labels, group)
            self.network.layers[index].estimate = self._read(
                index, scores - baseline, drawn, read[index], group
            )
        self.step += 1
        self.hidden = read[1:]
        return baseline.sum(dtype=torch.int64)

    def saturated_activations(self) -> float:
        """Fraction of the unperturbed network's activations on the last batch that are 127."""
        full = sum((x == MOST).sum().item() for x in self.hidden)
        return round(full / sum(x.numel() for x in self.hidden), 6)

    def draw(self, index: int, count: int, rows: Tensor) -> Drawn:
        """The perturbations of layer `index` at this step, and what they do to rows (B, I)."""
        weight = self.network.layers[index].weight
        generator = torch.Generator(self.device)
        generator.manual_seed(generator_seed(self.seed, self.step, index, 0))
        a = draw_integer_directions(self.noise, self.groups, count, len(weight), weight, generator)
        b = random_signs((count, weight.shape[1]), weight, generator)
        return Drawn(a, b, int_matmul(b, rows.t().contiguous()))

    def evaluate(
        self, index: int, drawn: Drawn, fine: Tensor, labels: Tensor, group: Tensor
    ) -> Tensor:
        """Scores (M, B) of the members of layer `index`, which by itself wrote `fine` (B, O)."""
        after = self.network.layers[index + 1 :]
        weights, divisors = [x.weight for x in after], [x.divisor for x in after]
        parts = drawn.u.split(self.chunk), drawn.a.split(self.chunk, dim=1)
        fixed = (self.fitness, divisors, MOST_SHIFT - self.shift)
        # one tensor for all: a small one left by each chunk would lie in the space of the next
        scores = drawn.u.new_empty(len(drawn.u), len(labels))
        for u, a, own in zip(*parts, scores.split(self.chunk), strict=True):
            own.copy_(self.score[index](*fixed, fine, u, a, group, labels, *weights))
        return scores

    def _read(
        self, index: int, difference: Tensor, drawn: Drawn, rows: Tensor, group: Tensor
    ) -> Tensor:
        if self.credit == "member":
            return votes_of_members(difference, drawn.a, drawn.b, group)
        credit = self.weigh[index](difference * drawn.u.sign(), drawn.a, group)
        return credit_by_example(drawn.u, credit, rows, self.shift)


def scores_of_members(
    fitness: IntegerFitness,
    divisors: list[int],  # of the layers after the one that is moved
    finer: int,
    fine: Tensor,  # (B, O) int32, what the unperturbed layer wrote
    u: Tensor,  # (M, B) int32
    a: Tensor,  # (G, M, O) int8
    group: Tensor,  # (B,)
    labels: Tensor,
    *weights: Tensor,  # of the layers after
) -> Tensor:
    """Scores (M, B) of members that move a layer's outputs by u A sigma: the whole of their work.

    u is in units of 1 / ONE, and the outputs in units of 2^-FINE: a shift brings them together.
    """
    move = (u.unsqueeze(-1) * a[group].transpose(0, 1)) << finer
    return fitness(follow(fine + move, weights, divisors), labels)


def shift_of(sigma: float) -> int:
    """s for sigma = 2^-s. Raises PopulationError for a sigma that is none of these."""
    shift = round(-math.log2(sigma))
    if sigma != 2.0**-shift or not 0 <= shift <= MOST_SHIFT:
        nearest = 2.0 ** -min(max(shift, 0), MOST_SHIFT)
        raise PopulationError(
            f"sigma {sigma:g} is no power of two from {2.0**-MOST_SHIFT:g} to 1, which integers "
            f"need (try {nearest:g})"
        )
    return shift
