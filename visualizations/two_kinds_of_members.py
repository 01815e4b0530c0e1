"""What a batch member and an example member see, perturb and tell, and what comes of it.

The network on the left is drawn coarsely; digits, numbers and cosines are the experiment's own.
"""

# ruff: noqa: RUF001 - the minus is meant: it is drawn

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor, nn

from eggroll import MLP, BatchMembers, Evolution, ExampleMembers, cross_entropy
from eggroll.noise import ROW_UNITS
from lab.data import SAMPLE, Dataset, load
from lab.plots import plain_number
from visualizations.canvas import (
    BODY,
    GREY,
    HEADING,
    NEGATIVE,
    POSITIVE,
    SMALL,
    TALK_STYLE,
    TITLE,
    arrow,
    box,
    heatmap,
    sheet,
    write,
)

BATCH, SEED = 128, 0
EXAMPLE_POPULATIONS = (3, 6, 12, 24, 48, 96, 144, 288, 528)  # forward passes per image
BATCH_POPULATIONS = (100, 400, 1600)
OURS, THEIRS = 144, 39_000  # this experiment's, and those of the one that it reproduces
EPOCHS, LEARNING_RATE = 3, 0.05  # of backprop, for weights that are trained

WIDTH, HEIGHT = 20.2, 10.6
ROWS = (6.75, 3.35)  # middle of each kind's row, inches from the bottom
SEES, PERTURBS, TELLS, PLOT = 1.45, 4.6, 10.0, 14.75  # left ends of the columns
CELL = 16 / TALK_STYLE["savefig.dpi"]  # whole pixels, or the squares come out uneven
LAYERS = ((8, 12), (8, 8), (4, 8))  # outputs and inputs, as they are drawn
MOSAIC = (8, 16)  # the batch's digits, and its scores


@dataclass(frozen=True)
class Cosines:
    """Cosine between gradient estimate and gradient, by forward passes per image."""

    example: list[float]  # at EXAMPLE_POPULATIONS, initial weights
    example_trained: list[float]
    batch: list[float]  # at BATCH_POPULATIONS
    trained_fitness: float  # nats


@cache
def digits() -> Dataset:
    return load(SAMPLE, Path(), torch.device("cpu"))


def first_batch() -> tuple[Tensor, Tensor]:
    """Images (B, 784) and labels (B,)."""
    data = digits()
    return data.scale(data.train.images[:BATCH]), data.train.labels[:BATCH]


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def expected_cosine(dimensions: int, population: int) -> float:
    """Of population / 2 antithetic pairs of Gaussian noise with a gradient of so many numbers."""
    return (1 + (dimensions + 1) / (population / 2)) ** -0.5


def gradient(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Of the mean fitness in all weights, by autograd, flat."""
    fitness = cross_entropy()(network(inputs), labels).mean()
    found = torch.autograd.grad(fitness, list(network.parameters()))
    return torch.cat([part.flatten() for part in found])


def estimate(
    network: nn.Module, members: BatchMembers | ExampleMembers, inputs: Tensor, labels: Tensor
) -> Tensor:
    """The same by evolution, flat."""
    evolution = Evolution(network, cross_entropy(), members, seed=SEED)
    evolution.backward(evolution.evaluate(inputs, labels))
    return torch.cat([-p.grad.flatten() for p in network.parameters()])


def train_by_backprop(network: nn.Module) -> None:
    data = digits()
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=0.9)
    for _ in range(EPOCHS):
        for rows in torch.arange(len(data.train)).split(BATCH):
            images, labels = data.scale(data.train.images[rows]), data.train.labels[rows]
            optimizer.zero_grad()
            (-cross_entropy()(network(images), labels).mean()).backward()
            optimizer.step()


@cache
def measure() -> Cosines:
    """One step's estimates of several populations against autograd, on one batch of digits."""
    batch = first_batch()

    def cosines(network, kind, populations):
        true = gradient(network, *batch)
        found = [estimate(network, kind(count), *batch) for count in populations]
        return [round(torch.cosine_similarity(true, one, dim=0).item(), 3) for one in found]

    network = MLP(seed=SEED)
    example = cosines(network, ExampleMembers, EXAMPLE_POPULATIONS)
    of_batch = cosines(network, BatchMembers, BATCH_POPULATIONS)
    train_by_backprop(network)
    with torch.no_grad():
        fitness = cross_entropy()(network(batch[0]), batch[1]).mean().item()
    trained = cosines(network, ExampleMembers, EXAMPLE_POPULATIONS)
    return Cosines(example, trained, of_batch, fitness)


def draw() -> Figure:
    axes = sheet(WIDTH, HEIGHT)
    title = f"Why {OURS} forward passes can tell more than {THEIRS:,}"
    write(axes, WIDTH / 2, HEIGHT - 0.55, title, TITLE, fontweight="bold")
    for x, heading in (
        (SEES + 1.3, "a member sees"),
        (PERTURBS + 2.35, "it perturbs"),
        (TELLS + 1.6, "one pass of the batch tells"),
        (PLOT + 2.6, "all passes together tell"),
    ):
        write(axes, x, HEIGHT - 1.7, heading, HEADING, fontweight="bold")
    for name, middle in zip(("batch\nmember", "example\nmember"), ROWS, strict=True):
        box(
            axes, 0.3, middle - 1.6, PLOT - 1.35, 3.2, facecolor="#f6f6f6", edgecolor="none",
        )  # fmt: skip
        write(axes, 0.75, middle, name, HEADING, rotation=90, fontweight="bold")
    _sees(axes)
    _perturbs(axes)
    _tells(axes)
    _plot(axes)
    _caption(axes)
    return axes.figure


def _sees(axes: Axes) -> None:
    """All the digits of a batch, or one of them."""
    images = digits().train.images[:BATCH].numpy().reshape(*MOSAIC, 28, 28)
    batch, example = ROWS
    mosaic = images.transpose(0, 2, 1, 3).reshape(MOSAIC[0] * 28, MOSAIC[1] * 28)
    _image(axes, mosaic, SEES, batch + 0.25, 1.3)
    write(axes, SEES + 1.3, batch - 0.8, f"the whole batch:\n{BATCH} images", SMALL, va="top")
    _image(axes, images[0, 0], SEES + 0.65, example + 0.25, 1.3)
    write(axes, SEES + 1.3, example - 0.8, "one image", SMALL, va="top")


def _image(axes: Axes, pixels: np.ndarray, left: float, middle: float, height: float) -> None:
    """Grey pixels with a frame, ink dark."""
    width = height * pixels.shape[1] / pixels.shape[0]
    extent = (left, left + width, middle - height / 2, middle + height / 2)
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(
        pixels, cmap="gray_r", extent=extent, interpolation="nearest", aspect="auto", zorder=2
    )
    axes.set(xlim=limits[0], ylim=limits[1])  # imshow fits them to the image
    axes.add_patch(Rectangle((left, extent[2]), width, height, fill=False, ec=GREY, zorder=3))


def _perturbs(axes: Axes) -> None:
    """Factors around the matrices that they perturb: of every layer, or of one."""
    generator, (batch, example) = np.random.default_rng(SEED), ROWS
    weights, outputs = parameters(MLP()), MLP().layers[0].out_features
    left = PERTURBS
    for place, (rows, columns) in enumerate(LAYERS):
        a, b = generator.standard_normal((rows, 1)), generator.standard_normal((1, columns))
        _layer(axes, a, b, left, batch + 0.2)
        if place == 0:
            signs, image = np.sign(a), np.abs(b)  # pixels have one sign
            signs[rows // 4 :] = 0  # it moves a few units of the layer
            _layer(axes, signs, image, left, example + 0.2)
        else:
            blank = np.zeros((rows, columns))
            heatmap(axes, blank, left + 0.2, example + 0.2, CELL, 1)
        left += columns * CELL + 0.55
    note = f"all {weights:,} weights: A Bᵀ, both random,\nin every layer"
    write(axes, PERTURBS + 2.35, batch - 0.8, note, SMALL, va="top")
    note = (
        f"one layer: A of random signs for {ROW_UNITS} of {outputs} units,\n"
        "B along what the layer reads (here the image)"
    )
    write(axes, PERTURBS + 2.35, example - 0.8, note, SMALL, va="top")


def _layer(axes: Axes, a: np.ndarray, b: np.ndarray, left: float, middle: float) -> None:
    """A (O, 1) to the left of A B^T, B^T (1, I) above it."""
    product = a @ b
    heatmap(axes, a, left, middle, CELL, float(np.abs(a).max()))
    heatmap(axes, product, left + 0.2, middle, CELL, float(np.abs(product).max()))
    top = middle + len(a) * CELL / 2 + 0.2 - CELL / 2
    heatmap(axes, b, left + 0.2, top, CELL, float(np.abs(b).max()))


def _tells(axes: Axes) -> None:
    """The scores of one forward pass over the batch: of one member, or of one for each image."""
    generator, (batch, example) = np.random.default_rng(SEED), ROWS
    scores, side = generator.standard_normal(MOSAIC), 0.2
    middle = TELLS + MOSAIC[1] * side / 2
    heatmap(axes, np.ones((1, 1)), middle - side / 2, batch + 0.25, side, 1)
    heatmap(axes, scores, TELLS, example + 0.25, side, float(np.abs(scores).max()))
    for row in ROWS:
        arrow(axes, (TELLS - 0.62, row + 0.25), (TELLS - 0.14, row + 0.25))
    weights, outputs = parameters(MLP()), MLP().layers[0].out_features
    note = f"1 member's score, for a step\nin {weights:,} dimensions"
    write(axes, middle, batch - 0.8, note, SMALL, va="top")
    note = f"{BATCH} members' scores, each for a\nstep in {ROW_UNITS} of {outputs} dimensions"
    write(axes, middle, example - 0.8, note, SMALL, va="top")


def _plot(axes: Axes) -> None:
    """How close the estimate comes to the gradient, for either kind."""
    cosines, dimensions = measure(), parameters(MLP())
    left, bottom, width, height = PLOT + 0.25, 2.5, 4.75, 5.85
    place = (left / WIDTH, bottom / HEIGHT, width / WIDTH, height / HEIGHT)
    panel = axes.figure.add_axes(place)
    populations = np.geomspace(EXAMPLE_POPULATIONS[0], 90_000, 100)
    expected = [expected_cosine(dimensions, population) for population in populations]
    panel.plot(populations, expected, color=NEGATIVE, lw=3)
    panel.plot(BATCH_POPULATIONS, cosines.batch, "o", color=NEGATIVE, ms=8)
    panel.plot(EXAMPLE_POPULATIONS, cosines.example, "o-", color=POSITIVE, lw=3, ms=8)
    panel.plot(EXAMPLE_POPULATIONS, cosines.example_trained, "o--", color=POSITIVE, lw=2, ms=5)
    ours = cosines.example[EXAMPLE_POPULATIONS.index(OURS)]
    theirs = expected_cosine(dimensions, THEIRS)
    panel.plot(THEIRS, theirs, "o", color=NEGATIVE, mfc="white", ms=11, mew=2.5)
    panel.plot(OURS, ours, "o", color=POSITIVE, mfc="white", ms=11, mew=2.5)
    for x, y, offset, side, colour in (
        (OURS, ours, (-10, 8), "right", POSITIVE),
        (THEIRS, theirs, (-8, 14), "right", NEGATIVE),
    ):
        panel.annotate(
            f"{x:,}: {y:.2f}", (x, y), offset, textcoords="offset points", ha=side,
            fontsize=BODY, fontweight="bold", color=colour,
        )  # fmt: skip
    panel.text(650, 0.97, "example\nmembers", fontsize=BODY, color=POSITIVE, va="top")
    panel.text(170, 0.09, "batch\nmembers", fontsize=BODY, color=NEGATIVE, va="bottom")
    panel.set_xscale("log")
    panel.set(xlim=(2.5, 90_000), ylim=(0, 1.04))
    panel.set_xticks([10, 100, 1_000, 10_000])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: plain_number(x, 0)))
    panel.tick_params(labelsize=SMALL - 1)
    panel.set_xlabel("forward passes per image", fontsize=BODY)
    panel.set_ylabel("cosine of the estimate with the gradient", fontsize=BODY)


def _caption(axes: Axes) -> None:
    trained = f"{measure().trained_fitness:.2f}".replace("-", "−")
    lines = (
        "Left: schematic. The scores on an image tell how the layer's outputs for it should "
        "change, δ; what the layer read, x, is known, and its weights follow: δ xᵀ.",
        f"Right: one batch of {BATCH} MNIST digits, MLP 784-256-256-10 at its initial weights; "
        f"dashed: after {EPOCHS} epochs of backprop, at a fitness of {trained} nats.",
        "Dots: measured. Blue line and ring: expected, 1 / √(1 + (d + 1) / N) for d weights and N "
        f"pairs; the reproduced experiment had {THEIRS:,} members.",
    )
    write(axes, WIDTH / 2, 0.78, "\n".join(lines), SMALL, color=GREY, linespacing=1.4)
