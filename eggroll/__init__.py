"""EGGROLL: evolution strategies with low-rank perturbations, for any network and any fitness."""

from eggroll.block_low_rank import BlockLowRank
from eggroll.blocks import PopulationError
from eggroll.evolution import Evolution
from eggroll.fitness import (
    FitnessError,
    accuracy,
    centered_rank,
    cross_entropy,
    identity,
    z_score,
)
from eggroll.graphed import GraphedStep
from eggroll.low_rank import LowRank
from eggroll.node_perturbation import NodePerturbation
from eggroll.smoothing import Smoothing

__all__ = [
    "BlockLowRank",
    "Evolution",
    "FitnessError",
    "GraphedStep",
    "LowRank",
    "NodePerturbation",
    "PopulationError",
    "Smoothing",
    "accuracy",
    "centered_rank",
    "cross_entropy",
    "identity",
    "z_score",
]
