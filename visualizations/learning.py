"""Film (GIF): filters of the first layer while backprop and EGGROLL learn them, side by side.

python -m visualizations.learning    # MNIST, some minutes on one core
python -m visualizations.learning --dataset mnist-sample --out film.gif   # 5,000 digits

Both start from the same weights, EGGROLL's, and take the same batches in the same order; other
settings are those of the presets in mnist_backprop.py and mnist_eggroll.py, but for 2 epochs.

Most of EGGROLL's weights are noise in directions that images hardly have. So the film also shows
how a unit's output varies with each pixel: the weights times the covariance of the pixels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from eggroll import BlockLowRank, Evolution, PopulationError, cross_entropy
from experiment.config import FloatConfig, PathFlag
from experiment.data import Dataset, load
from experiment.device import set_threads
from experiment.evaluation import evaluate
from experiment.optim import make_optimizer, make_schedule
from experiment.script import run_script
from experiment.style import colour
from model import MLP
from visualizations.canvas import GREY, INK, SHEET_STYLE, SIGNED

ESTIMATOR = BlockLowRank((8192, 8192, 256))
usual = partial(FloatConfig, epochs=2, label_smoothing=0.1, init_scale=0.1)
CONFIGS = {
    "backprop": usual(lr=0.1, schedule="onecycle"),
    "eggroll": usual(lr=0.0066, schedule="linear", weight_decay=0.02),
}
NAMES = {"backprop": "backpropagation", "eggroll": "EGGROLL"}

UNITS, COLUMNS = 12, 6  # that are drawn, the first of 256; and in a row
IMAGES = 5_000  # training images of the covariance
SIDE, LEVELS = 28, 21  # pixels of an image; colors of the weights: a GIF has few
FRAMES, FRAME_MS, LAST_MS = 60, 100, 5_000
WIDTH, HEIGHT, LEFTS, ZOOM, GAP = 800, 530, (26, 410), 2, 2  # pixels; gap of the mosaic, unzoomed
SIDE_WIDTH = ZOOM * (COLUMNS * (SIDE + GAP) + GAP)  # pixels of a method's half
FILE = Path(__file__).with_suffix(".gif")


class Recording(NamedTuple):
    """One method, frame by frame."""

    steps: np.ndarray  # (frames,)
    weights: np.ndarray  # (frames, units, 28, 28), of the first layer
    responses: np.ndarray  # (frames, units, 28, 28): covariance of its outputs with each pixel
    accuracy: np.ndarray  # (frames,): of the test images, a fraction


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of the film."""

    dataset: Literal["mnist", "mnist-sample"] = "mnist"
    """MNIST is read from $MNIST_DIR, else from data; mnist-sample needs no network."""
    threads: int = 1
    """CPU threads."""
    recording: PathFlag = None
    """File (.npz) of the weights that were recorded: read if it exists, else written."""
    out: Path = FILE
    """File for the film."""


# ---- record ----


def frame_steps(steps: int) -> np.ndarray:
    """Return the steps of the film: 0, and 1 to the last at equal ratios."""
    return np.unique([0, *np.geomspace(1, steps, FRAMES).round().astype(int)])


def train(config: FloatConfig, estimator: BlockLowRank | None, data: Dataset) -> Iterator[MLP]:
    """Yield the network before the first step and after each; without an estimator: backprop."""
    network = MLP(seed=config.seed, init_scale=config.init_scale)
    fitness = partial(cross_entropy, label_smoothing=config.label_smoothing)
    evolution = estimator and Evolution(network, fitness, estimator, config.seed)
    optimizer = make_optimizer(network, config)
    schedule = make_schedule(optimizer, config, config.epochs * data.steps(config.batch_size))
    yield network
    for epoch in range(config.epochs):
        for rows in data.batches(epoch, config.seed, config.batch_size):
            images, labels = data.batch(rows)
            if evolution:
                evolution.backward(evolution.evaluate(images, labels))
            else:
                optimizer.zero_grad()
                (-fitness(network(images), labels).mean()).backward()
            optimizer.step()
            schedule.step()
            yield network


def record(config: FloatConfig, estimator: BlockLowRank | None, data: Dataset) -> Recording:
    """Train, and keep the filters and the test accuracy at the film's steps."""
    total = config.epochs * data.steps(config.batch_size)
    steps, weights, accuracy = frame_steps(total), [], []
    trained = tqdm(train(config, estimator, data), total=total + 1, disable=None)
    for step, network in enumerate(trained):
        if step in steps:
            weights.append(network.layers[0].weight.detach()[:UNITS].clone())
            accuracy.append(evaluate(network, data, data.test).accuracy)
    kept, pixels = torch.stack(weights), data.scale(data.train.images[:IMAGES])
    responses = kept @ pixels.T.cov(correction=0)
    pictures = (part.unflatten(-1, (SIDE, SIDE)).numpy() for part in (kept, responses))
    return Recording(steps, *pictures, np.array(accuracy))


def record_both(flags: Flags) -> dict[str, Recording]:
    """Train by both methods, or read what --recording holds."""
    if flags.recording and flags.recording.exists():
        with np.load(flags.recording, allow_pickle=False) as file:
            return {
                m: Recording(*(file[f"{m}_{part}"] for part in Recording._fields)) for m in CONFIGS
            }
    data = load(FloatConfig(dataset=flags.dataset), torch.device("cpu"))
    estimators = {"backprop": None, "eggroll": ESTIMATOR}
    recordings = {m: record(config, estimators[m], data) for m, config in CONFIGS.items()}
    if flags.recording:
        parts = {f"{m}_{part}": v for m, r in recordings.items() for part, v in r._asdict().items()}
        np.savez_compressed(flags.recording, **parts)
    return recordings


# ---- draw ----


def draw(recordings: Mapping[str, Recording], frame: int) -> Figure:
    """Draw one frame: both methods' filters, and their accuracy so far."""
    figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
    title = "The first layer learns: the same units, from the same weights, on the same batches"
    _write(figure, LEFTS[0], HEIGHT - 30, title, size=12)
    for left, (method, recording) in zip(LEFTS, recordings.items(), strict=True):
        style = {"size": 13, "color": colour(method), "fontweight": "bold"}
        _write(figure, left, 466, NAMES[method], **style)
        accuracy = f"{100 * recording.accuracy[frame]:.1f} %"
        _write(figure, left + SIDE_WIDTH, 466, accuracy, ha="right", **style)
        for bottom, name, pictures in (
            (318, "weights", recording.weights),
            (166, "covariance of output and pixel", recording.responses),
        ):
            limit = full_color(pictures)
            mosaic = to_mosaic(pictures[frame], limit)
            figure.figimage(mosaic, left, bottom)
            text = f"{name}: full color at ±{limit:.2f}"
            _write(figure, left, bottom + len(mosaic) + 7, text, color=GREY)
    _draw_accuracy(figure, recordings, frame)
    return figure


def full_color(pictures: np.ndarray) -> float:
    """Return the value that has full color in all frames: 1 in 200 of the last is larger."""
    return float(np.quantile(np.abs(pictures[-1]), 0.995))


def to_mosaic(pictures: np.ndarray, limit: float) -> np.ndarray:
    """Return pictures (units, 28, 28) as one image in color, (height, width, 3)."""
    levels = np.rint((pictures / limit).clip(-1, 1) * (LEVELS // 2)) / (LEVELS // 2)
    colors = SIGNED(0.5 + levels / 2)[..., :3]
    tile = SIDE + GAP
    mosaic = np.full((UNITS // COLUMNS * tile + GAP, COLUMNS * tile + GAP, 3), 0.85)
    for unit, image in enumerate(colors):
        row, column = (GAP + tile * place for place in divmod(unit, COLUMNS))
        mosaic[row : row + SIDE, column : column + SIDE] = image
    return mosaic.repeat(ZOOM, 0).repeat(ZOOM, 1)


def _draw_accuracy(figure: Figure, recordings: Mapping[str, Recording], frame: int) -> None:
    """Draw the curves up to this frame, on axes that stay."""
    axes = figure.add_axes((62 / WIDTH, 50 / HEIGHT, 714 / WIDTH, 88 / HEIGHT))
    for method, (steps, _, _, accuracy) in recordings.items():
        past = slice(frame + 1)
        axes.plot(steps[past], 100 * accuracy[past], color=colour(method), lw=2)
        axes.plot(steps[frame], 100 * accuracy[frame], "o", color=colour(method), ms=6)
    last = int(steps[-1])
    ticks = [0, *(10**power for power in range(4) if 10**power < last / 2), last]
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlim=(-0.05, last * 1.15), ylim=(0, 104))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_yticks([0, 50, 100], ["0", "50", "100 %"])
    axes.xaxis.set_minor_locator(plt.NullLocator())
    axes.tick_params(labelsize=9, length=3)
    axes.set_xlabel(f"test accuracy at step {steps[frame]:,}", fontsize=9.5, labelpad=2)


def _write(figure: Figure, x: float, y: float, text: str, size: float = 9, **style) -> None:
    """Write text with its baseline at pixels (x, y) from the lower left corner."""
    figure.text(x / WIDTH, y / HEIGHT, text, size=size, **({"color": INK} | style))


def write_film(recordings: Mapping[str, Recording], path: Path) -> None:
    """Write all frames as a GIF that stays at the last one for some seconds, then repeats."""
    images = []
    for frame in range(len(recordings["eggroll"].steps)):
        figure = draw(recordings, frame)
        figure.canvas.draw()
        images.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()))
        plt.close(figure)
    palette = film_palette()  # one for all frames, so that equal pixels stay equal
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [FRAME_MS] * (len(images) - 1) + [LAST_MS]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


def film_palette() -> Image.Image:
    """Return an image whose palette has all weights' colors, and each ink in 8 shades to white."""
    inks = [to_rgb(ink) for ink in (INK, GREY, *map(colour, CONFIGS))]
    shades = [1 - np.linspace(0, 1, 9)[1:, None] * (1 - np.array(ink)) for ink in inks]
    weights = SIGNED(np.linspace(0, 1, LEVELS))[:, :3]
    image = Image.new("P", (1, 1))
    image.putpalette((255 * np.concatenate([weights, *shades])).round().astype(np.uint8).tobytes())
    return image


def main() -> None:
    flags = tyro.cli(Flags, description=__doc__)
    set_threads(flags.threads)
    with plt.rc_context(SHEET_STYLE):
        write_film(record_both(flags), flags.out)
    print(flags.out)


if __name__ == "__main__":
    run_script(main, "learning.py", errors=(PopulationError,))
