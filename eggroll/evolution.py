"""The trainer: ask for a population, evaluate it, tell its scores. No gradient is ever taken.

evolution = Evolution(network, cross_entropy(), population=1000, sigma=0.02)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
for inputs, labels in batches:
    evolution.estimate(inputs, labels)  # where backprop has loss.backward()
    optimizer.step()
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.backends import choose_backend, make_backend
from eggroll.binary import BinaryLinear
from eggroll.captured import CapturedStep
from eggroll.estimator import pair_weights
from eggroll.fitness import SHAPINGS, Fitness, check_finite, member_scores, winsorized
from eggroll.full_rank import FullRank
from eggroll.perturbed import PopulationError
from eggroll.population import Population, linear_layers

PERTURBATIONS = ("low-rank", "full-rank")
CAPTURABLE = ("z-score", "sign")  # shapings that neither wait for the device nor read sigma


class Evolution:
    """EGGROLL on a network of one's own: fills `.grad` of every nn.Linear from fitness alone.

    network     calls linear(layer, x) where it would call layer(x), and takes `linear` in forward
    fitness     outputs (P, B, ...), labels -> (P, B) or (P,); higher is better
    population  members per step, two per antithetic pair
    rank        rank of each member's perturbation
    sigma       scale of the perturbations; an attribute, free to follow a schedule
    shaping     one of eggroll.fitness.SHAPINGS
    seed        keys all noise, with the step
    groups      parts of the population that each see their own part of every batch
    winsorize   share of the scores at either end that is pulled in before they are shaped
    chunk_size  members evaluated at once; memory and speed, never results
    backend     one of eggroll.backends.BACKENDS
    dtype       of the population's forward, where it is not the network's own: the members are
                then perturbations of a copy, and the estimate goes to the network
    perturbation  "low-rank", or "full-rank": naive evolution strategies (eggroll.full_rank), for
                comparison, with the eager backend alone
    capture     replay the step as a CUDA graph. Only with the triton backend, and only where
                neither fitness nor shaping waits for the device

    Raises PopulationError (odd population, no nn.Linear in the network, ...), BackendError (one
    that is not installed), ValueError (shaping, capture).
    Source: Algorithm 1 of "Evolution Strategies at the Hyperscale", arXiv 2511.16652.
    """

    def __init__(
        self,
        network: nn.Module,
        fitness: Fitness,
        *,
        population: int,
        rank: int = 1,
        sigma: float = 0.02,
        shaping: str = "z-score",
        seed: int = 0,
        groups: int = 1,
        winsorize: float = 0.0,
        chunk_size: int | None = None,
        backend: str = "eager",
        dtype: torch.dtype | None = None,
        capture: bool = False,
        perturbation: str = "low-rank",
    ):
        if shaping not in SHAPINGS:
            raise ValueError(f"shaping {shaping!r} is not known (try {', '.join(SHAPINGS)})")
        self.network, self.fitness = network, fitness
        self.population, self.rank, self.sigma = population, rank, sigma
        self.shaping, self.seed, self.groups, self.chunk_size = shaping, seed, groups, chunk_size
        self.winsorize = winsorize
        self.step = 0
        if not linear_layers(network):
            raise PopulationError("the network has no nn.Linear, so there is nothing to evolve")
        device = linear_layers(network)[0].weight.device
        chosen = choose_backend(backend, device)
        _check_members(network, perturbation, chosen, rank)
        self.backend = FullRank() if perturbation == "full-rank" else make_backend(chosen)
        self.dtype = dtype or linear_layers(network)[0].weight.dtype
        self.perturbed = copy.deepcopy(network).to(dtype) if dtype else network
        self.population_in_work = self.ask()  # raises at once what the first step would raise
        self.run = self._evaluate_and_tell
        if capture:
            if chosen != "triton" or shaping not in CAPTURABLE:
                allowed = " or ".join(CAPTURABLE)
                raise ValueError(f"capture needs the triton backend and shaping {allowed}")
            parameters = [p for layer in linear_layers(network) for p in layer.parameters()]
            self.run = CapturedStep(self.run, parameters)

    def ask(self) -> Population:
        """The members of the present step, as keys: nothing is drawn before it is used."""
        if self.perturbed is not self.network:
            with torch.no_grad():
                for copied, own in zip(
                    self.perturbed.parameters(), self.network.parameters(), strict=True
                ):
                    copied.copy_(own)
        population = Population(
            self.perturbed,
            self.population,
            self.rank,
            self.sigma,
            self.seed,
            self.step,
            self.groups,
            self.backend.noise,
        )
        self.backend.prepare(population)
        return population

    @torch.no_grad()
    def evaluate(self, population: Population, inputs: Tensor, labels: Tensor) -> Tensor:
        """One score per member, (P,), for inputs (B, ...) and labels, a chunk at a time.

        The network's weights are read and never written. Raises FitnessError, and PopulationError
        for a batch that has fewer examples than there are groups.
        """
        if len(inputs) < population.groups:
            raise PopulationError(
                f"a batch of {len(inputs)} cannot be shared among {population.groups} groups"
            )
        scores = torch.empty(population.size, device=population.device)
        shared: dict[int, Any] = {}  # by group
        for chunk in population.chunks(self.chunk_size):
            seen = chunk.part(inputs)
            if chunk.group not in shared:
                shared[chunk.group] = self.backend.share(population, seen)
            found = self.backend.score(
                chunk, seen, chunk.part(labels), self.fitness, shared[chunk.group]
            )
            scores[chunk.members] = member_scores(found, len(chunk))
        check_finite(scores, population.step)
        return scores

    @torch.no_grad()
    def tell(self, population: Population, scores: Tensor) -> None:
        """Write -estimate into `.grad` of every evolving parameter, and go on to the next step.

        Minus, because torch's optimizers descend and fitness is to rise. The population's noise
        is drawn again from its keys.
        """
        scores = winsorized(scores, self.winsorize)
        weights = pair_weights(scores, self.shaping, population.sigma, population.groups)
        for index, layer in enumerate(linear_layers(self.network)):
            weight, bias = self.backend.estimate(population, index, weights)
            layer.weight.grad = weight.neg_().to(layer.weight.dtype)
            if bias is not None:
                layer.bias.grad = bias.neg_().to(layer.bias.dtype)
        self.step = population.step + 1

    def estimate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Ask, evaluate and tell on one batch; the population's mean fitness, a 0-d tensor."""
        self.population_in_work = self.ask()
        fitness = self.run(inputs.to(self.dtype), labels)
        self.step = self.population_in_work.step + 1
        return fitness

    def _evaluate_and_tell(self, inputs: Tensor, labels: Tensor) -> Tensor:
        scores = self.evaluate(self.population_in_work, inputs, labels)
        self.tell(self.population_in_work, scores)
        return scores.mean()


def _check_members(network: nn.Module, perturbation: str, backend: str, rank: int) -> None:
    """Raises PopulationError for members that no backend of that name evaluates."""
    if perturbation not in PERTURBATIONS:
        raise PopulationError(
            f"perturbation {perturbation!r} is not known (try {', '.join(PERTURBATIONS)})"
        )
    if perturbation == "full-rank" and (backend != "eager" or rank != 1):
        raise PopulationError(
            f"members of full rank have no rank and one backend, and here is rank {rank} and "
            f"backend {backend} (try rank 1, backend eager)"
        )
    if backend == "triton" and any(isinstance(m, BinaryLinear) for m in network.modules()):
        raise PopulationError("the triton kernels know no binary weights (try backend compile)")
