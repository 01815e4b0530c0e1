"""Figure: what a member of each estimator perturbs, which scores it gets, and what they say.

Matrices are the library's noise for a small MLP; numbers are measured on the real one.
"""

# ruff: noqa: RUF001 - minus, times and sigma are drawn

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from eggroll import BlockLowRank, Evolution, LowRank, NodePerturbation, cross_entropy
from eggroll.evolution import Estimator
from eggroll.noise import generator
from experiment.config import Config
from experiment.data import SAMPLE, load
from experiment.style import COLOURS
from model import MLP
from visualizations.canvas import GREY, HEADING, arrow, box, caption, heatmap, sheet, write

BATCH, SEED = 128, 0
PRESETS = {  # those of mnist_eggroll.py, as are their initial weights
    "eggroll-dense": LowRank(832),
    "eggroll": BlockLowRank((8192, 8192, 256)),
    "node-perturbation": NodePerturbation(),
}
INIT_SCALES = {"eggroll-dense": 0.5, "eggroll": 0.1, "node-perturbation": 0.5}
LAYERS = ((8, 10), (8, 8), (4, 8))  # outputs and inputs of the small MLP
EXAMPLES, UNITS = 10, 2  # of its batch, and of a block
BLOCK = slice(UNITS, 2 * UNITS)  # the block that the drawn member perturbs

CELL = 0.1  # inches
LEFTS, COLUMN = (0.85, 5.57, 10.29), 4.56  # of the columns, and their width
ROWS = {  # middle and height
    "perturbs": (8.7, 2.4),
    "directions": (6.35, 2.1),
    "scores": (4.1, 2.2),
    "estimate": (2.15, 1.5),
}


@dataclass(frozen=True)
class Measured:
    """One step of a preset's estimator, on the initial MLP and one batch."""

    population: int
    members: int  # of a direction of the first layer
    changes: str  # what a member of the first layer perturbs
    scores: Tensor  # minus the unperturbed network's: (P,) or (P, B)
    cosine: float  # of the estimate and the gradient


@cache
def first_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return scaled images and the images as they are, (B, 784), and labels (B,)."""
    data = load(Config(dataset=SAMPLE), torch.device("cpu"))
    batch = data.train[:BATCH]
    return data.scale(batch.images), batch.images, batch.labels


@cache
def measure(preset: str) -> Measured:
    """Compare one step's estimate with autograd's gradient."""
    inputs, _, labels = first_batch()
    network = MLP(seed=SEED, init_scale=INIT_SCALES[preset])
    evolution = Evolution(network, cross_entropy, PRESETS[preset], seed=SEED)
    scores = evolution.evaluate(inputs, labels)
    evolution.backward(scores)
    estimate = torch.cat([-p.grad.flatten() for p in network.parameters()])
    fitness = cross_entropy(network(inputs), labels).mean()
    gradient = torch.autograd.grad(fitness, list(network.parameters()))
    gradient = torch.cat([part.flatten() for part in gradient])
    first = evolution.draws[0]
    if len(first.layers) > 1:
        changes = f"{len(gradient):,} weights"
    elif scores.dim() == 1:
        changes = f"{first.units} × {network.layers[0].in_features} weights"
    else:
        changes = f"{first.units} outputs"
    cosine = torch.cosine_similarity(estimate, gradient, dim=0).item()
    change = scores - evolution.baseline
    return Measured(evolution.population, first.blocks, changes, change, cosine)


@torch.no_grad()
def sample(estimator: Estimator) -> tuple[Evolution, list]:
    """Return the first draw's noise of each of its layers, for the small MLP."""
    network = MLP(LAYERS[0][1], LAYERS[0][0], LAYERS[2][0], seed=SEED)
    evolution = Evolution(network, cross_entropy, estimator, seed=SEED)
    inputs = torch.randn(EXAMPLES, LAYERS[0][1], generator=torch.Generator().manual_seed(SEED))
    evolution.evaluate(inputs, torch.zeros(EXAMPLES, dtype=torch.int64))
    draw = evolution.draws[0]
    keys = [(i, generator(SEED, 0, i, draw.number, inputs.device)) for i in draw.layers]
    return evolution, [estimator.sample(evolution.layers[i], draw, key) for i, key in keys]


def draw() -> Figure:
    axes = sheet(11.9, "Three estimators: what a member perturbs, and what its score says")
    for row, (middle, height) in ROWS.items():
        write(axes, 0.42, middle, row, HEADING, rotation=90, fontweight="bold")
        for left in LEFTS:
            joined = row == "directions" and left != LEFTS[0]  # two estimators share a cell
            width = LEFTS[2] - LEFTS[1] + COLUMN if joined else COLUMN
            if not joined or left == LEFTS[1]:
                corner = left, middle - height / 2
                box(axes, *corner, width, height, facecolor="#f6f6f6", edgecolor="none")
    for left, (preset, estimator) in zip(LEFTS, PRESETS.items(), strict=True):
        color, center, name = COLOURS[preset], left + COLUMN / 2, type(estimator).__name__
        write(axes, center, 10.6, name, HEADING, fontweight="bold", color=color)
        write(axes, center, 10.22, f"preset {preset}", color=GREY)
        _draw_scores(axes, left, measure(preset))
        _draw_cosine(axes, left, measure(preset), color)
    _draw_low_rank(axes)
    _draw_block_low_rank(axes)
    _draw_node_perturbation(axes)
    _draw_direction(axes)
    caption(
        axes,
        0.75,
        f"Matrices: the library's noise for an MLP 10-8-8-4 with blocks of {UNITS} units. "
        "Numbers: the presets'",
        f"estimators on one batch of {BATCH} MNIST digits; MLP 784-256-256-10 at its "
        "initial weights.",
    )
    return axes.figure


def _draw_low_rank(axes: Axes) -> None:
    """Draw A, B and E of every layer, and both members of the pair."""
    left, middle = LEFTS[0] + 0.3, ROWS["perturbs"][0] + 0.3
    noise = sample(LowRank(2))[1]
    for factors in noise:
        _draw_factors(axes, factors.a[0].T.numpy(), factors.b[0].numpy(), left, middle)
        left += 0.5 + CELL * factors.b.shape[-1]
    _note(axes, 0, "perturbs", "W + σ A Bᵀ / √R in all layers at once,\nA and B dense")
    left, middle = LEFTS[0] + 0.75, ROWS["directions"][0] + 0.3
    for sign, name in ((1, "+E"), (-1, "−E")):
        write(axes, left, middle, name)
        e = noise[0].a[0].T @ noise[0].b[0]
        heatmap(axes, sign * e.numpy(), left + 0.3, middle, CELL)
        left += 1.85
    members = measure("eggroll-dense").members
    _note(
        axes, 0, "directions", f"a pair serves {members} members,\neach with its own forward pass"
    )


def _draw_block_low_rank(axes: Axes) -> None:
    """Draw A, B and E of one member, and the layers that it leaves alone."""
    left, middle = LEFTS[1] + 0.3, ROWS["perturbs"][0] + 0.3
    factors = sample(BlockLowRank(1, units=UNITS))[1][0]
    a = np.zeros((LAYERS[0][0], 1))
    a[BLOCK] = factors.a[0].T[BLOCK]
    _draw_factors(axes, a, factors.b[0].numpy(), left, middle)
    for place, shape in ((1.66, LAYERS[1]), (2.96, LAYERS[2])):
        heatmap(axes, np.zeros(shape), left + place, middle, CELL)
    units = BlockLowRank().units
    note = f"W + σ A Bᵀ / √R in one layer,\nA: signs on one block of {units} units"
    _note(axes, 1, "perturbs", note)


def _draw_node_perturbation(axes: Axes) -> None:
    """Draw the moves of one block of outputs between two layers' weights."""
    left, middle = LEFTS[2] + 0.3, ROWS["perturbs"][0] + 0.3
    noise = sample(NodePerturbation(1, units=UNITS))[1][0]
    moves = np.zeros((LAYERS[0][0], EXAMPLES))
    moves[BLOCK] = (noise.rows[0] * noise.signs[0]).T[BLOCK]
    for values in (np.zeros(LAYERS[0]), moves, np.zeros(LAYERS[1]), np.zeros(LAYERS[2])):
        heatmap(axes, values, left, middle, CELL)
        left += CELL * values.shape[1] + 0.13
    units = NodePerturbation().units
    note = f"outputs of one layer (units × examples):\n{units} units move by orthogonal signs"
    _note(axes, 2, "perturbs", note)


def _draw_factors(axes: Axes, a: np.ndarray, b: np.ndarray, left: float, middle: float) -> None:
    """Draw A (O, 1) to the left of A B^T, and B^T (1, I) above it."""
    heatmap(axes, a, left, middle, CELL)
    heatmap(axes, a @ b, left + 0.16, middle, CELL)
    heatmap(axes, b, left + 0.16, middle + (len(a) + 1) * CELL / 2 + 0.06, CELL)


@torch.no_grad()
def _draw_direction(axes: Axes) -> None:
    """Draw how a direction passes the activation, and how members split off after it."""
    left, middle, cell = LEFTS[1] + 0.5, ROWS["directions"][0] + 0.1, 0.14
    estimator = BlockLowRank(1, units=UNITS)
    evolution, (noise, *_) = sample(estimator)
    _, x, y = evolution.calls[0]
    moved = estimator.perturb(noise, evolution.layers[0], 0, x, y)
    example = 4
    direction, after = ((f(moved) - f(y))[0, example].numpy() for f in (torch.clone, F.gelu))
    for values, label in ((direction, "GELU"), (after, "split")):
        heatmap(axes, values[:, None], left, middle, cell)
        arrow(axes, (left + 0.3, middle), (left + 1.1, middle), label)
        left += 1.25
    for block in np.split(np.eye(len(after)), len(after) // UNITS):
        heatmap(axes, (block.sum(0) * after)[:, None], left, middle, cell, np.abs(after).max())
        left += 0.3
    write(axes, LEFTS[1] + 0.57, middle - 0.68, "direction", va="top", color=GREY)
    write(axes, left - 0.53, middle - 0.68, "members", va="top", color=GREY)
    blocks, nodes = (measure(preset).members for preset in ("eggroll", "node-perturbation"))
    note = (
        "a direction moves all units of a layer;\n"
        f"it serves K = {blocks} members (BlockLowRank)\n"
        f"or {nodes} (NodePerturbation): one activation\n"
        "for all, and at the next linear layer each\n"
        "member takes its own block of units"
    )
    write(axes, left + 0.2, ROWS["directions"][0], note, ha="left")


def _draw_scores(axes: Axes, left: float, measured: Measured) -> None:
    """Draw the batch, and the first member's score on it or on each image."""
    middle, score = ROWS["scores"][0] + 0.3, measured.scores[0]
    mosaic = first_batch()[1].view(8, 16, 28, 28).transpose(1, 2).reshape(8 * 28, 16 * 28)
    limits = axes.get_xlim(), axes.get_ylim()
    extent = (left + 0.3, left + 2.3, middle - 0.5, middle + 0.5)
    axes.imshow(mosaic.numpy(), cmap="gray_r", extent=extent, aspect="auto", zorder=2)
    axes.set(xlim=limits[0], ylim=limits[1])  # imshow fits them to the image
    arrow(axes, (left + 2.4, middle), (left + 2.8, middle))
    if score.dim():
        heatmap(axes, score.view(8, 16).numpy(), left + 2.9, middle, 0.0875)
        note = f"{len(score)} scores, one for each image:\neach judges {measured.changes}"
    else:
        heatmap(axes, score.view(1, 1).numpy(), left + 3.5, middle, 0.2)
        note = f"1 score for the batch:\nit judges {measured.changes}"
    _note(axes, LEFTS.index(left), "scores", note)


def _draw_cosine(axes: Axes, left: float, measured: Measured, color: str) -> None:
    """Draw how close the population's estimate comes to the gradient."""
    middle, scale = ROWS["estimate"][0], COLUMN - 0.6
    for part, style in ((1, {"fc": "white", "ec": GREY}), (measured.cosine, {"fc": color})):
        axes.add_patch(Rectangle((left + 0.3, middle - 0.52), part * scale, 0.3, **style))
    note = f"P = {measured.population:,} members:\ncosine {measured.cosine:.2f} with the gradient"
    write(axes, left + COLUMN / 2, middle + 0.25, note)


def _note(axes: Axes, column: int, row: str, text: str) -> None:
    """Write two lines at the foot of a cell."""
    middle, height = ROWS[row]
    write(axes, LEFTS[column] + COLUMN / 2, middle - height / 2 + 0.15, text, va="bottom")
