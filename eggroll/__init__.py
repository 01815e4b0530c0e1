"""EGGROLL: Evolution Strategies with low-rank perturbations, for any network and any fitness."""

from eggroll.backends import BackendError
from eggroll.evolution import Evolution
from eggroll.fitness import SHAPINGS, FitnessError, accuracy, cross_entropy
from eggroll.layerwise import LayerwiseEvolution
from eggroll.model import MLP, plain_linear
from eggroll.perturbed import PopulationError
from eggroll.population import Population, reference_forward

__all__ = [
    "MLP",
    "SHAPINGS",
    "BackendError",
    "Evolution",
    "FitnessError",
    "LayerwiseEvolution",
    "Population",
    "PopulationError",
    "accuracy",
    "cross_entropy",
    "plain_linear",
    "reference_forward",
]
