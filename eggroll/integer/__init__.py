"""Training in integers: int8 weights, activations and noise, int32 sums, and no floating tensor.

The units are fixed, so that every scale is a shift or a division by an integer:
    ONE        an int8 value of 16 is a real 1, for weights and activations alike
    divisor    a layer's weights are stored times sqrt(fan-in), rounded: its products are divided by
               that. 28 and 16, for 784 and 256 inputs, are exact
    FINE       products are kept as int32 in units of 2^-12, before they are rounded to int8
Source: the paper's int8 models (arXiv 2511.16652, the section on pure integer pre-training), which
also store 16 times the real value and divide by 16 sqrt(fan-in). Here everything rounds to nearest.
"""

from eggroll.integer.evolution import IntegerEvolution
from eggroll.integer.fitness import integer_accuracy, integer_log_likelihood
from eggroll.integer.network import ONE, IntegerMLP
from eggroll.integer.update import IntegerOptimizer

__all__ = [
    "ONE",
    "IntegerEvolution",
    "IntegerMLP",
    "IntegerOptimizer",
    "integer_accuracy",
    "integer_log_likelihood",
]
