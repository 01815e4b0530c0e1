"""How well both kinds of members point: cosine of the estimate with the gradient of autograd.

python benchmarks/alignment.py --csv alignment.csv     # some minutes on two cores
python benchmarks/alignment.py --quick                 # one of them

Over population, rank, sigma and layer, at the start, in the middle and at the end of a training
by backprop. Beside each measured mean stands what theory says of it, for fitness that is linear in
the perturbation:

batch    cos^2 = |g_l|^2 / (|g_l|^2 (1 + 1 / N) + D_l |g|^2 / N)
         for N pairs that perturb D weights in all; a layer has D_l of them, and is read through the
         noise of the whole gradient |g|
example  cos^2 = |g_l|^2 / (|g_l|^2 + q sum over examples of |g_l of the example|^2)
         with q = (R - M) (O - 1) / ((R - 1) M) for M of R orthogonal rows and O outputs

Autograd is used here to judge the estimators, and nowhere by them.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import tyro
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder

from benchmarks.rows import provenance, show, write_rows
from eggroll import MLP, BatchMembers, Evolution, ExampleMembers, cross_entropy
from eggroll.memory import keep_freed_memory
from eggroll.noise import most_rows
from lab import cli, data
from lab.cli import DataFlags, PathFlag
from lab.plots import STYLE, plain_number, save

BATCH = 128
POINTS = ("start", "middle", "end")
POPULATIONS = (100, 250, 1_000, 4_000)
MEMBERS = (8, 16, 32, 64, 128, 256)  # of each layer that see an example
RANKS = (1, 2, 4, 8)
SIGMAS = {"batch": (0.002, 0.02, 0.05, 0.1), "example": (0.001, 0.004, 0.02, 0.1)}
USUAL = {"batch": (1_000, 0.02), "example": (64, 0.004)}  # population and sigma
COLUMNS = ("kind", "point", "layer", "members", "rank", "sigma", "draws")
COLUMNS += ("cosine", "theory", "ratio_to_theory", "norm_ratio", "device", "torch", "commit")


@dataclass(frozen=True)
class Config:
    """Cosine of each estimator with autograd's gradient."""

    dataset: Literal["mnist", "mnist-sample"] = "mnist"
    """Which images; mnist-sample needs no network."""
    data_dir: PathFlag = None
    """Folder in torchvision's layout (default: $MNIST_DIR, else data)."""
    draws: int = 16
    """Estimates per row, of which the mean is given."""
    quick: bool = False
    """Few sizes and draws: to see that it works."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to measure."""
    csv: PathFlag = None
    """File for the rows; a plot goes beside it."""
    json: PathFlag = None
    """File for the rows as a JSON list."""


@dataclass(frozen=True)
class Case:
    kind: str
    members: int
    rank: int
    sigma: float


def cases(quick: bool) -> Iterator[Case]:
    """Both kinds at their usual size, and with one thing changed at a time."""
    for kind, (members, sigma) in USUAL.items():
        sizes = POPULATIONS if kind == "batch" else MEMBERS
        for size in sizes[1:3] if quick else sizes:
            yield Case(kind, size, 1, sigma)
        if not quick:
            if kind == "batch":
                yield from (Case(kind, members, rank, sigma) for rank in RANKS[1:])
            yield from (Case(kind, members, 1, s) for s in SIGMAS[kind] if s != sigma)


def snapshots(digits: data.Dataset) -> dict[str, MLP]:
    """The network at three points of three epochs of backprop."""
    network = MLP(seed=0).to(digits.train.labels.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    per_epoch = len(digits.train) // BATCH
    kept = {}
    for step in range(3 * per_epoch + 1):
        if step % (3 * per_epoch // 2) == 0 and len(kept) < len(POINTS):
            copy = MLP(seed=0).to(digits.train.labels.device)
            copy.load_state_dict(network.state_dict())
            kept[POINTS[len(kept)]] = copy
        images, labels = batch(digits, step % per_epoch)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return kept


def batch(digits: data.Dataset, index: int) -> tuple[Tensor, Tensor]:
    part = digits.train[torch.arange(index * BATCH, (index + 1) * BATCH)]
    return digits.scale(part.images), part.labels


def gradient(network: MLP, images: Tensor, labels: Tensor, examples: int = BATCH) -> list[Tensor]:
    """Of the summed cross-entropy over `examples`, each layer's as a vector."""
    loss = F.cross_entropy(network(images), labels, reduction="sum") / examples
    return [g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]


def make_evolution(case: Case, network: MLP) -> Evolution:
    if case.kind == "batch":
        members = BatchMembers(case.members, case.sigma, case.rank, shaping="none")
    else:
        counts = [min(case.members, most_rows(layer.out_features)) for layer in network.layers]
        members = ExampleMembers(tuple(counts), case.sigma)
    return Evolution(network, cross_entropy(), members)


def theory(case: Case, network: MLP, images: Tensor, labels: Tensor) -> list[float]:
    """The cosine that each layer's estimate should have, then the whole network's if it has one."""
    whole = gradient(network, images, labels)
    squares = [float(g.square().sum()) for g in whole]
    if case.kind == "batch":
        pairs, sizes = case.members / 2, [len(g) for g in whole]
        noise = [size * sum(squares) / pairs for size in sizes]
        squares, noise = [*squares, sum(squares)], [*noise, sum(noise)]
        return [
            math.sqrt(s / (s * (1 + 1 / pairs) + n)) for s, n in zip(squares, noise, strict=True)
        ]
    single = [gradient(network, images[e : e + 1], labels[e : e + 1]) for e in range(BATCH)]
    found = []
    for index, layer in enumerate(network.layers):
        outputs, rows = layer.out_features, most_rows(layer.out_features)
        seen = min(case.members, rows)
        unseen = (rows - seen) * (outputs - 1) / ((rows - 1) * seen)
        noise = unseen * sum(float(example[index].square().sum()) for example in single)
        found.append(math.sqrt(squares[index] / (squares[index] + noise)))
    return found


def measure(case: Case, network: MLP, digits: data.Dataset, draws: int) -> list[tuple]:
    """(layer, mean cosine, theory, mean ratio of norms) of each layer and of the whole network."""
    evolution = make_evolution(case, network)
    sums: dict[str, list[float]] = {}
    for draw in range(draws):
        images, labels = batch(digits, draw)
        true = [-g for g in gradient(network, images, labels)]
        expected = theory(case, network, images, labels)
        evolution.backward(evolution.evaluate(images, labels))
        found = [-p.grad.flatten() for p in network.parameters()]
        layers = [*zip(found, true, strict=True), (torch.cat(found), torch.cat(true))]
        for index, (estimate, gradient_) in enumerate(layers[: len(expected)]):
            name = "all" if index == len(found) else str(index + 1)
            cosine = float(F.cosine_similarity(estimate, gradient_, dim=0))
            ratio = float(estimate.norm() / gradient_.norm())
            total = sums.setdefault(name, [0.0, 0.0, 0.0])
            for place, value in enumerate((cosine, expected[index], ratio)):
                total[place] += value / draws
    return [(name, *values) for name, values in sums.items()]


def row(case: Case, point: str, draws: int, measured: tuple) -> dict[str, Any]:
    layer, cosine, expected, norm_ratio = measured
    return {
        "kind": case.kind,
        "point": point,
        "layer": layer,
        "members": case.members,
        "rank": case.rank,
        "sigma": case.sigma,
        "draws": draws,
        "cosine": round(cosine, 5),
        "theory": round(expected, 5),
        "ratio_to_theory": round(cosine / expected, 3),
        "norm_ratio": round(norm_ratio, 3),
    }


def draw_plot(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Cosine against population and members, then against sigma and rank, at their usual size."""
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
        for column, (kind, (members, sigma)) in enumerate(USUAL.items()):
            own = [r for r in rows if r["kind"] == kind]
            layer = "all" if kind == "batch" else "1"
            chosen = [r for r in own if r["layer"] == layer]
            sized = [r for r in chosen if r["rank"] == 1 and r["sigma"] == sigma]
            _lines(grid[0, column], sized, "members")
            moved = [r for r in chosen if r["members"] == members and r["rank"] == 1]
            _lines(grid[1, column], moved, "sigma")
        first, second = grid[0]
        first.set_title("Batch members, whole network")
        first.set(xlabel="population", yscale="log")
        second.set_title("Example members, layer 1")
        second.set(xlabel="members of the layer that see an example", ylim=(0, 1.05))
        names = ("Batch members", "Example members, layer 1")
        for axes, name, (members, _) in zip(grid[1], names, USUAL.values(), strict=True):
            axes.set_title(f"{name}, {members:,} members")
            axes.set(xlabel="sigma", ylim=(0, None))
        first.set_yticks((0.01, 0.02, 0.05, 0.1))
        first.yaxis.set_major_formatter(FuncFormatter(plain_number))
        first.yaxis.set_minor_formatter(NullFormatter())
        for axes in grid.flat:
            axes.set(xscale="log", ylabel="cosine with autograd's gradient")
            axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
            axes.legend(fontsize=9)
        figure.suptitle("Measured: dots. Theory for small sigma: lines.")
        return save(figure, path.parent, path.stem)


def _lines(axes: plt.Axes, rows: list[dict[str, Any]], x: str) -> None:
    for point in POINTS:
        own = sorted((r for r in rows if r["point"] == point), key=lambda r: r[x])
        if own:
            where = [r[x] for r in own]
            (dots,) = axes.plot(where, [r["cosine"] for r in own], "o", label=point)
            axes.plot(where, [r["theory"] for r in own], "-", color=dots.get_color(), alpha=0.6)


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    device = cli.resolve_device(config.device)
    keep_freed_memory()
    digits = data.load_for(DataFlags(config.dataset, config.data_dir), device)
    draws = 2 if config.quick else config.draws
    networks = snapshots(digits)
    rows = []
    work = [(point, case) for case in cases(config.quick) for point in networks]
    for point, case in tqdm(work, disable=None):
        for measured in measure(case, networks[point], digits, draws):
            rows.append(row(case, point, draws, measured) | provenance(device))
            show(rows, COLUMNS[:11])
    write_rows(rows, COLUMNS, config.csv, config.json)
    if config.csv:
        print(*draw_plot(rows, config.csv), sep="\n")


if __name__ == "__main__":
    cli.run_script(main, "alignment.py", errors=())
