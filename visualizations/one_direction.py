"""Figure: one direction serves K members, which split off from it at the next linear layer.

Matrices are a direction of `BlockLowRank` on a small MLP, transposed: a row is a unit, a column an
example. Costs are those of the experiment's hidden layer.

Shapes: K blocks, G units of a block, B examples, I / O inputs / outputs of the perturbed layer.
"""

# ruff: noqa: RUF001 - minus, times, sigma and primes are drawn

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from eggroll import BlockLowRank, Evolution, cross_entropy
from eggroll.noise import generator
from experiment.style import colour
from model import MLP
from visualizations.canvas import HEADING, arrow, box, caption, heatmap, sheet, write

INPUTS, HIDDEN_UNITS, CLASSES, EXAMPLES, SEED = 10, 8, 4, 6, 2
ESTIMATOR = BlockLowRank(1, sigma=0.6, units=2)
COLOUR = colour("eggroll")

CELL = 0.12  # inches
COLUMNS = ((0.25, 4.0), (4.15, 8.1), (8.25, 14.75))  # left and right
MOVE, OUTPUT, HIDDEN, CHANGE, BLOCK, NEXT, RESULT = 1.15, 3.2, 6.1, 7.5, 9.5, 10.8, 12.4
UNPERTURBED, MEMBERS, STEP = 8.45, 6.5, 1.12  # middles of the rows, and from member to member


@dataclass(frozen=True)
class Direction:
    """One direction of the first layer, and the members that split off at the second."""

    y: Tensor  # (B, O), and below: of the unperturbed network
    h: Tensor  # (B, O)
    next_y: Tensor  # (B, O')
    move: Tensor  # (B, O)
    moved_h: Tensor  # (B, O)
    columns: list[Tensor]  # (O', G) of each member: the block's columns of the next layer's weights
    members: Tensor  # (K, B, O')
    scores: Tensor  # (K,)


@torch.no_grad()
def measure() -> Direction:
    """Evaluate one direction with the library, and record its parts."""
    rng = torch.Generator().manual_seed(SEED)
    x, labels = torch.randn(EXAMPLES, INPUTS, generator=rng), torch.arange(EXAMPLES) % CLASSES
    network = MLP(INPUTS, HIDDEN_UNITS, CLASSES, seed=SEED)
    evolution = Evolution(network, cross_entropy, ESTIMATOR, SEED)
    scores = evolution.evaluate(x, labels)
    layer, following, plan = *evolution.layers[:2], evolution.draws[0]
    noise = ESTIMATOR.sample(layer, plan, generator(SEED, 0, 0, plan.number, x.device))
    y, next_y = evolution.calls[0].y, evolution.calls[1].y
    moved = ESTIMATOR.perturb(noise, layer, 0, x[None], y)
    h, moved_h = F.gelu(y), F.gelu(moved)
    return Direction(
        y=y[0],
        h=h[0],
        next_y=next_y[0],
        move=(moved - y)[0],
        moved_h=moved_h[0],
        columns=list(network.layers[1].weight.detach().split(plan.units, 1)),
        members=ESTIMATOR.split(following, torch.cat([h, moved_h]), plan, following.product),
        scores=scores[: plan.members],
    )


def draw() -> Figure:
    axes = sheet(11.4, "One direction serves many members, which split off at the next layer")
    direction, linear = measure(), MLP().layers
    members, units = linear[0].out_features // BlockLowRank().units, BlockLowRank().units
    inputs, outputs, following = *linear[0].weight.T.shape, linear[1].out_features
    costs = (
        f"{inputs} + {outputs} multiply-adds,\nonce for K = {members} members",
        f"{outputs} activations, once\nfor K = {members} members",
        f"{following} × {units} multiply-adds for each member,\n"
        f"in place of {following} × {outputs}",
    )
    names = ("perturbed layer", "activation", "next linear layer")
    for (left, right), name, cost in zip(COLUMNS, names, costs, strict=True):
        box(axes, left, 1.5, right - left, 8.7, facecolor="#f6f6f6", edgecolor="none")
        write(axes, (left + right) / 2, 9.85, name, HEADING, va="baseline", fontweight="bold")
        write(axes, (left + right) / 2, 2.05, cost)
    sizes = "-".join(map(str, (INPUTS, HIDDEN_UNITS, HIDDEN_UNITS, CLASSES)))
    _draw_unperturbed(axes, direction)
    _draw_direction(axes, direction)
    _draw_members(axes, direction)
    caption(
        axes,
        0.7,
        f"Matrices: BlockLowRank on an MLP {sizes} with blocks of {ESTIMATOR.units} units; "
        f"rows are units, columns {EXAMPLES} examples.",
        "Numbers: an example's, for the first layer of the MLP 784-256-256-10 and blocks of "
        f"{units} units.",
    )
    return axes.figure


def _draw_unperturbed(axes: Axes, direction: Direction) -> None:
    """Draw y, h and the next layer's output, which are computed once per batch."""
    _label(axes, UNPERTURBED, "unperturbed")
    _matrix(axes, direction.y.T, OUTPUT, UNPERTURBED, "y")
    _matrix(axes, direction.h.T, HIDDEN, UNPERTURBED, "h")
    limit = float(direction.members.abs().max())
    _matrix(axes, direction.next_y.T, RESULT, UNPERTURBED, "y′ = W′ h", limit)
    _arrow(axes, OUTPUT, HIDDEN, UNPERTURBED, "GELU")
    _arrow(axes, HIDDEN, RESULT, UNPERTURBED)


def _draw_direction(axes: Axes, direction: Direction) -> None:
    """Draw the perturbed layer and the activation after it, which all members share."""
    middle, change = MEMBERS - 1.5 * STEP, direction.moved_h - direction.h
    _label(axes, middle, "direction")
    for values, like, center, name in (
        (direction.move, direction.move, MOVE, "σ A Bᵀ x"),
        (direction.y + direction.move, direction.y, OUTPUT, "y + σ A Bᵀ x"),
        (direction.moved_h, direction.h, HIDDEN, "h + Δ"),
        (change, change, CHANGE, "Δ"),
    ):
        _matrix(axes, values.T, center, middle, name, float(like.abs().max()))
    _arrow(axes, MOVE, OUTPUT, middle, "+ y")
    _arrow(axes, OUTPUT, HIDDEN, middle, "GELU")
    _arrow(axes, HIDDEN, CHANGE, middle, "− h")


def _draw_members(axes: Axes, direction: Direction) -> None:
    """Draw each member's columns of W', its block of the direction, and its next output."""
    change, units = (direction.moved_h - direction.h).T, ESTIMATOR.units
    limits = [float(part.abs().max()) for part in (torch.cat(direction.columns), direction.members)]
    top = MEMBERS - 1.5 * STEP + CELL * len(change) / 2
    for k, columns in enumerate(direction.columns):
        middle, block = MEMBERS - k * STEP, slice(k * units, (k + 1) * units)
        own, weights = torch.zeros_like(change), torch.zeros(len(columns), len(change))
        own[block], weights[:, block] = change[block], columns
        start = CHANGE + 0.42, top - CELL * (k + 0.5) * units
        arrow(axes, start, (BLOCK - 0.55, middle), color=COLOUR)
        first = k == 0
        _matrix(axes, weights, BLOCK, middle, "its W′" * first, limits[0])
        write(axes, (BLOCK + NEXT) / 2 + 0.06, middle, "×", HEADING)
        _matrix(axes, own, NEXT, middle, "its Δ" * first, float(change.abs().max()))
        _arrow(axes, NEXT, RESULT, middle, "+ y′")
        _matrix(axes, direction.members[k].T, RESULT, middle, "its y′" * first, limits[1])
        arrow(axes, (RESULT + 0.5, middle), (RESULT + 0.95, middle))
        score = f"{float(direction.scores[k]):.2f}".replace("-", "−")
        write(axes, RESULT + 1.45, middle, score, color=COLOUR, fontweight="bold")
    height = MEMBERS + CELL * len(change) / 2 + 0.14
    write(axes, RESULT + 1.45, height, "its score", va="baseline")
    write(axes, BLOCK - 0.5, height + 0.5, f"K = {k + 1} members", ha="left", fontweight="bold")


def _label(axes: Axes, middle: float, name: str) -> None:
    """Write a row's name above the left end of its matrices."""
    place = COLUMNS[0][0] + 0.2, middle + 1.02
    write(axes, *place, name, ha="left", va="baseline", fontweight="bold")


def _arrow(axes: Axes, start: float, end: float, middle: float, label: str = "") -> None:
    """Draw an arrow between two matrices that are centered on `start` and `end`."""
    arrow(axes, (start + 0.47, middle), (end - 0.47, middle), label)


def _matrix(
    axes: Axes, values: Tensor, center: float, middle: float, name: str, limit: float | None = None
) -> None:
    """Draw a matrix (units, examples) with its name above it."""
    rows, columns = values.shape
    heatmap(axes, values.numpy(), center - CELL * columns / 2, middle, CELL, limit)
    write(axes, center, middle + CELL * rows / 2 + 0.14, name, va="baseline")
