"""Training in integers: int8 weights, activations and noise, int32 sums, and no floating tensor.

The units are fixed, so that every scale is a shift or a division by an integer:
    INT8_SCALE     an int8 value of 16 is a real 1, for weights and activations alike
    divisor        a layer's weights are stored times sqrt(fan-in), rounded, and its products are
                   divided by that: 28 and 16, for 784 and 256 inputs, are exact
    FRACTION_BITS  products are int32 in units of 2^-12, before they are rounded to int8
Source: the paper's int8 models (arXiv 2511.16652, the section on pure integer pre-training), which
also store 16 times the real value and divide by 16 sqrt(fan-in). Here everything rounds to nearest.
"""

from eggroll.int8.arithmetic import INT8_MAX
from eggroll.int8.fitness import Int8Accuracy, Int8CrossEntropy, Int8SmoothedAccuracy
from eggroll.int8.gradient import layer_gradient, perturbation_size
from eggroll.int8.network import FRACTION_BITS, INT8_SCALE, Int8Linear, Int8MLP
from eggroll.int8.optimizer import UPDATES, Int8SGD

__all__ = [
    "FRACTION_BITS",
    "INT8_MAX",
    "INT8_SCALE",
    "UPDATES",
    "Int8Accuracy",
    "Int8CrossEntropy",
    "Int8Linear",
    "Int8MLP",
    "Int8SGD",
    "Int8SmoothedAccuracy",
    "layer_gradient",
    "perturbation_size",
]
