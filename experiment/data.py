"""MNIST and its relatives: loaded once, kept on the device as uint8, scaled batch by batch."""

import argparse
import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiment.config import Config
from experiment.distributed import rank0_first
from experiment.errors import UserError

# torchvision's class of each dataset; its files are in DATA_DIR/CLASS/raw
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
FILES = [(f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
SAMPLE = "mnist-sample"
SAMPLE_FILE = Path(__file__).with_name("mnist_5k.npz")  # 400 and 100 images of every digit

SPLIT_SEED = 20_251_116  # of the fixed permutation that ends in the validation split
VALIDATION = 5_000  # images; an eighth of the sample's 4,000
DOWNLOAD_TIMEOUT = 30  # seconds after which a silent mirror is given up
CHUNK = 1_000  # images converted at once: float copies of all images would set the peak memory


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
    """One dataset on one device; `validation` is empty with --train-on-all."""

    name: str
    train: Split
    validation: Split
    test: Split
    mean: Tensor  # mean training image, (784,), in 0..255
    std: float  # of all training pixels minus the mean image
    checksum: str = ""  # SHA-256 of all images and labels, before they are split

    def scale(self, images: Tensor) -> Tensor:
        """Return float32 images, minus the mean training image, over one standard deviation."""
        return (images.float() - self.mean) / self.std

    def steps(self, batch_size: int) -> int:
        """Return the number of batches of an epoch. Raises UserError for too large a batch."""
        if batch_size > len(self.train):
            raise UserError(
                f"--batch-size must be <= {len(self.train)}, the number of training images, got "
                f"{batch_size}"
            )
        return -(-len(self.train) // batch_size)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return scaled training images (B, 784) and their labels (B,)."""
        part = self.train[rows]
        return self.scale(part.images), part.labels

    def batches(self, epoch: int, seed: int, batch_size: int, first: int = 0) -> Iterator[Tensor]:
        """Yield the rows (B,) of an epoch's batches, on the device, from batch `first` on.

        Their order depends on the seed and the epoch alone.
        """
        # the generator takes 32 bits: what the shift pushes out of them is folded back in
        key = ((seed << 20 | epoch) + 1) ^ ((seed >> 12) * 0x9E3779B1)
        generator = torch.Generator().manual_seed(key & 0xFFFFFFFF)
        order = torch.randperm(len(self.train), generator=generator).to(self.train.labels.device)
        yield from order.split(batch_size)[first:]


class Int8Dataset(Dataset):
    """A dataset whose images are scaled int8 already."""

    def scale(self, images: Tensor) -> Tensor:
        return images


def load(config: Config, device: torch.device) -> Dataset:
    """Load the dataset that the flags name.

    The last 5,000 of a fixed permutation of the training images are the validation split. Raises
    UserError where files are damaged, DataMissing where they are missing.
    """
    if config.dataset == SAMPLE:
        train, test = _read_sample()
    else:
        folder = default_data_dir(config.data_dir)
        train, test = rank0_first(lambda: _read_torchvision(config.dataset, folder))
    checksum = _checksum(train, test)
    permutation = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    kept = len(train) - min(VALIDATION, len(train) // 8)
    validation = train[permutation[kept:]]
    if config.train_on_all:
        validation = validation[:0]
    else:
        train = train[permutation[:kept]]
    mean, std = _pixel_statistics(train.images)
    train, validation, test = (part.to(device) for part in (train, validation, test))
    return Dataset(config.dataset, train, validation, test, mean.to(device), std, checksum)


def quantised(data: Dataset, one: int) -> Int8Dataset:
    """Return all images as int8: scaled, times `one`, rounded, -127 to 127.

    They take the place of the uint8 images in memory: `data` must not be used afterwards.
    """

    def convert(split: Split) -> Split:
        for images in split.images.split(CHUNK):
            scaled = (data.scale(images) * one).round().clamp(-127, 127)
            images.view(torch.int8).copy_(scaled)
        return Split(split.images.view(torch.int8), split.labels)

    train, validation, test = (convert(s) for s in (data.train, data.validation, data.test))
    parts = (train, validation, test)
    return Int8Dataset(data.name, *parts, data.mean, data.std, data.checksum)


def default_data_dir(data_dir: Path | None) -> Path:
    """Return --data-dir, else $MNIST_DIR, else data."""
    return Path(data_dir or os.environ.get("MNIST_DIR") or "data").expanduser()


def _checksum(*splits: Split) -> str:
    """Return the SHA-256 of the images (uint8) and labels (int64) of each split, as hex."""
    total = hashlib.sha256()
    for split in splits:
        total.update(split.images.contiguous().numpy().data)
        total.update(split.labels.contiguous().numpy().data)
    return total.hexdigest()


def _pixel_statistics(images: Tensor) -> tuple[Tensor, float]:
    """Return the mean image, (784,), and the standard deviation of all pixels minus it."""
    total = squares = torch.zeros(images.shape[1], dtype=torch.int64)
    for chunk in images.split(CHUNK):
        chunk = chunk.int()
        total, squares = total + chunk.sum(0), squares + (chunk * chunk).sum(0)
    mean = total.double() / len(images)
    variance = (squares.double() / len(images) - mean**2).mean()
    return mean.float(), max(variance.sqrt().item(), 1e-6)  # blank images would divide by zero


def _read_sample() -> tuple[Split, Split]:
    with np.load(SAMPLE_FILE, allow_pickle=False) as file:
        images, labels = (torch.from_numpy(file[name]) for name in ("images", "labels"))
    both = Split(images, labels.long())
    return both[:4_000], both[4_000:]


def _read_torchvision(name: str, data_dir: Path) -> tuple[Split, Split]:
    raw = _ensure_files(name, data_dir)
    train, test = (_read_split(raw / images, raw / labels) for images, labels in FILES)
    return train, test


def _ensure_files(name: str, data_dir: Path) -> Path:
    """Return the folder with the files, downloaded if need be. Raises DataMissing."""
    from torchvision import datasets

    kind = getattr(datasets, TORCHVISION[name])
    raw = data_dir / kind.__name__ / "raw"
    if all((raw / file).exists() for pair in FILES for file in pair):
        return raw
    print(f"{name} is not in {data_dir}: downloading it", file=sys.stderr)
    timeout, reason = socket.getdefaulttimeout(), ""
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        # one mirror at a time: torchvision stops its search at one that falls silent
        for mirror in kind.mirrors:
            only = type(kind.__name__, (kind,), {"mirrors": [mirror]})
            try:
                only(str(data_dir), download=True)
                return raw
            except Exception as error:  # network, disk, or an HTML page in place of a file
                reason = " ".join(str(error).split()) or type(error).__name__
    finally:
        socket.setdefaulttimeout(timeout)
    raise DataMissing(
        f"no {name} in {raw}, and the download failed ({reason[:120]}): put the four files "
        f"there, or name the folder that holds {kind.__name__}/raw with --data-dir or MNIST_DIR, "
        f"or train with --dataset {SAMPLE}, 5,000 digits that need no network"
    )


def _read_split(images_path: Path, labels_path: Path) -> Split:
    """Read a pair of files. Raises UserError that names the damaged one."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    found = []
    for path, read in ((images_path, read_image_file), (labels_path, read_label_file)):
        try:
            found.append(read(str(path)))
        except Exception as error:  # torchvision's reader asserts, and raises NumPy's errors
            raise _damaged(path, str(error) or "not an MNIST file") from error
    images, labels = found
    if images.shape[1:] != (28, 28):
        raise _damaged(images_path, f"its images are {tuple(images.shape[1:])}")
    if len(labels) != len(images) or not len(labels):
        raise _damaged(labels_path, f"it has {len(labels):,} labels for {len(images):,} images")
    if labels.max() > 9:
        raise _damaged(labels_path, "it has labels above 9")
    return Split(images.flatten(1), labels.long())


def _damaged(path: Path, reason: str) -> UserError:
    reason = " ".join(reason.split()).rstrip(".")
    return UserError(
        f"{path} is damaged ({reason}): delete it to download it again, or copy it anew"
    )


def print_fallback_flags() -> None:
    """Print flags for the sample where MNIST cannot be had and no --dataset is given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset")
    parser.add_argument("--data-dir", "--data_dir", type=Path)
    flags, _ = parser.parse_known_args()
    try:
        if not flags.dataset:
            _ensure_files("mnist", default_data_dir(flags.data_dir))
    except DataMissing as missing:
        rule = "!" * 78
        print(
            f"{rule}\n{missing}\n\nGOING ON WITH {SAMPLE}: 4,000 training and 1,000 test digits, "
            f"NOT the full MNIST.\nAll accuracies are lower.\n{rule}",
            file=sys.stderr,
        )
        print(f"--dataset {SAMPLE} --epochs 30")  # an epoch of the sample is 32 steps


if __name__ == "__main__":
    print_fallback_flags()
