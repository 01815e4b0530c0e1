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

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from eggroll.backends import FirstShape
from eggroll.centre import Centre, forward_of_members
from eggroll.credit import example_credit, member_credit, member_slopes
from eggroll.directions import KINDS, draw_directions, most_members
from eggroll.fitness import (
    SHAPINGS,
    Fitness,
    FitnessError,
    check_finite,
    example_scores,
    member_scores,
    winsorized,
)
from eggroll.noise import generator_seed
from eggroll.perturbed import PopulationError
from eggroll.population import linear_layers
from eggroll.projections import SAMPLINGS, Projections, draw_projections
from eggroll.sharing import share_equally

CREDITS = ("example", "member")
DIFFERENCES = ("central", "forward")

# Members that are evaluated at once on a CPU: their activations should stay in the cache.
CPU_CHUNK = 16
ACCELERATOR_CHUNK = 512


@dataclass(frozen=True)
class Drawn:
    """The perturbations of one layer for one batch."""

    index: int
    a: Tensor  # (G, M, R, O)
    projections: Projections
    rows: Tensor  # (E, I)


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
        self.forward = forward_of_members
        if backend == "compile":
            self.forward = FirstShape(forward_of_members)
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
        baseline = self._scores(centre.result, labels)
        drawn = [self._draw(centre, index, count) for index, count in enumerate(self.directions())]
        pairs = [self._evaluate(centre, part, inputs, labels, baseline) for part in drawn]
        if self.credit == "example":
            slopes = [(plus - minus) / (2 * self.sigma) for plus, minus in pairs]
            estimate = example_credit
        else:
            slopes = member_slopes(pairs, self.shaping, self.sigma)
            estimate = partial(member_credit, examples=len(labels))
        estimates = [
            estimate(winsorized(slope, self.winsorize), d.a, d.projections, d.rows)
            for slope, d in zip(slopes, drawn, strict=True)
        ]
        for layer, estimate in zip(self.layers, estimates, strict=True):
            _write_gradient(layer, estimate)
        self.step += 1
        return baseline.mean()

    def _draw(self, centre: Centre, index: int, count: int) -> Drawn:
        generator = torch.Generator(self.device)
        generator.manual_seed(generator_seed(self.seed, self.step, index, 0))
        rows, outputs = centre.rows(index), self.layers[index].out_features
        examples = centre.result.shape[1]
        different = 1 if self.share_a else self.groups
        a = draw_directions(self.noise, different, count, self.rank, outputs, rows, generator)
        a = a.expand(self.groups, -1, -1, -1)
        group = torch.arange(examples, device=self.device) % self.groups
        group = group.repeat_interleave(len(rows) // examples)
        try:
            projections = draw_projections(self.sampling, rows, group, count, self.rank, generator)
        except torch.linalg.LinAlgError as error:
            raise FitnessError(
                f"what layer {index + 1} reads has no span at step {self.step:,}: training has "
                "diverged (try a smaller lr or sigma)"
            ) from error
        return Drawn(index, a, projections, rows)

    def _evaluate(
        self, centre: Centre, drawn: Drawn, inputs: Tensor, labels: Tensor, baseline: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of one layer's members and of their antithetic twins, (M, B) or (M, G) each.

        With forward differences a twin is not evaluated: it is taken to be as far below the
        unperturbed network as the member is above it.
        """
        moves = drawn.projections.u * (self.sigma / self.rank**0.5)
        moves = moves.unflatten(-1, centre.inputs[drawn.index].shape[1:-1])
        parts = list(zip(moves.split(self.chunk), drawn.a.split(self.chunk, dim=1), strict=True))
        before = (self.network, self.layers, centre.outputs, centre.calls, drawn.index)

        def scores(sign: int) -> Tensor:
            outputs = [self.forward(*before, sign * u, a, inputs) for u, a in parts]
            return self._scores(torch.cat(outputs), labels)

        plus = scores(1)
        return plus, scores(-1) if self.difference == "central" else 2 * baseline - plus

    def _scores(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Of each member on each example, (M, B), or on all that its group sees, (M, G)."""
        if self.credit == "example":
            scores = example_scores(self.fitness(outputs, labels), *outputs.shape[:2])
        else:
            scores = self._scores_by_group(outputs, labels)
        check_finite(scores, self.step)
        return scores

    def _scores_by_group(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(M, G). A fitness that scores examples one by one is asked once, for all groups."""
        own = [slice(group, None, self.groups) for group in range(self.groups)]
        scores = self.fitness(outputs, labels)
        if scores.dim() == 2:
            parts = [scores[:, examples] for examples in own]
        elif self.groups == 1:
            parts = [scores]
        else:
            parts = [self.fitness(outputs[:, examples], labels[examples]) for examples in own]
        return torch.stack([member_scores(part, len(outputs)) for part in parts], dim=1)


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
