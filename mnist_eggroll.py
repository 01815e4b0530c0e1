"""Train the 784-256-256-10 MLP on MNIST by EGGROLL: evolution, and no backpropagation at all.

python mnist_eggroll.py            # the preset of this machine: a GPU's or a CPU's
python mnist_eggroll.py --quick    # less than a minute on two cores
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from eggroll import (
    MLP,
    BackendError,
    Evolution,
    FitnessError,
    PopulationError,
    accuracy,
    cross_entropy,
)
from eggroll.backends import choose_backend
from eggroll.evolution import CAPTURABLE
from eggroll.memory import keep_freed_memory
from eggroll.population import check_population
from lab import cli, data
from lab.cli import PresetFloat, PresetInt, SharedConfig, TrainingFlags
from lab.optim import make_optimizer
from lab.training import Members, Training

METHOD = "eggroll"

# What runs where no flag says otherwise. gpu is the full experiment; cpu ends within 5 minutes on
# two cores. An epoch of mnist-sample is 32 steps, so it gets more of them.
PRESETS = {
    "gpu": {"epochs": 10, "population": 10_000, "lr": 0.05, "sigma": 0.02},
    "cpu": {"epochs": 3, "population": 832, "lr": 0.015, "sigma": 0.02},
    "quick": {"epochs": 1, "population": 128, "lr": 0.01, "sigma": 0.02},
    "gpu-sample": {"epochs": 30, "population": 10_000, "lr": 0.05, "sigma": 0.02},
    "cpu-sample": {"epochs": 30, "population": 832, "lr": 0.015, "sigma": 0.02},
    "quick-sample": {"epochs": 10, "population": 128, "lr": 0.01, "sigma": 0.02},
}


@dataclass(frozen=True)
class EvolutionFlags:
    """The population, and how its fitness is read."""

    preset: Literal["auto", "gpu", "cpu"] = "auto"
    """Which row of PRESETS decides what no flag does; auto takes the device's."""
    population: PresetInt = None
    """Members per step, two to each antithetic pair; an even number."""
    rank: int = 1
    """Rank of each member's perturbation of a weight matrix."""
    sigma: PresetFloat = None
    """Scale of the perturbations at the start, in the weights' own units."""
    sigma_decay: float = 1.0
    """Factor on sigma per epoch."""
    fitness: Literal["cross-entropy", "accuracy"] = "cross-entropy"
    """What a member is scored by on the batch: log-likelihood of the labels, or hits alone."""
    temperature: float = 2.0
    """Of the softmax in the cross-entropy; above 1, examples that are right still count."""
    shaping: Literal["z-score", "centered-rank", "sign", "none"] = "z-score"
    """What is done to the population's scores before they weigh the noise."""
    groups: int = 1
    """Parts of the population that each see their own part of every batch: with 8, 8 times as many
    members cost as many forward passes."""
    backend: Literal["auto", "eager", "compile", "triton"] = "auto"
    """auto: triton on a CUDA GPU; on a CPU compile where the run is long enough to earn it back."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the members' forward; the weights stay float32. auto: bfloat16 on a CUDA GPU, where it is
    faster, and float32 on a CPU, where it is not."""
    chunk_size: int = 0
    """Members evaluated at once; changes memory and speed, never a result (0: the device's own)."""


@dataclass(frozen=True)
class Config(SharedConfig):
    """Train the MLP on MNIST by EGGROLL."""

    training: TrainingFlags = field(
        default_factory=lambda: TrainingFlags(momentum=0.9, lr_schedule="linear")
    )
    evolution: EvolutionFlags = field(default_factory=EvolutionFlags)


def resolve(config: Config, device: torch.device) -> Config:
    """The settings of this run, with the preset's where no flag was typed."""
    config = cli.apply_preset(config, PRESETS[preset_name(config, device)])
    flags = config.evolution
    # before any data is loaded
    check_population(flags.population, flags.rank, flags.sigma, flags.groups)
    return config


def preset_name(config: Config, device: torch.device) -> str:
    name = "cpu" if device.type == "cpu" else "gpu"
    if config.evolution.preset != "auto":
        name = config.evolution.preset
    if config.run.quick:
        name = "quick"
    return name + ("-sample" if config.data.dataset == data.SAMPLE else "")


def announcement(name: str) -> str:
    """Which preset runs, and what to type for the other."""
    other = "cpu" if name.startswith("gpu") else "gpu"
    values = cli.preset_values(PRESETS[name])
    return f"preset {name} ({values}); the other one: python mnist_eggroll.py --preset {other}"


def dtype_name(flag: str, device: torch.device) -> str:
    if flag == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return flag


def train(config: Config, device: torch.device) -> None:
    """One run, from the data to its files."""
    digits = data.load_for(config.data, device)
    network = MLP(
        hidden_dim=config.network.hidden_dim,
        bias=config.network.bias,
        init=config.network.init,
        seed=config.run.seed,
    ).to(device)
    optimizer = make_optimizer(network, config.training)
    flags = config.evolution
    passes = config.training.epochs * len(digits.train) * flags.population / flags.groups
    backend = choose_backend(flags.backend, device, passes)
    evolution = Evolution(
        network,
        accuracy if flags.fitness == "accuracy" else cross_entropy(flags.temperature),
        population=flags.population,
        rank=flags.rank,
        sigma=flags.sigma,
        shaping=flags.shaping,
        seed=config.run.seed,
        groups=flags.groups,
        chunk_size=flags.chunk_size,
        backend=backend,
        dtype=torch.bfloat16 if dtype_name(flags.dtype, device) == "bfloat16" else None,
        capture=backend == "triton" and flags.shaping in CAPTURABLE,
    )
    keep_freed_memory()

    members = Members(flags.population, flags.groups, backend)
    with Training(METHOD, config, digits, network, optimizer, device, members) as training:
        with training.warm_up() as (images, labels):
            evolution.estimate(images, labels)
        evolution.step = training.step  # keys the noise: the warm-up's is drawn again
        for images, labels in training.batches():
            evolution.sigma = flags.sigma * flags.sigma_decay**training.epoch
            fitness = evolution.estimate(images, labels)
            optimizer.step()
            training.record(fitness=fitness, sigma=evolution.sigma)


def main() -> None:
    config = cli.parse(Config, cli.describe(__doc__, PRESETS))
    device = cli.resolve_device(config.run.device)
    name = preset_name(config, device)
    config = resolve(config, device)
    if config.run.print_config:
        cli.print_config(METHOD, config, device)
        return
    if not config.run.quiet:
        print(announcement(name), flush=True)
    train(config, device)


if __name__ == "__main__":
    cli.run_script(main, "mnist_eggroll.py", errors=(BackendError, FitnessError, PopulationError))
