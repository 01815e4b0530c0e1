"""Only even digits count: a sparse fitness that says nothing about half of the images.

python mnist_eggroll.py node-perturbation --fitness examples/even_digits.py:even_hits

Odd digits are never rewarded, so the network learns the even ones alone.
"""

from torch import Tensor


def even_hits(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return 1 where an even digit is recognized, else 0, (P, B), from outputs (P, B, 10)."""
    correct = (outputs.argmax(-1) == labels) & (labels % 2 == 0)
    return correct.to(outputs.dtype)
