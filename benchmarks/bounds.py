"""Lower bounds of a step: the arithmetic that a method cannot avoid, at the best rates there are.

Rates are those that this process reaches with its threads: the better of torch and, on a CPU,
ceilings.cpp. Each product counts in the type in which the method computes it. Moving numbers,
drawing noise, scores, elementwise operations and the optimizer count as free, and so do the
activations of int8.
Shapes: P members, B examples, R rank, I / O inputs / outputs of a layer.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from benchmarks.rows import Work
from eggroll import Evolution, LowRank
from eggroll.blocks import Draw
from eggroll.compiled import Loops
from eggroll.int8 import Int8Evolution
from eggroll.int8.arithmetic import int_matmul

CEILINGS = Loops(
    Path(__file__).with_name("ceilings.cpp"),
    "lower bounds are at the rates of torch, which are lower",
)
ROUNDS = 1_000  # of a call to ceilings.cpp: a fraction of a millisecond
PRODUCT, BFLOAT16_PRODUCT, INT8_PRODUCT = "product", "bfloat16 product", "int8 product"
ACTIVATION = "activation"

Shapes = Sequence[tuple[int, int]]  # (I, O) of the layers, in their order


class Counts(NamedTuple):
    """Arithmetic of a step."""

    products: int  # multiply-adds of the unperturbed network and of the gradient
    members: int  # multiply-adds of the members
    activations: int
    kinds: tuple[str, str] = (PRODUCT, PRODUCT)  # of the products and of the members'

    def seconds(self, each: Mapping[str, float]) -> float:
        """Return the lower bound, from the seconds of each operation."""
        own, members = (each[kind] for kind in self.kinds)
        total = self.products * own + self.members * members
        return total + self.activations * each[ACTIVATION]


# ---- what a method cannot avoid ----


def weights(shapes: Shapes) -> int:
    return sum(i * o for i, o in shapes)


def hidden(shapes: Shapes) -> int:
    return sum(o for _, o in shapes[:-1])


def backprop(shapes: Shapes, examples: int) -> Counts:
    """Count the forward pass and both gradients, but for the gradient of the first input."""
    products = 3 * weights(shapes) - weights(shapes[:1])
    return Counts(examples * products, 0, examples * hidden(shapes))


def evolution(trainer: Evolution, examples: int) -> Counts:
    """Count a step of an estimator whose population is planned."""
    shapes = [(layer.inputs, layer.outputs) for layer in trainer.layers]
    rank = getattr(trainer.estimator, "rank", 0)
    counts = Counts(examples * weights(shapes), 0, examples * hidden(shapes))
    for draw in trainer.draws:
        if isinstance(trainer.estimator, LowRank):
            own = all_layers(shapes, examples, draw.members, rank)
        else:
            own = one_layer(shapes, examples, draw, rank)
        counts = Counts(*(x + y for x, y in zip(counts[:3], own[:3], strict=True)))
    if isinstance(trainer, Int8Evolution):
        kind = BFLOAT16_PRODUCT if trainer.device.type == "cuda" else INT8_PRODUCT
        return counts._replace(activations=0, kinds=(kind, kind))
    return counts._replace(kinds=(PRODUCT, BFLOAT16_PRODUCT if trainer.in_bfloat16 else PRODUCT))


def one_layer(shapes: Shapes, examples: int, draw: Draw, rank: int) -> Counts:
    """Count the members that perturb blocks of one layer; rank 0 is node perturbation.

    All blocks of a direction are activated once, and take one product with the next layer. What
    follows is each member's own.
    """
    (inputs, outputs), *later = shapes[draw.layers[0] :]
    directions, members = examples * draw.directions, examples * draw.members
    estimate = (draw.directions * rank or examples) * inputs * outputs
    noise = directions * rank * inputs  # x times B
    if not later:
        return Counts(estimate, noise, 0)
    products = noise + directions * outputs * later[0][1] + members * weights(later[1:])
    return Counts(estimate, products, directions * outputs + members * hidden(later))


def all_layers(shapes: Shapes, examples: int, population: int, rank: int) -> Counts:
    """Count antithetic pairs that perturb all layers; they share the first layer's product."""
    first, later, members = shapes[:1], shapes[1:], examples * population
    # x times B, where pairs share the first layer's x, then times A
    noise = rank * (members // 2 * first[0][0] + members * sum(i for i, _ in later))
    noise += rank * members * sum(o for _, o in shapes)
    estimate = rank * population // 2 * weights(shapes)
    return Counts(estimate, members * weights(later) + noise, members * hidden(shapes))


# ---- rates ----


def operations(device: torch.device) -> dict[tuple[str, int], Work]:
    """Return calls by what they do and how often: all ways to be fast at an operation."""
    size = 4096 if device.type == "cuda" else 512
    x = torch.randn(size, size, device=device)
    integers = torch.randint(-127, 128, x.shape, dtype=torch.int8, device=device)
    part = x[: size // 4]  # fits the caches
    calls: dict[tuple[str, int], Work] = {
        (PRODUCT, size**3): partial(torch.mm, x, x),
        (INT8_PRODUCT, size**3): partial(int_matmul, integers, integers),
        (ACTIVATION, part.numel()): partial(F.gelu, part),
    }
    if device.type == "cuda":
        halves = x.bfloat16()
        calls[BFLOAT16_PRODUCT, size**3] = partial(torch.mm, halves, halves)
        calls[ACTIVATION, x.numel()] = partial(F.gelu, halves)
    if CEILINGS.available(x):
        for kind, name in ((PRODUCT, "products"), (ACTIVATION, "gelus")):
            done = torch.zeros(1, dtype=torch.int64)
            call = partial(CEILINGS.call, name, ROUNDS, done)
            call()
            calls[kind, int(done)] = call
    return calls


def seconds_of_each(seconds: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Return the seconds of one operation of each kind, from the seconds of the calls."""
    each: dict[str, float] = {}
    for (kind, number), total in seconds.items():
        each[kind] = min(total / number, each.get(kind, float("inf")))
    return each
