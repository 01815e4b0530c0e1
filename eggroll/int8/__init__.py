"""Node perturbation in integers: int8 weights and activations, int32 sums, no floating tensor.

Units are powers of two, so every scale is a shift:
    INT8_SCALE     an int8 of 16 is a real 1, for inputs and activations
    divisor        the power of two nearest to sqrt(fan-in): weights are stored times 16 times it
    FRACTION_BITS  products are int32 in units of 2^-12, before they are rounded to int8
Source: the int8 models of the paper (arXiv 2511.16652, pure integer pre-training), which also store
16 times the real value and divide by 16 sqrt(fan-in). Here all shifts round to nearest.
"""

from eggroll.int8.evolution import Int8Evolution
from eggroll.int8.fitness import Int8Accuracy, Int8CrossEntropy, Int8Fitness, Int8Smoothing
from eggroll.int8.network import FRACTION_BITS, INT8_SCALE, Int8Linear, Int8MLP
from eggroll.int8.node_perturbation import Int8NodePerturbation
from eggroll.int8.optimizer import Int8SGD

__all__ = [
    "FRACTION_BITS",
    "INT8_SCALE",
    "Int8Accuracy",
    "Int8CrossEntropy",
    "Int8Evolution",
    "Int8Fitness",
    "Int8Linear",
    "Int8MLP",
    "Int8NodePerturbation",
    "Int8SGD",
    "Int8Smoothing",
]
