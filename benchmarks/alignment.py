"""Cosine and norm of each estimator's gradient against autograd's, beside what theory says.

python benchmarks/alignment.py --csv alignment.csv    # ten minutes of one core
python benchmarks/alignment.py --quick                # half a minute

Over population, rank and sigma, layer by layer and for all weights together, at the start, in the
middle and at the end of a training by backprop. Where an estimate of layer l has mean G_l and power
E|estimate|^2 = |G_l|^2 + noise_l, its cosine is about |G_l| / sqrt(power) and its norm over |G_l|
the inverse. For scores that are linear in the perturbation (O / I outputs / inputs of the layer,
d_l = O I, R rank, sums over all layers where there is no index), the noise is

eggroll-dense      (|G|^2 d_l + |G_l|^2 (1 + 2 (O + I + 1) / R)) / N          N antithetic pairs
eggroll            |G_l|^2 (U (I + 2 / R) + 1 - 2 / R) / n                    n directions, U units
                   of a block: about |G_l|^2 d_l / P of the P = n O / U members of the layer
node-perturbation  (H - n) (U - 1) / ((H - 1) n) sum over examples |G_l of the example|^2
                   n of H orthogonal rows; H is U, rounded up to a power of two

Autograd judges the estimators here and is used nowhere by them.
"""

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a file, from any folder

from benchmarks.rows import Flags, Panel, Row, Series, draw, provenance, show, write_rows
from eggroll import BlockLowRank, Evolution, LowRank, NodePerturbation, cross_entropy, identity
from eggroll.blocks import Draw
from experiment import config as experiment_config
from experiment.config import MARKERS
from experiment.data import Dataset, load
from experiment.device import choose_device, set_threads
from experiment.script import run_script
from model import MLP

BATCH = 128
POINTS = ("start", "middle", "end")
Estimator = BlockLowRank | LowRank | NodePerturbation
OTHERS = ({"rank": 4}, {"sigma": 0.002}, {"sigma": 0.1})
# An estimator, and what is changed, one setting at a time. A direction of each layer has
# 65 members of eggroll, 33 of node-perturbation
SWEEPS: dict[str, tuple[Estimator, tuple[dict, ...]]] = {
    "eggroll": (
        BlockLowRank(65 * 32, shaping=identity),
        (*({"population": 65 * n} for n in (8, 130, 520)), *OTHERS),
    ),
    "eggroll-dense": (
        LowRank(1000, shaping=identity),
        (*({"population": n} for n in (250, 4000, 16000)), *OTHERS),
    ),
    "node-perturbation": (
        NodePerturbation(132),
        (*({"population": 33 * n} for n in (1, 2, 8, 16)), {"sigma": 0.02}, {"sigma": 0.1}),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config(Flags):
    """Flags of this benchmark."""

    dataset: Literal["mnist", "mnist-sample"] = "mnist"
    """MNIST is read from $MNIST_DIR, else from data; mnist-sample needs no network."""
    draws: int = 16
    """Estimates of a row, each on another batch."""
    quick: bool = False
    """Measure each estimator once, with two draws."""


def snapshots(data: Dataset) -> dict[str, MLP]:
    """Return the network at three points of three epochs of backprop."""
    network, half, kept = MLP().to(data.train.labels.device), 3 * len(data.train) // BATCH // 2, {}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step in range(2 * half + 1):
        if step % half == 0:
            kept[POINTS[step // half]] = copy.deepcopy(network)
        images, labels = batch(data, step)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return kept


def batch(data: Dataset, number: int) -> tuple[Tensor, Tensor]:
    first = number * BATCH % (len(data.train) - BATCH + 1)
    part = data.train[slice(first, first + BATCH)]
    return data.scale(part.images), part.labels


def gradients(network: MLP, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Gradient of each layer, (O, I), of the cross-entropy's sum over the images, over BATCH."""
    loss = F.cross_entropy(network(images), labels, reduction="sum") / BATCH
    return list(torch.autograd.grad(loss, list(network.parameters())))


def power(gradient: Tensor) -> float:
    return float(gradient.square().sum())


def noise(
    es: Estimator, plans: list[Draw], network: MLP, true: list[Tensor], data: tuple[Tensor, Tensor]
) -> list[float]:
    """Return the noise power of each layer's estimate; `data` is the batch."""
    powers = [power(gradient) for gradient in true]
    if isinstance(es, LowRank):
        pairs = es.population // 2
        return [
            (sum(powers) * g.numel() + own * (1 + 2 * (sum(g.shape) + 1) / es.rank)) / pairs
            for g, own in zip(true, powers, strict=True)
        ]
    if isinstance(es, BlockLowRank):
        return [
            own * (plan.units * (g.shape[1] + 2 / es.rank) + 1 - 2 / es.rank) / plan.directions
            for g, own, plan in zip(true, powers, plans, strict=True)
        ]
    singles = [
        gradients(network, *single) for single in zip(*(d.split(1) for d in data), strict=True)
    ]
    noises = []
    for layer, plan in enumerate(plans):
        n, rows = plan.directions, 1 << (plan.units - 1).bit_length()
        unseen = (rows - n) * (plan.units - 1) / ((rows - 1) * n)
        noises.append(unseen * sum(power(single[layer]) for single in singles))
    return noises


def measure(es: Estimator, network: MLP, data: Dataset, draws: int) -> list[Row]:
    """Return a row for each layer and one for all: means over the draws."""
    evolution, means = Evolution(network, cross_entropy, es), torch.zeros(4, 3)
    for number in range(draws):
        images, labels = batch(data, number)
        true = gradients(network, images, labels)
        evolution.backward(evolution.evaluate(images, labels))
        estimates = [p.grad for p in network.parameters() if p.grad is not None]
        noises = noise(es, evolution.draws, network, true, (images, labels))
        for parts in (true, estimates):
            parts.append(torch.cat([part.flatten() for part in parts]))
        noises.append(sum(noises))
        for mean, g, estimate, noise_power in zip(means, true, estimates, noises, strict=True):
            cosine = F.cosine_similarity(g.flatten(), estimate.flatten(), dim=0)
            theory = math.sqrt(power(g) / (power(g) + noise_power))
            mean += torch.tensor([cosine, theory, estimate.norm() / g.norm()]) / draws
    whole = evolution.population
    counts = [whole] * 3 if isinstance(es, LowRank) else [plan.members for plan in evolution.draws]
    return [
        {
            "layer": layer,
            "members": count,
            "rank": getattr(es, "rank", ""),
            "sigma": es.sigma,
            "draws": draws,
            "cosine": round(cosine, 5),
            "cosine_in_theory": round(theory, 5),
            "ratio_to_theory": round(cosine / theory, 3),
            "norm": round(norm, 3),
            "norm_in_theory": round(1 / theory, 3),
        }
        for layer, count, (cosine, theory, norm) in zip(
            ("1", "2", "3", "all"), (*counts, whole), means.tolist(), strict=True
        )
    ]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the cosine of all weights by members and by sigma: measured as marks, theory lines."""
    panels = []
    for column, other, usual in (("members", "sigma", "sigma"), ("sigma", "members", "population")):
        for name, (base, _) in SWEEPS.items():
            key, series = (name, "all", getattr(base, usual)), []
            chosen = [r for r in rows if (r["estimator"], r["layer"], r[other]) == key]
            for index, point in enumerate(POINTS):
                own = [r for r in chosen if r["point"] == point and r["rank"] in (1, "")]
                own.sort(key=lambda row: row[column])
                x, paint = [r[column] for r in own], f"C{index}"
                series.append(Series(point, x, [r["cosine"] for r in own], "os^"[index], paint))
                series.append(Series("", x, [r["cosine_in_theory"] for r in own], "-", paint))
            panels.append(Panel(f"{name}, {other} {key[-1]}", column, "cosine", series))
    draw(path, "Cosine with autograd's gradient: marks. In theory, for small sigma: lines", panels)


def main() -> None:
    config = tyro.cli(Config, config=MARKERS)
    set_threads(config.threads)
    device = choose_device(config.device)
    data = load(experiment_config.Config(dataset=config.dataset), device)
    draws = 2 if config.quick else config.draws
    networks, rows = snapshots(data), []
    cases = [
        (point, name, replace(base, **change))
        for name, (base, changes) in SWEEPS.items()
        for change in ({}, *(() if config.quick else changes))
        for point in POINTS
    ]
    for point, name, es in tqdm(cases, disable=None):
        for measured in measure(es, networks[point], data, draws):
            row = {"estimator": name, "point": point} | measured
            show(row, first=not rows)
            rows.append(row | provenance(device))
    write_rows(rows, config.csv, config.json, plot)


if __name__ == "__main__":
    run_script(main, "alignment.py")
