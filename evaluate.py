"""Evaluate the weights of a run, float or int8, on the test set of its dataset or on pictures.

python evaluate.py results/latest/eggroll/seed0
python evaluate.py results/latest/eggroll/seed0 --image photo.png scan.jpg
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from eggroll.int8 import INT8_SCALE, Int8MLP
from experiment import config, picture_files
from experiment.config import PathFlag, read_config
from experiment.data import load, quantised
from experiment.errors import UserError
from experiment.evaluation import evaluate, logits_of
from experiment.files import load_weights
from experiment.fitness_file import load_fitness
from experiment.script import run_script
from model import MLP

DIGITS = ("mnist", "mnist-sample")


@dataclass(frozen=True)
class Config:
    """Flags of evaluation."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, with config.json and model.safetensors."""
    data_dir: PathFlag = None
    """Folder in torchvision's layout (None: $MNIST_DIR, else data)."""
    fitness: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:FUNCTION")] = None
    """Print the mean of this fitness function as well."""
    image: tuple[Path, ...] = ()
    """Pictures of one digit each. With --image, only these are judged."""
    save: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """With --image: write what the network sees of the pictures, enlarged, into this folder."""

    def __post_init__(self):
        if self.image and self.fitness:
            raise UserError("--fitness needs labels, and pictures have none: leave out one flag")
        if self.save and not self.image:
            raise UserError("--save expects pictures: add --image photo.png")


def load_network(folder: Path, saved: dict[str, Any]) -> nn.Module:
    """Return a run's network with its weights. Raises UserError where they cannot be read."""
    options = {"activation": "gelu", "bias": False} | saved["flags"]  # int8 has neither flag
    names = ("hidden_dim", "activation", "bias")
    network: nn.Module = MLP(**{name: options[name] for name in names})
    if saved["method"].endswith("-int8"):
        network = Int8MLP(network)
    load_weights(folder / "model.safetensors", network)
    return network


def main() -> None:
    flags = tyro.cli(Config, description=(__doc__ or "").splitlines()[0])
    saved = read_config(flags.folder)
    network = load_network(flags.folder, saved)
    trained_on = {name: saved["flags"][name] for name in ("dataset", "train_on_all")}
    data = load(config.Config(data_dir=flags.data_dir, **trained_on), torch.device("cpu"))
    if flags.image:
        if data.name not in DIGITS:
            raise UserError(f"--image expects a run on {' or '.join(DIGITS)}, got {data.name}")
        data = replace(data, test=picture_files.read(flags.image))
        if flags.save:
            picture_files.save(data.test.images, flags.image, flags.save)
    if isinstance(network, Int8MLP):
        data = quantised(data, INT8_SCALE)
    if flags.image:
        probabilities = logits_of(network, data, data.test).softmax(-1)
        print("\n\n".join(map(picture_files.chart, flags.image, probabilities.tolist())))
        return
    result = evaluate(network, data, data.test)
    accuracy, nats = f"{result.accuracy:.2%}", f"{result.cross_entropy:.4f}"
    print(f"test accuracy {accuracy}, cross-entropy {nats} nats, on {data.name}")
    for label, right in enumerate(result.by_class):
        print(f"  {label}: {right:7.2%}")
    if flags.fitness:
        outputs = logits_of(network, data, data.test).unsqueeze(0)  # one member
        scores = load_fitness(flags.fitness)(outputs, data.test.labels)
        print(f"fitness {scores.float().mean():.6g}: {flags.fitness}")


if __name__ == "__main__":
    run_script(main, "evaluate.py")
