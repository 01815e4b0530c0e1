"""Train the 784-256-256-10 MLP on MNIST by EGGROLL: evolution, and no backpropagation at all.

python mnist_eggroll.py            # the preset of this machine: a GPU's or a CPU's
python mnist_eggroll.py --quick    # less than a minute on two cores
"""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

import torch

from eggroll import (
    MLP,
    BackendError,
    Evolution,
    FitnessError,
    LayerwiseEvolution,
    PopulationError,
    accuracy,
    cross_entropy,
)
from eggroll.backends import choose_backend
from eggroll.evolution import CAPTURABLE
from eggroll.fitness import Fitness
from eggroll.integer import (
    ONE,
    IntegerEvolution,
    IntegerMLP,
    IntegerOptimizer,
    integer_accuracy,
    integer_log_likelihood,
)
from eggroll.memory import keep_freed_memory
from eggroll.population import check_population
from eggroll.sharing import usual_groups
from lab import cli, data, user_fitness
from lab.cli import FitnessName, PresetFloat, PresetInt, PresetName, SharedConfig
from lab.optim import make_optimizer, step
from lab.training import Members, Training
from lab.user_fitness import UserFitness

# What runs where no flag says otherwise. Names of presets are estimator, kind and dataset. Of the
# paper's estimator, gpu is the full experiment, cpu ends within 5 minutes on two cores, and tools
# adds to it what makes one score per member go further (benchmarks/variance_tools.py). An epoch of
# mnist-sample is 32 steps, so it gets more of them.
PAPER = {"layers_per_member": "all", "sampling": "gaussian", "noise": "gaussian", "groups": 1}
PAPER |= {"difference": "central", "shaping": "z-score", "sigma": 0.02, "temperature": 2.0}
PAPER |= {"label_smoothing": 0.0}
CREDIT = {"layers_per_member": "one", "sampling": "whitened", "noise": "orthogonal"}
CREDIT |= {"difference": "forward", "shaping": "none", "sigma": 0.004, "temperature": 1.0}
CREDIT |= {"label_smoothing": 0.1}
TOOLS = CREDIT | {"temperature": 2.0, "label_smoothing": 0.0, "shaping": "z-score"}
PRESETS = {
    "per-example": CREDIT | {"population": 2304, "lr": 0.04, "epochs": 8},
    "per-example-quick": CREDIT | {"population": 768, "lr": 0.02, "epochs": 1},
    "population-gpu": PAPER | {"population": 10_000, "lr": 0.05, "epochs": 10},
    "population-cpu": PAPER | {"population": 832, "lr": 0.015, "epochs": 3},
    "population-cpu-quick": PAPER | {"population": 128, "lr": 0.01, "epochs": 1},
    "population-tools": TOOLS | {"population": 4608, "lr": 0.02, "epochs": 10},
    "population-tools-quick": TOOLS | {"population": 768, "lr": 0.01, "epochs": 1},
}
# Integers: a sigma of 2^-8 moves an activation by one or two of its 127 steps. The paper's
# estimator votes, and its lr is the fraction of the weights that moves.
INT8 = {"layers_per_member": "one", "sampling": "rademacher", "noise": "orthogonal"}
INT8 |= {"difference": "forward", "shaping": "none", "sigma": 2**-8, "temperature": 1.0}
INT8 |= {"label_smoothing": 0.1, "update": "error-feedback"}
INT8_VOTES = INT8 | {"shaping": "sign", "update": "votes", "noise": "rademacher", "groups": 16}
PRESETS |= {
    "per-example-int8": INT8 | {"population": 2304, "lr": 0.04, "epochs": 10},
    "per-example-int8-quick": INT8 | {"population": 768, "lr": 0.02, "epochs": 1},
    "population-int8": INT8_VOTES | {"population": 4608, "lr": 0.1, "epochs": 10},
    "population-int8-quick": INT8_VOTES | {"population": 768, "lr": 0.1, "epochs": 1},
}
PRESETS["population-gpu-quick"] = PRESETS["population-cpu-quick"]
PRESETS |= {f"{name}-sample": p | {"epochs": 30} for name, p in PRESETS.items()}
PRESETS |= {n: p | {"epochs": 10} for n, p in PRESETS.items() if n.endswith("quick-sample")}
# Units that jump answer in jumps: members must move far enough to flip some, to either side. What
# per-example credit takes instead where the activation is one of these.
JUMPS = {"difference": "central", "sigma": 0.045}
BY_ACTIVATION = {"sign": JUMPS, "step": JUMPS, "argmax-k": JUMPS}
SHOWN = ("population", "epochs", "lr", "sigma")
# What members that perturb all layers come with
PAPER_ONLY = {k: PAPER[k] for k in ("noise", "sampling", "difference")}
PAPER_ONLY |= {"estimator": "population", "share_a": False}
# What integers do without: --dtype int8 refuses any other value
INT8_ONLY = {"bias": False, "rank": 1, "share_a": False, "layers_per_member": "one"}
INT8_ONLY |= {"sampling": "rademacher", "perturbation": "low-rank", "difference": "forward"}
INT8_ONLY |= {"optimizer": "sgd", "weight_decay": 0.0, "clip_norm": 0.0, "winsorize": 0.0}
INT8_ONLY |= {"average_weights": "none", "sigma_decay": 1.0, "population_growth": 1.0}
INT8_ONLY |= {"preset": "auto", "activation": "gelu", "binary_weights": False}
LAYERS = 3  # of the network
QUICK, SAMPLE = "-quick", "-sample"  # endings of presets


@dataclass(frozen=True)
class EvolutionFlags:
    """The population, and how its fitness is read."""

    estimator: Literal["per-example", "population"] = "per-example"
    """population: the paper's, one score per member. per-example: every example is credited with
    its own fitness, which takes far fewer members, and more than the paper's estimator looks at."""
    preset: Literal["auto", "gpu", "cpu", "tools"] = "auto"
    """Which row of PRESETS decides for the paper's estimator what no flag does; auto takes the
    device's. tools: members that perturb one layer each, and see 8 examples each."""
    population: PresetInt = None
    """Members per step, over all groups."""
    groups: PresetInt = None
    """Parts of the population that each see their own part of every batch: with 8, 8 times as many
    members cost as many forward passes. Up to 16 by themselves, but for the paper's presets."""
    share_a: bool = False
    """All groups perturb in the same directions A. (A B that is formed they share in any case.)"""
    layers_per_member: Annotated[Literal["all", "one"] | None, PresetName] = None
    """all, as in the paper, or one: each layer's merit is then not read through the others'."""
    rank: int = 1
    """Rank of each member's perturbation of a weight matrix A^T B."""
    noise: Annotated[Literal["gaussian", "rademacher", "orthogonal"] | None, PresetName] = None
    """How A is drawn: gaussian, rademacher (signs) or orthogonal (signs, orthogonal members)."""
    sampling: Annotated[
        Literal["gaussian", "batch-subspace", "whitened", "rademacher"] | None, PresetName
    ] = None
    """How B is drawn: gaussian, batch-subspace (gaussian in the span of what the layer reads) or
    whitened (there, with constant effect on every example). rademacher (signs) is for int8."""
    perturbation: Literal["low-rank", "full-rank", "activations"] = "low-rank"
    """low-rank is EGGROLL. For comparison: full-rank, a dense Gaussian for every layer of every
    member, as naive evolution strategies have it; activations, signs on the layer's outputs."""
    difference: Annotated[Literal["central", "forward"] | None, PresetName] = None
    """central: members in antithetic pairs. forward: each against the unperturbed network."""
    sigma: PresetFloat = None
    """Scale of the perturbations at the start, in the weights' own units."""
    sigma_decay: float = 1.0
    """Factor on sigma per epoch."""
    population_growth: float = 1.0
    """The population at the end of the run over the one at its start; it grows linearly."""
    fitness: FitnessName = "cross-entropy"
    """What a member is scored by: log-likelihood of the labels, hits alone, or a function of your
    own: logits (P, B, 10), labels (B,) -> (P, B), or (P,) for the paper's estimator."""
    temperature: PresetFloat = None
    """Of the softmax in the cross-entropy; above 1, examples that are right still count."""
    shaping: Annotated[Literal["z-score", "centered-rank", "sign", "none"] | None, PresetName] = (
        None
    )
    """What the paper's estimator does to the scores before they weigh the noise: z-score,
    centered-rank, sign or none."""
    winsorize: float = 0.0
    """Share of the scores at either end that is pulled in to the share's edge."""
    backend: Literal["auto", "eager", "compile", "triton"] = "auto"
    """auto: triton on a CUDA GPU; on a CPU compile where the run is long enough to earn it back."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Of the forward of members that perturb all layers; the weights stay float32. auto: bfloat16
    on a CUDA GPU, float32 on a CPU, of which only some are faster with less. int8: weights,
    activations, noise and update are integers (eggroll/integer)."""
    update: Annotated[Literal["error-feedback", "votes"] | None, PresetName] = None
    """How int8 weights move. error-feedback: what a step does not use is kept, and --lr is SGD's.
    votes: by +-1 where the estimate is largest; --lr is the fraction of weights that moves."""
    chunk_size: int = 0
    """Members evaluated at once; changes memory and speed, never a result (0: the device's own)."""


@dataclass(frozen=True)
class Config(SharedConfig):
    """Train the MLP on MNIST by EGGROLL."""

    evolution: EvolutionFlags = field(default_factory=EvolutionFlags)


def resolve(config: Config, device: torch.device) -> Config:
    """The settings of this run, with the preset's where no flag was typed.

    Raises PopulationError, before any data is loaded, for flags that do not go together.
    """
    config = cli.apply_preset(config, preset_values(config, device))
    flags = config.evolution
    if flags.groups is None:
        groups = usual_groups(flags.population, LAYERS, flags.difference)
        flags = dataclasses.replace(flags, groups=groups)
        config = dataclasses.replace(config, evolution=flags)
    check_members(flags)
    check_population(flags.population, flags.rank, flags.sigma, flags.groups)
    if flags.dtype == "int8":
        check_integers(config)
        return config
    if flags.update:
        raise PopulationError(f"--update {flags.update} is for integers (add --dtype int8)")
    if flags.layers_per_member == "one":
        make_evolution(config, MLP(hidden_dim=config.network.hidden_dim), accuracy, "eager")
    fitness = make_fitness(config)
    if isinstance(fitness, UserFitness):
        examples = config.training.batch_size
        fitness.try_out(examples, by_example=flags.estimator == "per-example")
    return config


def check_members(flags: EvolutionFlags) -> None:
    """Raises PopulationError for flags that need members of the other kind."""
    if flags.layers_per_member == "one":
        if flags.perturbation == "full-rank":
            raise PopulationError(
                "--perturbation full-rank needs members that perturb all layers "
                "(add --estimator population, and --layers-per-member all to its preset tools)"
            )
        return
    only = PAPER_ONLY.items()
    wrong = [n for n, paper in only if getattr(flags, n) != paper]
    wrong += ["perturbation"] if flags.perturbation == "activations" else []
    for name in wrong:
        flag = cli.flag(name, getattr(flags, name))
        raise PopulationError(
            f"{flag} needs members that perturb one layer each (add --layers-per-member one)"
        )


def check_integers(config: Config) -> None:
    """Raises PopulationError for what --dtype int8 does not know."""
    for name, value in cli.flat(config).items():
        if name in INT8_ONLY and value != INT8_ONLY[name]:
            only = INT8_ONLY[name]
            instead = f"--{name.replace('_', '-')} {only}" if only else "leave it out"
            raise PopulationError(f"{cli.flag(name, value)} is not for --dtype int8 ({instead})")
    if config.evolution.fitness not in ("cross-entropy", "accuracy"):
        raise PopulationError(
            f"--fitness {config.evolution.fitness} is not for --dtype int8 (type cross-entropy or "
            "accuracy)"
        )
    shaping = {"per-example": "none", "population": "sign"}[config.evolution.estimator]
    if config.evolution.shaping != shaping:
        raise PopulationError(
            f"--shaping {config.evolution.shaping} is not for --dtype int8 with this estimator "
            f"(--shaping {shaping})"
        )
    make_integers(config, torch.device("cpu"), "eager")


def preset_name(config: Config, device: torch.device) -> str:
    flags, name = config.evolution, config.evolution.estimator
    if flags.dtype == "int8":
        name += "-int8"
    elif flags.estimator == "population":
        own = "cpu" if device.type == "cpu" else "gpu"
        name += "-" + (own if flags.preset == "auto" else flags.preset)
    if config.run.quick:
        name += QUICK
    return name + (SAMPLE if config.data.dataset == data.SAMPLE else "")


def preset_values(config: Config, device: torch.device) -> dict[str, int | float | str]:
    """What the preset says for this run's estimator, data and activation."""
    values = PRESETS[preset_name(config, device)]
    if config.evolution.estimator == "per-example":
        values = values | BY_ACTIVATION.get(config.network.activation, {})
    return values


def method_name(config: Config) -> str:
    """What a run is called in the results."""
    flags = config.evolution
    if flags.dtype == "int8":
        return {"per-example": "eggroll-per-example-int8", "population": "eggroll-int8"}[
            flags.estimator
        ]
    if flags.estimator == "per-example":
        return "eggroll-per-example"
    if flags.perturbation == "full-rank":
        return "full-rank-es"
    as_in_the_paper = flags.sampling == "gaussian" and flags.groups == 1
    return "eggroll" if as_in_the_paper else "eggroll-tools"


def shown(preset: dict[str, int | float | str]) -> dict[str, int | float | str]:
    """Of a preset, what differs from one to the next."""
    return {flag: value for flag, value in preset.items() if flag in SHOWN}


def announcement(config: Config, device: torch.device) -> str:
    """Which estimator and preset run, why, and what to type for another."""
    name = preset_name(config, device)
    values = cli.preset_values(shown(preset_values(config, device)))
    if config.evolution.estimator == "per-example":
        why = (
            "per-example credit: backprop's accuracy with few members, from the examples' own "
            "fitness\n(the paper's estimator: python mnist_eggroll.py --estimator population)"
        )
    elif config.evolution.dtype == "int8":
        why = "the paper's estimator: one vote per member"
    else:
        others = " or ".join(p for p in ("gpu", "cpu", "tools") if f"-{p}" not in name)
        why = (
            "the paper's estimator: one score per member "
            f"(other presets: python mnist_eggroll.py --estimator population --preset {others})"
        )
    if config.evolution.dtype == "int8":
        why += f"\nint8 weights, activations and noise; update by {config.evolution.update}"
    return f"{why}\npreset {name} ({values})"


def dtype_name(flag: str, device: torch.device) -> str:
    if flag == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return flag


def make_fitness(config: Config) -> Fitness:
    """What --fitness names. Raises UserError for a file or function that is not there."""
    name = config.evolution.fitness
    if name == "cross-entropy":
        return cross_entropy(config.evolution.temperature, config.training.label_smoothing)
    return accuracy if name == "accuracy" else user_fitness.load(name)


def make_evolution(
    config: Config, network: MLP, fitness: Fitness, backend: str
) -> Evolution | LayerwiseEvolution:
    """The trainer that the flags describe, for a backend as `choose_backend` returns it."""
    flags = config.evolution
    device = network.layers[0].weight.device
    shared = {
        "population": flags.population,
        "rank": flags.rank,
        "sigma": flags.sigma,
        "groups": flags.groups,
        "shaping": flags.shaping,
        "seed": config.run.seed,
        "chunk_size": flags.chunk_size,
        "winsorize": flags.winsorize,
    }
    if flags.layers_per_member == "one":
        return LayerwiseEvolution(
            network,
            fitness,
            credit="example" if flags.estimator == "per-example" else "member",
            noise=flags.noise,
            sampling="activations" if flags.perturbation == "activations" else flags.sampling,
            difference=flags.difference,
            share_a=flags.share_a,
            backend=backend,
            **shared,
        )
    fixed = flags.shaping in CAPTURABLE and flags.population_growth == 1 and not flags.winsorize
    return Evolution(
        network,
        fitness,
        backend=backend,
        dtype=torch.bfloat16 if dtype_name(flags.dtype, device) == "bfloat16" else None,
        capture=backend == "triton" and fixed and not isinstance(fitness, UserFitness),
        perturbation=flags.perturbation,
        **shared,
    )


def make_integers(
    config: Config, device: torch.device, backend: str
) -> tuple[IntegerMLP, IntegerEvolution, IntegerOptimizer]:
    """Network, trainer and optimizer in int8. Raises PopulationError for what they do not know."""
    flags, training = config.evolution, config.training
    network = IntegerMLP(MLP(**vars(config.network), seed=config.run.seed)).to(device)
    try:
        fitness = integer_log_likelihood(flags.temperature, training.label_smoothing, device)
        optimizer = IntegerOptimizer(network, training.lr, training.momentum, flags.update)
    except ValueError as error:
        raise PopulationError(str(error)) from error
    evolution = IntegerEvolution(
        network,
        integer_accuracy if flags.fitness == "accuracy" else fitness,
        population=flags.population,
        credit="example" if flags.estimator == "per-example" else "member",
        sigma=flags.sigma,
        noise=flags.noise,
        groups=flags.groups,
        seed=config.run.seed,
        chunk_size=flags.chunk_size,
        backend=backend,
    )
    return network, evolution, optimizer


def grown(flags: EvolutionFlags, progress: float) -> int:
    """The population at `progress` (0 to 1) of the run, in whole pairs of every group."""
    whole = 2 * flags.groups
    members = flags.population * (1 + (flags.population_growth - 1) * progress)
    return flags.population if flags.population_growth == 1 else whole * round(members / whole)


def backend_name(config: Config, examples: int, device: torch.device) -> str:
    """The backend of a run on so many training examples. Raises BackendError."""
    flags, auto = config.evolution, config.evolution.backend == "auto"
    if flags.perturbation == "full-rank" and auto:
        return "eager"
    passes = config.training.epochs * examples * flags.population / flags.groups
    no_kernels = auto and config.network.binary_weights
    no_kernels |= flags.layers_per_member == "one"
    return choose_backend(flags.backend, device, passes, no_kernels)


def train(config: Config, device: torch.device) -> None:
    """One run, from the data to its files."""
    digits = data.load_for(config.data, device)
    network = MLP(**vars(config.network), seed=config.run.seed).to(device)
    optimizer = make_optimizer(network, config.training)
    flags = config.evolution
    backend = backend_name(config, len(digits.train), device)
    fitness = make_fitness(config)
    evolution = make_evolution(config, network, fitness, backend)
    keep_freed_memory()

    members = Members(flags.population, flags.groups, flags.population_growth, backend)
    with Training(
        method_name(config), config, digits, network, optimizer, device, members
    ) as training:
        with training.warm_up() as (images, labels):
            user_fitness.warm_up(fitness, partial(evolution.estimate, images, labels))
        evolution.step = training.step  # keys the noise: the warm-up's is drawn again
        for images, labels in training.batches():
            evolution.sigma = flags.sigma * flags.sigma_decay**training.epoch
            evolution.population = grown(flags, training.step / training.total_steps)
            fitness = evolution.estimate(images, labels)
            step(optimizer, config.training)
            training.record(fitness=fitness, sigma=evolution.sigma)


def train_integers(config: Config, device: torch.device) -> None:
    """The same in int8: between a batch and the weights there is no floating number."""
    digits = data.quantised(data.load_for(config.data, device), ONE)
    flags = config.evolution
    backend = backend_name(config, len(digits.train), device)
    network, evolution, optimizer = make_integers(config, device, backend)
    keep_freed_memory()

    members = Members(flags.population, flags.groups, backend=backend)
    with Training(
        method_name(config), config, digits, network, optimizer, device, members
    ) as training:
        with training.warm_up() as (images, labels):
            evolution.estimate(images, labels)
        evolution.step = training.step  # keys the noise: the warm-up's is drawn again
        for images, labels in training.batches():
            if training.step % training.steps_per_epoch == 0:
                optimizer.count_anew()
            total = evolution.estimate(images, labels)
            optimizer.step(len(labels))
            training.record(
                total * network.nats_per_logit / len(labels),
                **saturation(training, evolution, optimizer),
            )


def saturation(
    training: Training, evolution: IntegerEvolution, optimizer: IntegerOptimizer
) -> dict[str, float]:
    """At the end of an epoch, fractions for its row: of the activations of the last batch and the
    weights that are at the end of int8, and of the weights that moved in a step, on average."""
    if (training.step + 1) % training.steps_per_epoch:
        return {}
    return {
        "saturated_activations": evolution.saturated_activations(),
        "saturated_weights": round(optimizer.saturated_weights(), 6),
        "weights_moved": round(optimizer.weights_moved(), 6),
    }


def main() -> None:
    config = cli.parse(
        Config, cli.describe(__doc__, {n: shown(p) for n, p in PRESETS.items() if SAMPLE not in n})
    )
    device = cli.resolve_device(config.run.device)
    config = resolve(config, device)
    if config.run.print_config:
        cli.print_config(method_name(config), config, device)
        return
    if not config.run.quiet:
        print(announcement(config, device), flush=True)
    (train_integers if config.evolution.dtype == "int8" else train)(config, device)


if __name__ == "__main__":
    cli.run_script(main, "mnist_eggroll.py", errors=(BackendError, FitnessError, PopulationError))
