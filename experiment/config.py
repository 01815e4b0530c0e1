"""Command-line flags: a frozen dataclass holds the flags, and a preset is an object of it."""

import argparse
import dataclasses
import json
import operator
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from experiment import device
from experiment.errors import Finished, UserError

PathFlag = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of every training script."""

    preset: tyro.conf.Suppress[str] = ""  # its name, for config.json
    dataset: Literal["mnist", "fashion-mnist", "kmnist", "mnist-sample"] = "mnist"
    """Images to train on; mnist-sample is 5,000 digits of MNIST that need no network."""
    data_dir: PathFlag = None
    """Folder in torchvision's layout (None: $MNIST_DIR, else data)."""
    train_on_all: bool = False
    """Train on all 60,000 images (no validation split)."""
    hidden_dim: int | tuple[int, ...] = 256
    """Units in each of the two hidden layers, or a count for each hidden layer."""
    init_scale: float = 0.5
    """Factor on He's initial weights."""
    init_from: PathFlag = None
    """Start from the weights in this model.safetensors (None: from --seed)."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 128
    """Examples per step."""
    lr: float = 0.1
    """Learning rate at the peak of the schedule."""
    schedule: Literal["linear", "cosine", "onecycle", "constant"] = "onecycle"
    """linear, cosine: down to 0; onecycle: up for a fifth of the run, then down."""
    momentum: float = 0.9
    """SGD momentum."""
    label_smoothing: float = 0.0
    """Share of the cross-entropy's target that is spread over all classes."""
    seed: int = 0
    """Random seed (weights, data order and noise)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA, else the CPU; Apple's MPS by name alone, since nothing was measured on it."""
    no_graph: bool = False
    """On CUDA, launch a step's kernels one by one, not as one graph."""
    threads: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """CPU threads (None: one per core, shared among the processes of torchrun)."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    out_dir: PathFlag = None
    """Folder for the run's files (None: a new one under results/runs)."""
    resume: bool = False
    """Continue the run in --out-dir with its flags; without one there, start it."""
    overwrite: bool = False
    """Replace the run in --out-dir."""
    quiet: bool = False
    """Print errors only; train.log is still written."""


@dataclass(frozen=True, kw_only=True)
class FloatConfig(Config):
    """Flags of the scripts that train a network of floating-point numbers."""

    activation: Literal["gelu", "relu", "sign", "step", "argmax-k", "int8-round"] = "gelu"
    """The last four have a gradient of zero; argmax-k: 1 for the largest quarter of the units."""
    bias: bool = False
    """Add a bias to every layer."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimizer from torch.optim."""
    weight_decay: float = 0.0
    """Weight decay, passed to the torch optimizer."""


AnyConfig = TypeVar("AnyConfig", bound=Config)

MARKERS = (tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes)
THIS_CALL_ONLY = ("out_dir", "resume", "overwrite", "quiet")  # not saved in config.json
FREE_ON_RESUME = ("data_dir", "device", "init_from", "no_graph")  # may differ when a run is resumed

LIMITS = (  # relation, how a message writes it, limit of each flag
    (operator.gt, ">", {"lr": 0, "init_scale": 0}),
    (operator.ge, ">=", dict.fromkeys(("epochs", "batch_size", "hidden_dim", "eval_every"), 1)),
    (operator.ge, ">=", {"threads": 1, "seed": 0, "momentum": 0, "weight_decay": 0}),
    (operator.ge, ">=", {"label_smoothing": 0}),
    (operator.lt, "<", {"seed": 2**32, "momentum": 1, "label_smoothing": 1}),
)


def parse(presets: Mapping[str, AnyConfig], description: str | None) -> tuple[str, AnyConfig]:
    """Return the preset's name and its Config with the flags of the command line.

    The first preset is the default. With --resume the saved preset and flags are the defaults.
    Exits with code 2 on an unknown flag. Raises UserError for an invalid value, and for flags that
    differ from the saved ones; raises Finished where the run in --out-dir is finished.
    """
    words = sys.argv[1:]
    name = words.pop(0) if words and not words[0].startswith("-") else next(iter(presets))
    typed = len(words) < len(sys.argv) - 1
    saved = _read_saved(words)
    if saved and not typed and saved["flags"]["preset"] in presets:
        name = saved["flags"]["preset"]
    if name not in presets:
        raise UserError(f"unknown preset {name!r}; choose from {', '.join(presets)}")
    markers = (*MARKERS, tyro.conf.FlagCreatePairsOff)
    if saved:
        if name != saved["flags"]["preset"]:
            raise UserError(
                f"{saved['folder']} holds a run of {saved['flags']['preset']}, not of {name} "
                "(give another --out-dir)"
            )
        # saved flags come first, so that typed ones win; both --flag and --no-flag are needed
        words, markers = [*_as_words(saved["flags"]), *words], MARKERS
    config = tyro.cli(
        type(presets[name]),
        default=presets[name],
        args=words,
        prog=" ".join([Path(sys.argv[0]).name, name][: len(presets)]),
        description=_help_text(description or "", list(presets)),
        config=markers,
    )
    check(config)
    threads = device.set_threads(config.threads)
    config = dataclasses.replace(config, preset=name, threads=threads)
    if saved:
        _check_same_flags(config, saved["flags"])
        if saved["status"] == "finished":
            raise Finished("" if config.quiet else f"{config.out_dir}: finished already")
    return name, config


def check(config: Config) -> None:
    """Raise UserError for the first invalid value."""
    flags = as_flags(config)
    for holds, sign, limits in LIMITS:
        for name, limit in limits.items():
            value = flags.get(name)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(holds(each, limit) for each in values):
                option = name.replace("_", "-")
                raise UserError(f"--{option} must be {sign} {limit}, got {value}")
    if config.resume and config.overwrite:
        raise UserError("--resume continues a run and --overwrite replaces it: give one of them")
    if config.resume and config.out_dir is None:
        raise UserError("--resume needs --out-dir, the folder of the run to continue")


def as_flags(config: Any) -> dict[str, Any]:
    """Return the flags for config.json as JSON values, those of nested dataclasses included."""
    flags = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flags |= as_flags(value)
        elif field.name not in THIS_CALL_ONLY and not callable(value):  # a function is no flag
            value = list(value) if isinstance(value, tuple) else value
            flags[field.name] = str(value) if isinstance(value, Path) else value
    return flags


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a run's config.json. Raises UserError where it cannot be read."""
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_text())
        return saved | {"method": saved["method"], "flags": {"preset": "", **saved["flags"]}}
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no run: {path} does not exist") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): start again with --overwrite") from error


def _read_saved(words: list[str]) -> dict[str, Any] | None:
    """Return config.json of the run that these words resume, with its folder and status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out-dir", "--out_dir", type=Path, nargs="?")
    call, _ = parser.parse_known_args(words)
    if not (call.resume and call.out_dir and (call.out_dir / "config.json").exists()):
        return None
    summary = call.out_dir / "summary.json"
    status = json.loads(summary.read_text())["status"] if summary.exists() else "running"
    return read_config(call.out_dir) | {"folder": call.out_dir, "status": status}


def _as_words(flags: Mapping[str, Any]) -> Iterator[str]:
    """Yield flags as they are typed."""
    for name, value in flags.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        elif isinstance(value, list):
            yield from (f"--{option}", *map(str, value))
        elif value is not None and name != "preset":
            yield f"--{option}={value}"


def _check_same_flags(config: Config, saved: Mapping[str, Any]) -> None:
    """Raise UserError that lists every flag that would change the saved run's result."""
    differences = [
        f"--{name.replace('_', '-')} was {saved[name]} and is {value} now"
        for name, value in as_flags(config).items()
        if name not in FREE_ON_RESUME and saved.get(name, value) != value
    ]
    if differences:
        raise UserError(
            f"{config.out_dir} was started with other flags: {', '.join(differences)} (leave them "
            "out, or give another --out-dir; for ./run_experiments.sh RESULTS_DIR=other)"
        )


def _help_text(description: str, presets: list[str]) -> str:
    """Return the head of --help: the script's purpose and its presets."""
    purpose = " ".join(description.strip().split("\n\n")[0].split())
    if len(presets) == 1:
        return purpose
    script, default, other = Path(sys.argv[0]).name, *presets[:2]
    return (
        f"{purpose}\n\npresets: {default} (the default), {', '.join(presets[1:])}. The defaults "
        f"below are the chosen preset's: try python {script} {other} --help."
    )
