"""The trainer whose members perturb one layer each; everything before it is the network's own.

evolution = LayerwiseEvolution(network, cross_entropy(), population=2304, groups=16)
optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
for inputs, labels in batches:
    evolution.estimate(inputs, labels)  # where backprop has loss.backward()
    optimizer.step()

A member that perturbs every layer is scored for all of them at once: each layer reads its merit
through the noise of the others. A member that perturbs one layer is free of that, and cheap: what
comes before its layer is computed once for all, so members of the head cost next to nothing.

Letters: P members, M directions of one layer, B examples, E rows (examples times positions), R
rank, O/I a layer's outputs/inputs, G groups of examples.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from eggroll.backends import FirstShape, compilable
from eggroll.centre import Centre, forward_of_members
from eggroll.credit import example_credit, member_credit, member_slopes
from eggroll.directions import KINDS, most_members
from eggroll.fitness import (
    SHAPINGS,
    Fitness,
    check_finite,
    example_scores,
    member_scores,
    winsorized,
)
from eggroll.layer_members import LayerMembers
from eggroll.perturbed import PopulationError
from eggroll.population import linear_layers
from eggroll.projections import SAMPLINGS
from eggroll.sharing import share_equally

CREDITS = ("example", "member")
DIFFERENCES = ("central", "forward")

# Members that are evaluated at once on a CPU: their activations should stay in the cache.
CPU_CHUNK = 16
ACCELERATOR_CHUNK = 512


class LayerwiseEvolution:
    """Evolution whose members perturb one layer each: fills `.grad` of every nn.Linear.

    network     calls linear(layer, x) where it would call layer(x), and takes `linear` in forward
    fitness     outputs (P, B, ...), labels -> (P, B), or (P,) with credit "member"
    population  members per step. The groups share them equally, and in each group the layers;
                no layer gets more than eggroll.directions.most_members
    credit      "example": each example is credited with its own fitness (eggroll.credit).
                "member": the paper's estimator, one score per member: its mean fitness over the
                examples that its group sees
    noise       kind of A, one of eggroll.directions.KINDS
    sampling    kind of B, one of eggroll.projections.SAMPLINGS
    difference  "central": members come in antithetic pairs. "forward": each is compared with the
                unperturbed network, which halves the work where the fitness is smooth
    groups      parts of the population that each see their own part of every batch: group g sees
                the examples g, g + groups, ... Their errors average out
    share_a     all groups perturb in the same directions. A B that is formed they always share
    shaping     of the members' scores, for credit "member"
    winsorize   share of the slopes at either end that is pulled in
    rank, sigma, seed, chunk_size  as in Evolution
    backend     "eager" or "compile"

    Raises PopulationError for a population that cannot be, a name that is not known, and what
    does not go together.
    """

    def __init__(
        self,
        network: nn.Module,
        fitness: Fitness,
        *,
        population: int,
        credit: str = "example",
        rank: int = 1,
        sigma: float = 0.004,
        noise: str = "orthogonal",
        sampling: str = "whitened",
        difference: str = "forward",
        groups: int = 1,
        share_a: bool = False,
        shaping: str = "none",
        winsorize: float = 0.0,
        seed: int = 0,
        chunk_size: int | None = None,
        backend: str = "eager",
    ):
        _check(credit, noise, sampling, difference, shaping)
        self.network, self.fitness, self.layers = network, fitness, linear_layers(network)
        if not self.layers:
            raise PopulationError("the network has no nn.Linear, so there is nothing to evolve")
        self.population, self.credit, self.rank, self.sigma = population, credit, rank, sigma
        self.noise, self.sampling, self.difference = noise, sampling, difference
        self.groups, self.share_a = groups, share_a
        self.shaping, self.winsorize = shaping, winsorize
        self.seed, self.step = seed, 0
        self.device = self.layers[0].weight.device
        self.chunk = chunk_size or (CPU_CHUNK if self.device.type == "cpu" else ACCELERATOR_CHUNK)
        self.scores = scores_of_members
        if backend == "compile":
            self.fitness, self.scores = compilable(fitness), FirstShape(scores_of_members)
        self.directions()  # raises at once what the first step would raise

    def directions(self) -> list[int]:
        """In how many directions a group perturbs each layer: one per member, or one per pair."""
        most = [most_members(self.noise, self.rank, layer.out_features) for layer in self.layers]
        each = self.groups * (2 if self.difference == "central" else 1)
        if self.population % each or self.population < each * len(self.layers):
            whole = each * max(len(self.layers), round(self.population / each))
            raise PopulationError(
                f"population {self.population} cannot be shared evenly by {self.groups} groups "
                f"and {len(self.layers)} layers with {self.difference} differences (try {whole})"
            )
        return share_equally(self.population // each, most)

    @torch.no_grad()
    def estimate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Write -estimate into every `.grad`; the unperturbed network's mean fitness, 0-d.

        Minus, because torch's optimizers descend and fitness is to rise. Raises FitnessError, and
        PopulationError for a network that does not call each layer once through `linear`.
        """
        centre = Centre(self.network, inputs)
        baseline = scores_of(centre.result, labels, self.fitness, self.credit, self.groups)
        check_finite(baseline, self.step)
        members = [self._members(centre, *layer) for layer in enumerate(self.directions())]
        pairs = [self._evaluate(part, inputs, labels, baseline) for part in members]
        if self.credit == "example":
            slopes = [(plus - minus) / (2 * self.sigma) for plus, minus in pairs]
            estimate = example_credit
        else:
            slopes = member_slopes(pairs, self.shaping, self.sigma)
            estimate = partial(member_credit, examples=len(labels))
        for part, slope in zip(members, slopes, strict=True):
            total = _mean_over_blocks(part, winsorized(slope, self.winsorize), estimate)
            _write_gradient(self.layers[part.index], total)
        self.step += 1
        return baseline.mean()

    def _members(self, centre: Centre, index: int, count: int) -> LayerMembers:
        kinds = (self.noise, self.sampling, self.rank, self.groups, self.share_a)
        return LayerMembers(centre, index, count, *kinds, self.seed, self.step)

    def _evaluate(
        self, members: LayerMembers, inputs: Tensor, labels: Tensor, baseline: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of one layer's members and of their antithetic twins, (M, B) or (M, G) each.

        With forward differences a twin is not evaluated: it is taken to be as far below the
        unperturbed network as the member is above it.
        """
        signs = (1, -1) if self.difference == "central" else (1,)
        # one tensor for all: a small one left by each chunk would lie in the space of the next
        scores = baseline.new_empty(len(signs), members.count, baseline.shape[1])
        start = 0
        for u, a in self._chunks(members):
            for sign, own in zip(signs, scores, strict=True):
                own[start : start + len(u)] = self._score(members, sign * u, a, inputs, labels)
            start += len(u)
        check_finite(scores.flatten(0, 1), self.step)
        plus, *minus = scores
        return plus, minus[0] if minus else 2 * baseline - plus

    def _chunks(self, members: LayerMembers) -> Iterator[tuple[Tensor, Tensor]]:
        """Moves (M, R, B, ...) and directions (G, M, R, O) of as many as are evaluated at once."""
        positions = members.centre.inputs[members.index].shape[1:-1]
        for drawn in members.blocks():
            moves = drawn.projections.u * (self.sigma / self.rank**0.5)
            moves = moves.unflatten(-1, positions)
            yield from zip(moves.split(self.chunk), drawn.a.split(self.chunk, dim=1), strict=True)

    def _score(
        self, members: LayerMembers, moves: Tensor, a: Tensor, inputs: Tensor, labels: Tensor
    ) -> Tensor:
        centre = members.centre
        return self.scores(
            self.network,
            self.layers,
            centre.outputs,
            centre.calls,
            members.index,
            moves,
            a,
            inputs,
            labels,
            self.fitness,
            self.credit,
            self.groups,
        )


def scores_of_members(
    network: nn.Module,
    layers: list[nn.Linear],
    outputs: list[Tensor],
    calls: list[int],
    index: int,
    moves: Tensor,
    a: Tensor,
    inputs: Tensor,
    labels: Tensor,
    fitness: Fitness,
    credit: str,
    groups: int,
) -> Tensor:
    """A chunk, from its moves to its scores: one graph, where it is compiled."""
    found = forward_of_members(network, layers, outputs, calls, index, moves, a, inputs)
    return scores_of(found, labels, fitness, credit, groups)


def scores_of(
    outputs: Tensor, labels: Tensor, fitness: Fitness, credit: str, groups: int
) -> Tensor:
    """Of each member on each example, (M, B), or on all that its group sees, (M, G).

    A fitness that scores examples one by one is asked once, for all groups. Raises FitnessError.
    """
    scores = fitness(outputs, labels)
    if credit == "example":
        return example_scores(scores, *outputs.shape[:2])
    own = [slice(group, None, groups) for group in range(groups)]
    if scores.dim() == 2:
        parts = [scores[:, examples] for examples in own]
    elif groups == 1:
        parts = [scores]
    else:
        parts = [fitness(outputs[:, examples], labels[examples]) for examples in own]
    return torch.stack([member_scores(part, len(outputs)) for part in parts], dim=1)


def _mean_over_blocks(
    members: LayerMembers, slopes: Tensor, estimate: Callable[..., Tensor]
) -> Tensor:
    """(O, I): what the blocks' estimates say together, each with the weight of its members."""
    total, start = 0, 0
    for drawn in members.blocks():
        count = len(drawn.projections)
        own = slopes[start : start + count]
        part = estimate(own, drawn.a, drawn.projections, members.rows)
        total = total + part * (count / members.count)
        start += count
    return total


def _write_gradient(layer: nn.Linear, estimate: Tensor) -> None:
    """`estimate` (O, I), with one more column for a bias."""
    inputs = layer.in_features
    layer.weight.grad = estimate[:, :inputs].neg()
    if layer.bias is not None:
        layer.bias.grad = estimate[:, inputs].neg()


def _check(credit: str, noise: str, sampling: str, difference: str, shaping: str) -> None:
    """Raises PopulationError for a name that is not known, and for what does not go together."""
    known = {
        "credit": (credit, CREDITS),
        "noise": (noise, KINDS),
        "sampling": (sampling, SAMPLINGS),
        "difference": (difference, DIFFERENCES),
        "shaping": (shaping, SHAPINGS),
    }
    for what, (name, names) in known.items():
        if name not in names:
            raise PopulationError(f"{what} {name!r} is not known (try {', '.join(names)})")
    if credit == "example" and shaping != "none":
        raise PopulationError(
            f"{shaping} shaping is for one score per member, and per-example credit reads one "
            "for each example (try shaping none, or the population estimator)"
        )
