"""Flags: a frozen dataclass is the help text, the resolved settings and the log of a run."""

import dataclasses
import errno
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro

from lab import processes
from lab.errors import Interrupted, UserError

Config = TypeVar("Config")


def preset_arg(metavar: str) -> Any:
    """A flag whose default the preset decides."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="(default: the preset's)")


def preset_name(*names: str) -> Any:
    """One of these names; which, the preset decides."""
    return Annotated[Literal[names] | None, preset_arg("|".join(names))]


PresetInt = Annotated[int | None, preset_arg("INT")]
PresetFloat = Annotated[float | None, preset_arg("FLOAT")]
ScheduleName = preset_name("linear", "cosine", "onecycle", "constant")
BothWays = Annotated[bool | None, preset_arg("")]
PathFlag = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
PopulationFlag = Annotated[str | None, preset_arg("N|N+N+N")]
FitnessName = Annotated[str, tyro.conf.arg(metavar="cross-entropy|accuracy|FILE.py:FUNCTION")]
IntFlag = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]


@dataclass(frozen=True)
class DataFlags:
    """Where the digits come from."""

    dataset: Literal["mnist", "fashion-mnist", "kmnist", "mnist-sample"] = "mnist"
    """Which images; mnist-sample is 5,000 digits of MNIST that need no network."""
    data_dir: PathFlag = None
    """Folder in torchvision's layout (default: $MNIST_DIR, else data)."""
    train_on_all: bool = False
    """Train on the validation split too: for final runs, when nothing is left to choose."""


@dataclass(frozen=True)
class RunFlags:
    """Where and how it runs."""

    seed: int = 0
    """Keys the initial weights, the order of the examples and all noise."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes CUDA, then Apple's MPS, then the CPU."""
    backend: Literal["auto", "eager", "compile", "fused"] = "auto"
    """compile: torch.compile, captured as a graph on CUDA. fused: batch members on CUDA."""
    threads: IntFlag = None
    """CPU threads (default: torch's own choice, the cores)."""
    out_dir: PathFlag = None
    """Folder for all that the run writes (default: a new one under results/runs)."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    quick: bool = False
    """A run of less than a minute that shows that everything works."""
    resume: bool = False
    """Go on with the run in --out-dir, with the flags that it was started with."""
    overwrite: bool = False
    """Replace the run that is already in --out-dir."""
    quiet: bool = False
    """Print nothing but errors; the log is still written."""
    print_config: bool = False
    """Print every flag as it would be used, as JSON, and do nothing."""


@dataclass(frozen=True)
class NetworkFlags:
    """The network, the same in both scripts."""

    hidden_dim: int = 256
    """Units in each of the two hidden layers."""
    activation: Literal["gelu", "relu", "sign", "step", "argmax-k", "int8-round"] = "gelu"
    """The last four have a gradient of zero; argmax-k: 1 for the largest quarter of the units."""
    bias: bool = False
    """Add a bias to every layer."""
    init_from: PathFlag = None
    """Start from the weights in this model.safetensors (default: from --seed)."""


@dataclass(frozen=True)
class TrainingFlags:
    """How the gradient, or its estimate, is followed."""

    epochs: PresetInt = None
    """Passes over the training images."""
    batch_size: int = 128
    """Examples per step."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """From torch.optim."""
    lr: PresetFloat = None
    """Learning rate: the largest of the schedule."""
    lr_schedule: ScheduleName = None
    """linear, cosine: down to 0 over the run; onecycle: up for a fifth of it, then down."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 0.0
    """As torch's optimizer understands it."""
    label_smoothing: PresetFloat = None
    """Share of the cross-entropy's target that is spread over all classes."""


@dataclass(frozen=True)
class SharedConfig:
    """The flags that both scripts have."""

    data: DataFlags = field(default_factory=DataFlags)
    run: RunFlags = field(default_factory=RunFlags)
    network: NetworkFlags = field(default_factory=NetworkFlags)
    training: TrainingFlags = field(default_factory=TrainingFlags)


MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)

# a flag whose default the preset decides takes a value, though nobody types it
BOTH_WAYS = {"--antithetic": ["--antithetic", "True"], "--no-antithetic": ["--antithetic", "False"]}

ABOUT_THIS_CALL = ("out_dir", "resume", "overwrite", "quiet", "print_config")

# flags that may differ between a run and its resumption: they change no result
FREE_ON_RESUME = (*ABOUT_THIS_CALL, "data_dir", "device", "chunk_size", "init_from")

AT_LEAST_ONE = ("epochs", "batch_size", "hidden_dim", "eval_every", "rank", "threads")
ABOVE_ZERO = ("lr", "sigma", "temperature")
NOT_NEGATIVE = ("momentum", "weight_decay", "seed", "chunk_size", "smoothing")
PART_OF_ONE = ("label_smoothing",)

Effect = tuple[tuple[str, ...], Callable[[Any], bool], str]

# (flags, whether they have no effect, why): refused by `check_effects`
NO_EFFECT: tuple[Effect, ...] = (
    (("momentum",), lambda c: c.training.optimizer != "sgd", "with --optimizer adam or adamw"),
    (("data_dir",), lambda c: c.data.dataset == "mnist-sample", "with --dataset mnist-sample"),
    (("overwrite",), lambda c: c.run.out_dir is None, "without --out-dir"),
    (("overwrite",), lambda c: c.run.resume, "with --resume"),
)


def parse(config_type: type[Config], description: str, args: Sequence[str] | None = None) -> Config:
    """The flags of the command line; with --resume, on top of the flags the run was started with.

    Exits with code 2 on flags that are not known (tyro suggests the nearest). Raises UserError.
    """
    words = list(sys.argv[1:] if args is None else args)
    config = _tyro(config_type, description, words)
    if config.run.resume:
        if config.run.out_dir is None:
            raise UserError("--resume needs --out-dir, the folder of the run to go on with")
        saved = read_saved_config(config.run.out_dir)
        # they change bits, and what auto means may have changed since
        names = saved["flags"].keys() & {"backend", "threads", "dtype"}
        kept = [f"--{name}={saved['flags'][name]}" for name in sorted(names)]
        first = [word for word in saved["command"] if word != "--overwrite"]
        config = _tyro(config_type, description, [*first, *kept, *words])
    check_effects(config)
    return config


def _tyro(config_type: type[Config], description: str, args: Sequence[str]) -> Config:
    name = Path(sys.argv[0]).name
    words = [word for arg in args for word in BOTH_WAYS.get(arg, [arg])]
    return tyro.cli(config_type, prog=name, description=description, args=words, config=MARKERS)


def flag(name: str, value: Any) -> str:
    """A flag as it is typed."""
    word = ("--no-" if value is False else "--") + name.replace("_", "-")
    return word if isinstance(value, bool) else f"{word} {value}"


def describe(purpose: str, presets: Mapping[str, Mapping[str, Any]]) -> str:
    """The head of the help text: a script's purpose and what each of its presets sets."""
    lines = [purpose.strip().splitlines()[0]]
    for name, values in presets.items():
        lines.append(f"preset {name}: " + ", ".join(f"{k} {v}" for k, v in values.items()))
    return "\n\n".join(lines)


def typed(config: Any) -> dict[str, Any]:
    """The flags that have another value than their default."""
    defaults = flat(type(config)())
    return {name: value for name, value in flat(config).items() if value != defaults[name]}


def check_effects(config: Any, rules: Sequence[Effect] = NO_EFFECT) -> None:
    """Raises UserError for a flag that was typed where it has no effect."""
    flags = typed(config)
    for names, has_none, why in rules:
        for name in names:
            if name in flags and has_none(config):
                raise UserError(f"{flag(name, flags[name])} has no effect {why} (leave it out)")


def apply_preset(config: Config, values: Mapping[str, Any]) -> Config:
    """Fill every flag that was not typed from the preset, and check them all.

    Raises UserError for a value that no run can have.
    """
    groups = {}
    for group in dataclasses.fields(config):
        flags = getattr(config, group.name)
        names = [f.name for f in dataclasses.fields(flags)]
        missing = {n: values[n] for n in names if getattr(flags, n) is None and n in values}
        groups[group.name] = dataclasses.replace(flags, **missing)
    config = dataclasses.replace(config, **groups)
    check(flat(config))
    return config


def flat(config: object) -> dict[str, Any]:
    """Every flag by its name, without the groups of the help text."""
    groups = (getattr(config, group.name) for group in dataclasses.fields(config))
    return {f.name: getattr(g, f.name) for g in groups for f in dataclasses.fields(g)}


def network_options(config: Any) -> dict[str, Any]:
    """What MLP takes: the flags of the network, and the seed of its weights."""
    options = {name: value for name, value in vars(config.network).items() if name != "init_from"}
    return options | {"seed": config.run.seed}


def as_json(config: object) -> dict[str, Any]:
    """The run's flags as JSON values; those that are about this call alone are left out."""
    flags = {key: value for key, value in flat(config).items() if key not in ABOUT_THIS_CALL}
    return {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}


def print_config(method: str, config: object, device: torch.device) -> None:
    """What --print-config prints: enough to tell whether another run had the same settings."""
    record = {"method": method, "device": device.type, "flags": as_json(config)}
    print(json.dumps(record, indent=2))


def check(flags: Mapping[str, Any]) -> None:
    """Raises UserError for the first value that no run can have."""
    rules = (
        (AT_LEAST_ONE, lambda v: v >= 1, "below 1", "1 or more"),
        (ABOVE_ZERO, lambda v: v > 0, "not above 0", "a number above 0"),
        (NOT_NEGATIVE, lambda v: v >= 0, "negative", "0 or more"),
        (PART_OF_ONE, lambda v: 0 <= v < 1, "outside of 0 to 1", "0 or more, and less than 1"),
    )
    if flags.get("seed", 0) >= 2**32:
        raise UserError(f"--seed {flags['seed']} is too large (type a number below {2**32:,})")
    for names, holds, fault, remedy in rules:
        for name in names:
            if flags.get(name) is not None and not holds(flags[name]):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {flags[name]} is {fault} (type {remedy})")


def read_saved_config(out_dir: Path) -> dict[str, Any]:
    """config.json of a run. Raises UserError where there is none, or it cannot be read."""
    path = Path(out_dir) / "config.json"
    try:
        saved = json.loads(path.read_text())
        if not {"method", "command", "flags"} <= set(saved):
            raise ValueError("it is no run's")
        return saved
    except FileNotFoundError as error:
        raise UserError(f"{out_dir} holds no run to resume (start one without --resume)") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); start anew with --overwrite") from error


def resolve_run(config: Config, backend: str) -> Config:
    """The flags with the backend and the number of threads that the run has; sets the latter."""
    if config.run.threads or processes.count() > 1:  # torchrun's own choice is one thread
        torch.set_num_threads(config.run.threads or processes.own_threads())
    run = dataclasses.replace(config.run, backend=backend, threads=torch.get_num_threads())
    return dataclasses.replace(config, run=run)


def resolve_device(name: str) -> torch.device:
    """Raises UserError where the device that was asked for is not there."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name} is not available on this machine (try --device cpu)")
    if name == "cuda" and processes.count() > 1:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def quiet_libraries() -> None:
    """Keep "No CUDA runtime is found" and the like from the user's screen."""
    logging.getLogger("torch").setLevel(logging.ERROR)


def run_script(main: Callable[[], None], name: str, errors: tuple[type[Exception], ...]) -> None:
    """Run a script's main: one line and exit code 2 for what a user can mend, 128 + its number
    for a signal: 130 for Ctrl-C.

    `errors` are the library's own that a flag or a file can cause.
    """
    quiet_libraries()
    said = set()  # Python forgets what it has said whenever a library changes its filters

    def show(message: Warning | str, *_: Any) -> None:
        if str(message) not in said and processes.is_first():
            print(f"{name}: {message}", file=sys.stderr)
        said.add(str(message))

    warnings.showwarning = show
    warnings.filterwarnings("ignore", module=r"(?!eggroll|lab)")
    try:
        processes.recorded(main)()
        processes.leave()
    except (Interrupted, KeyboardInterrupt) as stop:
        if str(stop) and processes.is_first():
            print(stop, file=sys.stderr)
        raise SystemExit(128 + getattr(stop, "signal", signal.SIGINT)) from None
    except (UserError, *errors) as error:
        _fail(name, str(error))
    except OSError as error:
        full = error.errno == errno.ENOSPC
        advice = "free some space; --resume goes on with a training run" if full else ""
        where = f"{error.filename}: " if error.filename else ""
        _fail(name, f"{where}{error.strerror or error}" + (f" ({advice})" if advice else ""))
    except (MemoryError, RuntimeError) as error:
        if processes.lost_another(error):
            _fail(name, "another process has ended (go on from the last checkpoint with --resume)")
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        _fail(name, "out of memory: try a smaller --hidden-dim, --batch-size or --chunk-size")


def _fail(name: str, message: str) -> None:
    if processes.joined():
        message = processes.name() + message
    elif not processes.is_first():  # what is wrong with the flags, the first says for all
        raise SystemExit(2)
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2) from None
