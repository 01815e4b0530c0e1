"""One step of EGGROLL on a small network, in matrices: every number is measured, none made up.

Shapes: P members, N = P / 2 antithetic pairs, R = 1 rank, O/I the layer's outputs/inputs.
"""

# ruff: noqa: RUF001 - the minus, times and sigma are meant: they are drawn

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from eggroll import MLP, BatchMembers, Evolution, cross_entropy
from eggroll.fitness import z_score
from eggroll.members import Step as Known
from eggroll.noise import Keys
from eggroll.seam import record
from visualizations.canvas import (
    BODY,
    GREY,
    HEADING,
    NEGATIVE,
    POSITIVE,
    SIGNED,
    SMALL,
    TALK_STYLE,
    TITLE,
    arrow,
    box,
    heatmap,
    sheet,
    write,
)

INPUTS, HIDDEN, CLASSES, EXAMPLES = 12, 8, 4, 32
PAIRS, SIGMA, LEARNING_RATE, SEED = 32, 0.1, 0.5, 2
LAYER = 0  # the drawn one, of three that evolve together
SHOWN = 4  # pairs that get a row of their own
PARTIAL_SUMS = (1, SHOWN, PAIRS)  # pairs

# inches from the bottom of the sheet
ROWS = (6.9, 5.6, 4.3, 3.0)  # one per shown pair
MIDDLE = (ROWS[0] + ROWS[-1]) / 2
FOOTNOTE = 2.05
CELL = 16 / TALK_STYLE["savefig.dpi"]  # whole pixels, or the squares come out uneven


@dataclass(frozen=True)
class Step:
    """What one step of EGGROLL read, drew and wrote, for the drawn layer."""

    weights: Tensor  # (O, I)
    a: Tensor  # (N, O, R): factors of all pairs
    b: Tensor  # (N, I, R)
    scores: Tensor  # (P,)
    pair_weights: Tensor  # (N,)
    gradient_estimate: Tensor  # (O, I): what the library left in .grad, uphill
    new_weights: Tensor  # (O, I)
    fitness: float
    new_fitness: float

    @property
    def perturbations(self) -> Tensor:
        """E = A B^T / sqrt(R) of every pair, (N, O, I), for R = 1."""
        return self.a @ self.b.mT

    def partial_sum(self, pairs: int) -> Tensor:
        """The weighted sum of the first perturbations, (O, I)."""
        return torch.einsum("n,noi->oi", self.pair_weights[:pairs], self.perturbations[:pairs])


def toy_batch() -> tuple[Tensor, Tensor]:
    """Four clouds of points in 12 dimensions: inputs (B, I) and labels (B,)."""
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.arange(EXAMPLES) % CLASSES
    centres = torch.randn(CLASSES, INPUTS, generator=generator)
    spread = 0.7 * torch.randn(EXAMPLES, INPUTS, generator=generator)
    return centres[labels] + spread, labels


@torch.no_grad()
def measure() -> Step:
    """Take one step with the library's own parts, and keep what they computed."""
    inputs, labels = toy_batch()
    network = MLP(INPUTS, HIDDEN, CLASSES, seed=SEED)
    layer, fitness, members = network.layers[LAYER], cross_entropy(), BatchMembers(2 * PAIRS, SIGMA)
    evolution = Evolution(network, fitness, members, seed=SEED)
    weights, before = layer.weight.clone(), fitness(network(inputs), labels).mean()

    a, b = factors(evolution, inputs, before)  # drawn from the step's keys, as often as one likes
    scores = evolution.evaluate(inputs, labels)
    evolution.backward(scores)
    estimate = -layer.weight.grad
    torch.optim.SGD(network.parameters(), lr=LEARNING_RATE).step()

    shaped = z_score(scores)
    return Step(
        weights=weights,
        a=a,
        b=b,
        scores=scores,
        pair_weights=(shaped[0::2] - shaped[1::2]) / len(scores),
        gradient_estimate=estimate,
        new_weights=layer.weight.clone(),
        fitness=before.item(),
        new_fitness=fitness(network(inputs), labels).mean().item(),
    )


def factors(evolution: Evolution, inputs: Tensor, fitness: Tensor) -> tuple[Tensor, Tensor]:
    """A (N, O, R) and B (N, I, R) that the coming step draws for the drawn layer."""
    evolving = evolution.evolving
    calls, _ = record(evolution.network, evolving.weights, inputs)
    keys = Keys(evolution.seed, evolution.step, inputs.device)
    known = Known(keys, evolving.weights, evolving.biases, calls, fitness)
    noise = evolution.members.draw(known, evolution.blocks)
    # the library's is times sigma / sqrt(R) already
    return noise[f"a{LAYER}"].mT / SIGMA, noise[f"b{LAYER}"].mT


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix))


def rank_of_members(step: Step) -> int:
    """The rank that every single perturbation has."""
    (common,) = {rank(matrix) for matrix in step.perturbations}
    return common


def draw() -> Figure:
    step = measure()
    axes = sheet(18.2, 10.1)
    title = f"EGGROLL: many rank-{rank_of_members(step)} perturbations, one full-rank update"
    write(axes, 9.1, 9.6, title, TITLE, fontweight="bold")
    _old_weights(axes, step)
    _perturbations(axes, step)
    _fitness(axes, step)
    _pair_weights(axes, step)
    _sums(axes, step)
    _new_weights(axes, step)
    _caption(axes)
    return axes.figure


def _old_weights(axes: Axes, step: Step) -> None:
    outputs, inputs = step.weights.shape
    _heading(axes, 1.13, "weights", "$W$")
    _matrix(axes, step.weights, 0.4, MIDDLE, _weight_limit(step))
    write(axes, 1.13, MIDDLE - 0.75, f"{outputs} × {inputs}", SMALL, color=GREY)
    write(axes, 1.13, MIDDLE + 1.05, f"fitness\n{_number(step.fitness)}", SMALL)
    arrow(axes, (1.98, MIDDLE), (2.82, MIDDLE), "perturb")


def _perturbations(axes: Axes, step: Step) -> None:
    """Column times row gives a matrix, one line per pair."""
    _heading(axes, 5.1, "one random matrix per pair", r"$A_k \; B_k^{\mathsf{T}} = E_k$")
    _bracket(axes, 2.9, opens=True)
    for k, middle in enumerate(ROWS):
        _matrix(axes, step.a[k], 3.15, middle)
        write(axes, 3.5, middle, "×", HEADING)
        _matrix(axes, step.b[k].T, 3.72, middle)
        write(axes, 5.42, middle, "=", HEADING)
        _matrix(axes, step.perturbations[k], 5.66, middle)
    footnote = f"{SHOWN} of {PAIRS} pairs, each of rank {rank_of_members(step)}"
    write(axes, 5.1, FOOTNOTE, footnote, SMALL, color=GREY)


def _fitness(axes: Axes, step: Step) -> None:
    """How much better or worse than the unperturbed network both signs of each pair are."""
    zero, longest = 9.05, 0.72  # place of the unperturbed fitness, length of the longest bar
    gains = step.scores[: 2 * SHOWN] - step.fitness
    scale = longest / float(gains.abs().max())
    _heading(axes, 9.55, "fitness", r"$F(W \pm \sigma E_k)$")
    for k, middle in enumerate(ROWS):
        arrow(axes, (7.28, middle), (8.12, middle), "" if k else "evaluate")
        for sign, (symbol, colour) in enumerate((("+σ", POSITIVE), ("−σ", NEGATIVE))):
            member, height = 2 * k + sign, middle + 0.21 - 0.42 * sign
            axes.barh(height, float(gains[member]) * scale, 0.34, left=zero, color=colour)
            value = f"{symbol}  {_number(step.scores[member])}"
            write(axes, 9.75, height, value, SMALL, ha="left", color=colour)
    axes.plot([zero, zero], [ROWS[-1] - 0.55, ROWS[0] + 0.55], "--", color=GREY, lw=1.5)
    baseline = "← worse    better →\nthan unperturbed"
    write(axes, zero, FOOTNOTE, baseline, SMALL, color=GREY)


def _pair_weights(axes: Axes, step: Step) -> None:
    """Each pair's weight in the sum, in the colour of the sign that did better."""
    _heading(axes, 12.1, "weight of\nthe pair", "$w_k$")
    limit = float(step.pair_weights[:SHOWN].abs().max())
    for k, middle in enumerate(ROWS):
        weight = float(step.pair_weights[k])
        arrow(axes, (11.14, middle), (11.53, middle))
        # paler than a matrix, so that the number can be read on it
        colour = SIGNED(0.5 + 0.3 * weight / limit)
        box(axes, 11.57, middle - 0.27, 1.06, 0.54, facecolor=colour, edgecolor=GREY)
        write(axes, 12.1, middle, _number(weight), SMALL)
    formula = r"$(z_k^{+} - z_k^{-})\, /\, P$"
    write(axes, 12.1, FOOTNOTE, formula, BODY, color=GREY)


def _sums(axes: Axes, step: Step) -> None:
    """The sum over the first pair, the shown ones and all of them: its rank grows until full."""
    _heading(axes, 14.45, "gradient\nestimate", r"$\Sigma_k \, w_k E_k$")
    _bracket(axes, 12.8, opens=False)
    arrow(axes, (12.88, MIDDLE), (13.6, MIDDLE), "add up")
    heights = (6.8, MIDDLE, 3.1)
    for pairs, middle in zip(PARTIAL_SUMS, heights, strict=True):
        total = step.partial_sum(pairs)
        _matrix(axes, total, 13.72, middle)
        label = f"{pairs} pair{'s' * (pairs > 1)}: rank {rank(total)}"
        full = rank(total) == min(total.shape)
        style = {"fontweight": "bold"} if full else {}
        write(axes, 14.45, middle - 0.75, label + " = full" * full, SMALL, **style)


def _new_weights(axes: Axes, step: Step) -> None:
    _heading(axes, 16.87, "new weights", r"$W + \eta\, \Sigma_k \, w_k E_k$")
    _matrix(axes, step.new_weights, 16.14, MIDDLE, _weight_limit(step))
    corner = "angle,angleA=0,angleB=90,rad=8"
    arrow(axes, (15.35, 3.1), (16.87, MIDDLE - 0.6), connectionstyle=corner)
    write(axes, 16.5, 2.82, f"SGD step, η = {LEARNING_RATE}", SMALL, color=GREY)
    write(axes, 16.87, MIDDLE + 1.05, f"fitness\n{_number(step.new_fitness)}", SMALL)


def _caption(axes: Axes) -> None:
    sizes = "-".join(map(str, (INPUTS, HIDDEN, HIDDEN, CLASSES)))
    lines = (
        f"Measured: first layer of an MLP {sizes}, all of whose layers are perturbed "
        f"and updated together, on a toy batch of {EXAMPLES} examples.",
        f"N = {PAIRS} pairs, P = {2 * PAIRS} batch members, σ = {SIGMA}; fitness F: mean "
        "log-likelihood of the label in nats, z: its z-score over the members.",
    )
    write(axes, 9.1, 1.05, "\n".join(lines), SMALL, color=GREY, linespacing=1.4)
    _key(axes, 4.5, 0.42)


def _key(axes: Axes, left: float, middle: float) -> None:
    """What the colours mean."""
    for value, name, width in ((-1, "negative", 1.55), (0, "zero", 1.15), (1, "positive", 1.55)):
        heatmap(axes, np.array([[value]]), left, middle, 0.22, 1)
        write(axes, left + 0.32, middle, name, SMALL, ha="left", color=GREY)
        left += width
    scales = "each matrix on its own scale, old and new W on one"
    write(axes, left, middle, scales, SMALL, ha="left", color=GREY)


def _heading(axes: Axes, x: float, name: str, formula: str) -> None:
    write(axes, x, 8.32, name, HEADING, va="baseline", fontweight="bold")
    write(axes, x, 7.98, formula, BODY, color=GREY)


def _matrix(
    axes: Axes, values: Tensor, left: float, middle: float, limit: float | None = None
) -> None:
    """A heatmap on the matrix's own scale, unless it has to be comparable with another."""
    heatmap(axes, values.numpy(), left, middle, CELL, limit or float(values.abs().max()))


def _weight_limit(step: Step) -> float:
    """Old and new weights share a scale, or the step between them could not be seen."""
    return float(torch.stack([step.weights, step.new_weights]).abs().max())


def _bracket(axes: Axes, x: float, opens: bool) -> None:
    """A square bracket around all rows."""
    tip = x + (0.1 if opens else -0.1)
    top, bottom = ROWS[0] + 0.5, ROWS[-1] - 0.5
    axes.plot([tip, x, x, tip], [top, top, bottom, bottom], color=GREY, lw=1.5)


def _number(value: float) -> str:
    """Three decimals and a sign, with a minus as wide as the plus."""
    return f"{value:+.3f}".replace("-", "−")
