"""The trainer: ask for a population, evaluate it, tell its scores. No gradient is ever taken.

evolution = Evolution(network, cross_entropy(), population=1000, sigma=0.02)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
for inputs, labels in batches:
    evolution.estimate(inputs, labels)  # where backprop has loss.backward()
    optimizer.step()
"""

import torch
from torch import Tensor, nn

from eggroll.backends import choose_backend, make_backend
from eggroll.estimator import estimate_layer, pair_weights
from eggroll.fitness import SHAPINGS, Fitness, member_scores
from eggroll.perturbed import PopulationError
from eggroll.population import Population


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
    chunk_size  members evaluated at once; memory and speed, never results
    backend     one of eggroll.backends.BACKENDS

    Raises PopulationError (odd population, no nn.Linear in the network, ...), BackendError (one
    that is not installed), ValueError (shaping).
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
        chunk_size: int | None = None,
        backend: str = "eager",
    ):
        if shaping not in SHAPINGS:
            raise ValueError(f"shaping {shaping!r} is not known (try {', '.join(SHAPINGS)})")
        self.network, self.fitness = network, fitness
        self.population, self.rank, self.sigma = population, rank, sigma
        self.shaping, self.seed, self.groups, self.chunk_size = shaping, seed, groups, chunk_size
        self.step = 0
        layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise PopulationError("the network has no nn.Linear, so there is nothing to evolve")
        self.backend = make_backend(choose_backend(backend, layers[0].weight.device))
        self.ask()  # raises at once what it would raise at the first step

    def ask(self) -> Population:
        """The members of the present step, as keys: nothing is drawn before it is used."""
        return Population(
            self.network,
            self.population,
            self.rank,
            self.sigma,
            self.seed,
            self.step,
            self.groups,
            self.backend.draw,
        )

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
        for chunk in population.chunks(self.chunk_size):
            outputs = self.backend.forward(chunk, chunk.draw(), chunk.part(inputs))
            fitness = self.fitness(outputs, chunk.part(labels))
            scores[chunk.members] = member_scores(fitness, len(chunk))
        return scores

    @torch.no_grad()
    def tell(self, population: Population, scores: Tensor) -> None:
        """Write -estimate into `.grad` of every evolving parameter, and go on to the next step.

        Minus, because torch's optimizers descend and fitness is to rise. The population's noise
        is drawn again from its keys.
        """
        weights = pair_weights(scores, self.shaping, population.sigma, population.groups)
        for index, layer in enumerate(population.layers):
            weight, bias = estimate_layer(layer, population.noise_blocks(index), weights)
            layer.weight.grad = weight.neg_()
            if bias is not None:
                layer.bias.grad = bias.neg_()
        self.step = population.step + 1

    def estimate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Ask, evaluate and tell on one batch; the population's mean fitness, a 0-d tensor."""
        population = self.ask()
        scores = self.evaluate(population, inputs, labels)
        self.tell(population, scores)
        return scores.mean()
