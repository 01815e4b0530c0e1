"""EGGROLL: Evolution Strategies with low-rank perturbations, for any network and any fitness."""

from eggroll.compiled import BackendError
from eggroll.evolution import Evolution
from eggroll.fitness import FitnessError, accuracy, cross_entropy, smoothed
from eggroll.members import BatchMembers, ExampleMembers, PopulationError
from eggroll.model import MLP

__all__ = [
    "MLP",
    "BackendError",
    "BatchMembers",
    "Evolution",
    "ExampleMembers",
    "FitnessError",
    "PopulationError",
    "accuracy",
    "cross_entropy",
    "smoothed",
]
