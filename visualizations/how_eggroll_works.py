"""Figure: one step of EGGROLL (`LowRank`) on a small MLP, in matrices. All numbers are measured.

Shapes: n pairs, P = 2 n members, R = 1 rank, I / O inputs / outputs of the layer.
"""

# ruff: noqa: RUF001 - minus, times and sigma are drawn

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from eggroll import Evolution, LowRank, cross_entropy, z_score
from eggroll.noise import generator
from model import MLP
from visualizations.canvas import (
    BODY,
    GREY,
    HEADING,
    NEGATIVE,
    POSITIVE,
    SIGNED,
    arrow,
    box,
    caption,
    heatmap,
    sheet,
    write,
)

INPUTS, HIDDEN, CLASSES, EXAMPLES = 10, 8, 4, 32
PAIRS, SIGMA, LEARNING_RATE, SEED = 32, 0.1, 0.5, 2
LAYER = 0  # the layer that is drawn, of three that evolve together
SHOWN = 4  # pairs that are drawn
PARTIAL_SUMS = (1, SHOWN, PAIRS)  # pairs

CELL = 0.12  # inches
ROWS = (6.45, 5.25, 4.05, 2.85)  # one per pair that is drawn, inches from the bottom
MIDDLE = (ROWS[0] + ROWS[-1]) / 2
FOOTNOTE = 1.95


@dataclass(frozen=True)
class Step:
    """One step of EGGROLL, as seen by the layer that is drawn."""

    weights: Tensor  # (O, I)
    a: Tensor  # (n, R, O): A / sqrt(R) of each pair
    b: Tensor  # (n, R, I): B of each pair
    scores: Tensor  # (P,)
    pair_weights: Tensor  # (n,)
    estimate: Tensor  # (O, I): minus the library's .grad
    new_weights: Tensor  # (O, I)
    fitness: float
    new_fitness: float

    @property
    def perturbations(self) -> Tensor:
        """E = A B^T / sqrt(R) of every pair, (n, O, I)."""
        return self.a.mT @ self.b

    def partial_sum(self, pairs: int) -> Tensor:
        """Return the weighted sum of the first pairs' E, (O, I)."""
        return torch.einsum("n,noi->oi", self.pair_weights[:pairs], self.perturbations[:pairs])


@torch.no_grad()
def measure() -> Step:
    """Take one step with the library on four clouds of points, and record its parts."""
    rng = torch.Generator().manual_seed(SEED)
    labels, centers = torch.arange(EXAMPLES) % CLASSES, torch.randn(CLASSES, INPUTS, generator=rng)
    inputs = centers[labels] + 0.7 * torch.randn(EXAMPLES, INPUTS, generator=rng)
    network, estimator = MLP(INPUTS, HIDDEN, CLASSES, seed=SEED), LowRank(2 * PAIRS, SIGMA)
    evolution = Evolution(network, cross_entropy, estimator, seed=SEED)
    weights = network.layers[LAYER].weight.clone()
    scores = evolution.evaluate(inputs, labels)
    fitness = evolution.mean_fitness.item()
    noise = [  # drawn again from its keys
        estimator.sample(
            evolution.layers[LAYER], draw, generator(SEED, 0, LAYER, draw.number, inputs.device)
        )
        for draw in evolution.draws
    ]
    evolution.backward(scores)
    torch.optim.SGD(network.parameters(), lr=LEARNING_RATE).step()
    shaped = z_score(scores)
    return Step(
        weights=weights,
        a=torch.cat([factors.a for factors in noise]),
        b=torch.cat([factors.b for factors in noise]),
        scores=scores,
        pair_weights=(shaped[0::2] - shaped[1::2]) / len(scores),
        estimate=-network.layers[LAYER].weight.grad,
        new_weights=network.layers[LAYER].weight.clone(),
        fitness=fitness,
        new_fitness=cross_entropy(network(inputs), labels).mean().item(),
    )


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix))


def draw() -> Figure:
    step = measure()
    (each,) = {rank(matrix) for matrix in step.perturbations}
    axes = sheet(9.2, f"EGGROLL: many rank-{each} perturbations, one full-rank update")
    _draw_weights(axes, step)
    _draw_perturbations(axes, step)
    _draw_scores(axes, step)
    _draw_pair_weights(axes, step)
    _draw_sums(axes, step)
    sizes = "-".join(map(str, (INPUTS, HIDDEN, HIDDEN, CLASSES)))
    caption(
        axes,
        0.8,
        f"LowRank with n = {PAIRS} pairs, P = {2 * PAIRS} members, R = {each}, σ = {SIGMA}, on the "
        f"first layer of an MLP {sizes};",
        f"all layers evolve together, on {EXAMPLES} examples. Score: mean log-likelihood of the "
        "label; z: its z-score.",
        "Orange is positive, blue negative; each matrix has its own scale, old and new W one.",
    )
    return axes.figure


def _draw_weights(axes: Axes, step: Step) -> None:
    """Draw old and new weights on one scale, or the step between them would not show."""
    limit = float(torch.stack([step.weights, step.new_weights]).abs().max())
    _heading(axes, 0.88, "weights", "$W$")
    _heading(axes, 14.12, "update", r"$W + \eta\, \Sigma_i \, w_i E_i$")
    for left, weights, fitness in (
        (0.28, step.weights, step.fitness),
        (13.52, step.new_weights, step.new_fitness),
    ):
        heatmap(axes, weights.numpy(), left, MIDDLE, CELL, limit)
        write(axes, left + 0.6, MIDDLE + 0.95, f"score\n{_number(fitness)}")
    outputs, inputs = step.weights.shape
    write(axes, 0.88, MIDDLE - 0.75, f"{outputs} × {inputs}", color=GREY)
    arrow(axes, (1.6, MIDDLE), (2.36, MIDDLE), "perturb")
    elbow = "angle,angleA=0,angleB=90,rad=8"
    arrow(axes, (13.1, 2.95), (14.12, MIDDLE - 0.6), connectionstyle=elbow)
    write(axes, 13.9, 2.5, f"SGD step\nη = {LEARNING_RATE}", color=GREY)


def _draw_perturbations(axes: Axes, step: Step) -> None:
    """Draw column times row = matrix, one line per pair."""
    _heading(axes, 4.35, "low-rank perturbations", r"$A_i \; B_i^{\mathsf{T}} = E_i$")
    _bracket(axes, 2.5, opens=True)
    for i, middle in enumerate(ROWS):
        heatmap(axes, step.a[i].T.numpy(), 2.68, middle, CELL)
        write(axes, 3.0, middle, "×", HEADING)
        heatmap(axes, step.b[i].numpy(), 3.2, middle, CELL)
        write(axes, 4.63, middle, "=", HEADING)
        heatmap(axes, step.perturbations[i].numpy(), 4.86, middle, CELL)
    write(axes, 4.35, FOOTNOTE, f"{SHOWN} of {PAIRS} pairs", color=GREY)


def _draw_scores(axes: Axes, step: Step) -> None:
    """Draw how far the scores of both members of each pair are from the unperturbed one."""
    zero, longest = 7.72, 0.52  # inches
    gains = step.scores[: 2 * SHOWN] - step.fitness
    scale = longest / float(gains.abs().max())
    _heading(axes, 8.15, "members' scores", r"$f(W \pm \sigma E_i)$")
    for i, middle in enumerate(ROWS):
        arrow(axes, (6.2, middle), (6.95, middle), "" if i else "evaluate")
        for sign, (symbol, color) in enumerate((("+σ", POSITIVE), ("−σ", NEGATIVE))):
            member, height = 2 * i + sign, middle + 0.2 - 0.4 * sign
            axes.barh(height, float(gains[member]) * scale, 0.32, left=zero, color=color)
            value = f"{symbol}  {_number(step.scores[member])}"
            write(axes, 8.36, height, value, ha="left", color=color)
    axes.plot([zero, zero], [ROWS[-1] - 0.5, ROWS[0] + 0.5], "--", color=GREY, lw=1.5)
    write(axes, zero, FOOTNOTE, "← worse    better →\nthan unperturbed", color=GREY)


def _draw_pair_weights(axes: Axes, step: Step) -> None:
    """Draw each pair's weight in the sum, in the color of the sign that scored better."""
    _heading(axes, 10.5, "pair weight", "$w_i$")
    limit = float(step.pair_weights[:SHOWN].abs().max())
    for i, middle in enumerate(ROWS):
        weight = float(step.pair_weights[i])
        arrow(axes, (9.66, middle), (9.97, middle))
        color = SIGNED(0.5 + 0.3 * weight / limit)  # pale, so that the number can be read
        box(axes, 10.0, middle - 0.25, 1.0, 0.5, facecolor=color, edgecolor=GREY)
        write(axes, 10.5, middle, _number(weight))
    write(axes, 10.5, FOOTNOTE, r"$(z_i^{+} - z_i^{-})\, /\, P$", BODY, color=GREY)


def _draw_sums(axes: Axes, step: Step) -> None:
    """Draw the sum over one pair, a few and all: its rank grows until it is full."""
    _heading(axes, 12.45, "sum", r"$\Sigma_i \, w_i E_i$")
    _bracket(axes, 11.18, opens=False)
    arrow(axes, (11.26, MIDDLE), (11.78, MIDDLE))
    for pairs, middle in zip(PARTIAL_SUMS, (6.35, MIDDLE, 2.95), strict=True):
        total = step.partial_sum(pairs)
        full = rank(total) == min(total.shape)
        heatmap(axes, total.numpy(), 11.85, middle, CELL)
        label, style = f"{pairs} pair{'s' * (pairs > 1)}: rank {rank(total)}", {}
        if full:
            label, style = label.replace(" rank", "\nrank") + " = full", {"fontweight": "bold"}
        write(axes, 12.45, middle - 0.62, label, va="top", **style)


def _heading(axes: Axes, x: float, name: str, formula: str) -> None:
    write(axes, x, 7.75, name, HEADING, va="baseline", fontweight="bold")
    write(axes, x, 7.38, formula, BODY, color=GREY)


def _bracket(axes: Axes, x: float, opens: bool) -> None:
    tip = x + (0.1 if opens else -0.1)
    top, bottom = ROWS[0] + 0.5, ROWS[-1] - 0.5
    axes.plot([tip, x, x, tip], [top, top, bottom, bottom], color=GREY, lw=1.5)


def _number(value: float) -> str:
    """Return three decimals and a sign, with a minus as wide as the plus."""
    return f"{value:+.3f}".replace("-", "−")
