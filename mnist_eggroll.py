"""Train the 784-256-256-10 MLP on MNIST by EGGROLL: evolution, and no backpropagation at all.

python mnist_eggroll.py            # example members: backprop's accuracy in a minute or two
python mnist_eggroll.py --quick    # less than a minute on two cores
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from eggroll import (
    MLP,
    BackendError,
    BatchMembers,
    Evolution,
    ExampleMembers,
    FitnessError,
    PopulationError,
    accuracy,
    cross_entropy,
    fused,
    smoothed,
)
from eggroll.compiled import choose_backend
from eggroll.dtypes import bfloat16_pays
from eggroll.fitness import Fitness
from eggroll.int8 import (
    INT8_SCALE,
    Int8Accuracy,
    Int8CrossEntropy,
    Int8MLP,
    Int8SGD,
    Int8SmoothedAccuracy,
)
from eggroll.memory import keep_freed_memory
from lab import cli, data, processes, user_fitness
from lab.cli import (
    BothWays,
    FitnessName,
    PopulationFlag,
    PresetFloat,
    PresetInt,
    SharedConfig,
    preset_name,
)
from lab.errors import UserError
from lab.optim import make_optimizer
from lab.training import Training

# What runs where no flag says otherwise, by method. `learning_rate` follows the population.
EXAMPLE = {"sigma": 0.004, "antithetic": False, "shaping": "none"}
EXAMPLE |= {"temperature": 1.0, "label_smoothing": 0.1, "lr_schedule": "onecycle"}
EXAMPLE |= {"population": "96+128+16", "units": 16, "epochs": 6}
BATCH = {"sigma": 0.02, "antithetic": True, "shaping": "z-score"}
BATCH |= {"temperature": 2.0, "label_smoothing": 0.0, "lr_schedule": "linear", "epochs": 3}
ONE_LAYER = {"sigma": 0.004, "antithetic": False}
PRESETS = {
    "eggroll": EXAMPLE | {"lr": 0.1},
    "eggroll-int8": EXAMPLE | {"lr": 0.04, "sigma": 0.01},
    "eggroll-batch": BATCH | {"population": "832", "lr": 0.015},
    "eggroll-batch-one-layer": BATCH | ONE_LAYER | {"population": "5120", "lr": 0.012},
}
# Scores that move only where an answer does want larger steps to see them
BATCH_HITS = {"sigma": 0.04, "lr": 0.015}
# A smoothed fitness: every one but cross-entropy; with batch members hits alone, since other scores
# of a whole batch are smooth by themselves, and a digit that is lost to raw hits never comes back
SMOOTHED = {"smoothing": 2.0, "smoothing_samples": 256}
SMOOTHED_RATE = 2 / 3  # of the preset's learning rate
MANY_SAMPLES = {"smoothing_samples": 1024}  # where one score for all examples tells less of each
# populations of --quick, and on a GPU (not measured)
QUICK = {"eggroll": "48", "eggroll-int8": "48", "eggroll-batch": "128"}
QUICK |= {"eggroll-batch-one-layer": "384"}
ON_A_GPU = {"eggroll": "256+256+16", "eggroll-batch": "4000"}
# an epoch of mnist-sample is 28 steps, so it gets more of them
EPOCHS = {"quick": 1, "full-sample": 30, "quick-sample": 10}
# Units that jump answer in jumps: members must move all of them far enough to flip some, to either
# side
JUMPS = {"antithetic": True, "sigma": 0.045, "units": 256, "epochs": 10}
BY_ACTIVATION = {
    "sign": JUMPS | {"population": "192+192+16"},
    "step": JUMPS | {"population": "192+192+16"},
    "argmax-k": JUMPS | {"population": "96+96+16", "lr": 0.06},
    "int8-round": {"sigma": 0.01},
}
# Examples that batch members see beyond which compiling pays on a CPU; example members are faster
# without
WORTH_COMPILING = 100_000_000


@dataclass(frozen=True)
class EvolutionFlags:
    """The population, and how its fitness is read."""

    members: Literal["example", "batch"] = "example"
    """batch: each sees the whole batch, as in the paper. example: each sees one example."""
    population: PopulationFlag = None
    """Members that see each image; of example members also a count per layer."""
    perturb: Literal["all", "one"] = "all"
    """Layers that a batch member perturbs. (An example member perturbs one.)"""
    rank: int = 1
    """Rank of a batch member's perturbation of a weight matrix."""
    units: PresetInt = None
    """Units of a layer that an example member moves."""
    sigma: PresetFloat = None
    """Scale of the perturbations, in the weights' own units."""
    antithetic: BothWays = None
    """Pairs with signs + and - (--no-antithetic: against the unperturbed network)."""
    fitness: FitnessName = "cross-entropy"
    """A function of your own: outputs (P, B, 10), labels (B,) -> scores (P, B) or (P,)."""
    smoothing: PresetFloat = None
    """Noise on the outputs that smooths the fitness; 0 is off. Accuracy: 2; a function of your own:
    2 with example members; cross-entropy: 0."""
    smoothing_samples: PresetInt = None
    """Noisy copies of the outputs scored in a step: 256, or 1024 where a score is the batch's."""
    temperature: PresetFloat = None
    """Of the softmax in the cross-entropy; above 1, examples that are right still count."""
    shaping: preset_name("z-score", "centered-rank", "sign", "none") = None
    """Of the scores; example members know none and sign (one vote per member)."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """bfloat16: the forward of batch members. int8: all that example members train with."""
    update: preset_name("error-feedback", "votes") = None
    """Of int8 weights. votes: by +-1 where the estimate is largest; --lr is the share updated."""
    chunk_size: int = 0
    """Members evaluated at once (0: the default); memory and speed, never a result."""


@dataclass(frozen=True)
class Config(SharedConfig):
    """Train the MLP on MNIST by EGGROLL."""

    evolution: EvolutionFlags = field(default_factory=EvolutionFlags)


NO_EFFECT = (
    (("perturb", "rank"), lambda c: c.evolution.members == "example", "with example members"),
    (("units",), lambda c: c.evolution.members == "batch", "with batch members"),
    (("update",), lambda c: c.evolution.dtype != "int8", "without --dtype int8"),
    (
        ("dtype",),
        lambda c: (c.evolution.dtype, c.evolution.members) == ("bfloat16", "example"),
        "with example members",
    ),
    (
        ("shaping",),
        lambda c: c.evolution.update == "votes" and c.evolution.shaping != "sign",
        "with --update votes",
    ),
    (
        ("members", "bias", "activation", "optimizer", "weight_decay"),
        lambda c: c.evolution.dtype == "int8",
        "with --dtype int8",
    ),
    (
        ("smoothing",),
        lambda c: (c.evolution.dtype, c.evolution.fitness) == ("int8", "cross-entropy"),
        "with the cross-entropy of --dtype int8",
    ),
    (
        ("smoothing_samples",),
        lambda c: not smoothing(c.evolution),
        "without smoothing",
    ),
    (
        ("temperature", "label_smoothing"),
        lambda c: c.evolution.fitness != "cross-entropy",
        "without --fitness cross-entropy",
    ),
)


def method_name(config: Config) -> str:
    """What a run is called in the results."""
    flags = config.evolution
    if flags.dtype == "int8":
        return "eggroll-int8"
    if flags.members == "example":
        return "eggroll"
    return "eggroll-batch" + ("-one-layer" if flags.perturb == "one" else "")


def smoothing(flags: EvolutionFlags) -> float:
    """Standard deviation of the noise on the outputs, unless the fitness is smooth by itself."""
    if flags.smoothing is not None:
        return flags.smoothing
    smooth = flags.fitness == "cross-entropy" or (
        flags.members == "batch" and flags.fitness != "accuracy"
    )
    return 0.0 if smooth else SMOOTHED["smoothing"]


def of_the_batch(config: Config, device: torch.device) -> bool:
    """Whether a user's fitness has one score for the whole batch. Raises UserError where it cannot
    be used, or needs smoothing."""
    flags = config.evolution
    if flags.fitness in ("cross-entropy", "accuracy") or flags.dtype == "int8":
        return False
    whole = user_fitness.load(flags.fitness).try_out(config.training.batch_size, device)
    if whole and flags.members == "example" and not smoothing(flags):
        raise UserError(
            f"--fitness {flags.fitness} gives one score per member, and example members need one "
            "per example (leave out --smoothing 0, or add --members batch)"
        )
    return whole


def preset(config: Config, device: torch.device) -> dict[str, Any]:
    """What this run's row of the table says, for its length, device and activation."""
    method, flags = method_name(config), config.evolution
    usual = PRESETS[method]
    if method == "eggroll-batch" and flags.fitness != "cross-entropy" and not smoothing(flags):
        usual = usual | BATCH_HITS
    if flags.members == "example":
        usual = usual | BY_ACTIVATION.get(config.network.activation, {})
    values = usual | {"epochs": EPOCHS.get(data.length(config), usual["epochs"])}
    if device.type == "cuda" and method in ON_A_GPU:
        values |= {"population": ON_A_GPU[method]}
    if config.run.quick:
        values |= {"population": QUICK[method]}
    if config.network.hidden_dim < 256:  # counts per layer are for 256 units: share out their sum
        values |= {"population": str(sum(layer_counts(values["population"])))}
    whole_batch = of_the_batch(config, device)
    values["smoothing"] = 0.0
    if smoothing(flags):
        values |= SMOOTHED | {"lr": SMOOTHED_RATE * values["lr"]}
        values |= MANY_SAMPLES if whole_batch or flags.members == "batch" else {}
    if flags.dtype == "int8":
        values |= {"update": "error-feedback"}
    if flags.update == "votes":
        values |= {"shaping": "sign"}
    population = flags.population or values["population"]
    return values | {"lr": learning_rate(flags, usual | {"lr": values["lr"]}, population)}


def learning_rate(flags: EvolutionFlags, usual: dict[str, Any], population: str) -> float:
    """The preset's, for its own population: the fewer members, the noisier the estimate and the
    smaller the step.

    Measured from 12 to 528 example members, and from 64 to 5,000 batch members (docs/method.md).
    """
    if flags.update == "votes":
        return 0.02  # of the weights
    ratio = sum(layer_counts(population)) / sum(layer_counts(usual["population"]))
    return round(usual["lr"] * (min(1, ratio) if flags.members == "example" else ratio**0.4), 5)


def layer_counts(population: str) -> tuple[int, ...]:
    """64+64+16 as numbers. Raises UserError."""
    try:
        counts = tuple(int(part) for part in population.split("+"))
    except ValueError as error:
        raise UserError(f"--population {population} is no number (type 144 or 64+64+16)") from error
    if min(counts) < 1:
        raise UserError(f"--population {population} is below 1 (type 144 or 64+64+16)")
    return counts


def resolve(config: Config, device: torch.device) -> Config:
    """The settings of this run, with the preset's where no flag was typed.

    Raises UserError and PopulationError, before any data is loaded, for what cannot be trained.
    """
    cli.check_effects(config, NO_EFFECT)
    config = cli.apply_preset(config, preset(config, device))
    flags = config.evolution
    if flags.dtype == "auto":
        bfloat16 = flags.members == "batch" and bfloat16_pays(device)
        flags = dataclasses.replace(flags, dtype="bfloat16" if bfloat16 else "float32")
        config = dataclasses.replace(config, evolution=flags)
    config = cli.resolve_run(config, backend_name(config, device))
    build(config, device)  # raises what the run would raise
    return config


def backend_name(config: Config, device: torch.device) -> str:
    """The backend of this run. Raises BackendError for one that cannot run here."""
    name, flags = config.run.backend, config.evolution
    if name == "auto" and device.type == "cuda" and fused.triton is not None:
        network = MLP(**cli.network_options(config))
        if fused.fits(network, make_members(flags)):
            return "fused"
    images = 4_000 if config.data.dataset == data.SAMPLE else 60_000
    passes = config.training.epochs * images * sum(layer_counts(flags.population))
    long = flags.members == "batch" and passes > WORTH_COMPILING
    # of integers the kernels take less than a second to compile
    worth = device.type == "cuda" or flags.dtype == "int8" or long
    return choose_backend(name, device, worth=worth)


def make_fitness(config: Config, device: torch.device) -> Fitness:
    """What --fitness names. Raises UserError for a file or function that is not there."""
    flags = config.evolution
    if flags.dtype == "int8":
        return make_int8_fitness(config, device)
    if flags.fitness == "cross-entropy":
        fitness = cross_entropy(flags.temperature, config.training.label_smoothing)
    elif flags.fitness == "accuracy":
        fitness = accuracy
    else:
        fitness = user_fitness.load(flags.fitness)
    if not flags.smoothing:
        return fitness
    return smoothed(fitness, flags.smoothing, flags.smoothing_samples)


def make_int8_fitness(config: Config, device: torch.device) -> Fitness:
    """The same in integers. Raises UserError for a function of the user's own."""
    flags = config.evolution
    if flags.fitness == "cross-entropy":
        return Int8CrossEntropy(flags.temperature, config.training.label_smoothing, device)
    if flags.fitness != "accuracy":
        raise UserError(f"--fitness {flags.fitness} is not for --dtype int8 (try accuracy)")
    if not flags.smoothing:
        return Int8Accuracy()
    return Int8SmoothedAccuracy(flags.smoothing, flags.smoothing_samples)


def make_members(flags: EvolutionFlags) -> BatchMembers | ExampleMembers:
    """Raises PopulationError for a population that cannot be."""
    counts = layer_counts(flags.population)
    population = counts if len(counts) > 1 else counts[0]
    shared = {"sigma": flags.sigma, "antithetic": flags.antithetic, "shaping": flags.shaping}
    if flags.members == "example":
        return ExampleMembers(population, units=flags.units, **shared)
    if len(counts) > 1:
        raise UserError("--population counts per layer are for example members (type their sum)")
    return BatchMembers(population, rank=flags.rank, perturb=flags.perturb, **shared)


def build(
    config: Config, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, Evolution]:
    """Network, optimizer and trainer of this run."""
    flags, training = config.evolution, config.training
    network: nn.Module = MLP(**cli.network_options(config))
    if flags.dtype == "int8":
        network = Int8MLP(network)
        rule = (training.lr, training.momentum, flags.update, training.batch_size)
        optimizer: torch.optim.Optimizer = Int8SGD(network.to(device), *rule)
    else:
        optimizer = make_optimizer(network.to(device), training)
    evolution = Evolution(
        network,
        make_fitness(config, device),
        make_members(flags),
        seed=config.run.seed,
        chunk_size=flags.chunk_size,
        backend=config.run.backend,
        dtype=torch.bfloat16 if flags.dtype == "bfloat16" else None,
    )
    return network, optimizer, evolution


def train(config: Config, device: torch.device) -> None:
    """One run, from the data to its files."""
    processes.join(device)
    digits = processes.first_then_all(lambda: data.load_for(config.data, device))
    if config.evolution.dtype == "int8":
        digits = data.quantised(digits, INT8_SCALE)
    network, optimizer, evolution = build(config, device)
    keep_freed_memory()

    method = method_name(config)
    with Training(method, config, digits, network, optimizer, device, evolution) as training:
        with training.warm_up() as (images, labels):
            user_fitness.warm_up(evolution, images, labels)
        for images, labels in training.batches():
            scores = evolution.evaluate(images, labels)
            evolution.backward(scores)
            optimizer.step()
            training.record(fitness=evolution.mean_fitness)


def main() -> None:
    config = cli.parse(Config, cli.describe(__doc__, PRESETS))
    device = cli.resolve_device(config.run.device)
    config = resolve(config, device)
    if config.run.print_config:
        cli.print_config(method_name(config), config, device)
        return
    train(config, device)


if __name__ == "__main__":
    cli.run_script(main, "mnist_eggroll.py", errors=(BackendError, FitnessError, PopulationError))
