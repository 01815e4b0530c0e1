"""Files of pictures: read as a split, written enlarged, and judged in a chart of characters."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from experiment.data import Split
from experiment.errors import UserError
from experiment.files import write_atomically
from experiment.pictures import SIDE, as_mnist

ENLARGED = 10  # times, in the files that are written
BAR = 50  # characters of a probability of 1
NAME = 55  # characters of a path; of a longer one its end is shown
EXPECTED = "expected one digit, dark on light or light on dark, with some paper around it"


def read(paths: Sequence[Path]) -> Split:
    """Return the digits of pictures, scaled as MNIST's, without labels (0 in their place).

    Raises UserError where a file is missing or no picture, and where it shows no single digit.
    """
    images = np.stack([_read_digit(path) for path in paths])
    return Split(torch.from_numpy(images).flatten(1), torch.zeros(len(paths), dtype=torch.int64))


def save(images: Tensor, paths: Sequence[Path], folder: Path) -> None:
    """Write images, (n, 784), enlarged, as FOLDER/1-NAME-seen.png for the first of `paths`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, path) in enumerate(zip(images, paths, strict=True), 1):
        large = ImageOps.scale(
            Image.fromarray(image.view(SIDE, SIDE).numpy()), ENLARGED, Image.Resampling.NEAREST
        )
        content = io.BytesIO()
        large.save(content, "PNG")
        write_atomically(folder / f"{number}-{path.stem}-seen.png", content.getvalue())


def chart(path: Path, probabilities: Sequence[float]) -> str:
    """Return a title that names the answer, and a bar for each of the ten probabilities."""
    name = str(path) if len(str(path)) <= NAME else f"...{str(path)[3 - NAME :]}"
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    lines = [f"{name}: {best} ({probabilities[best]:.1%})"]
    for label, probability in enumerate(probabilities):
        lines.append(f"  {label}: {probability:6.1%} {'#' * round(BAR * probability)}".rstrip())
    return "\n".join(lines)


def _read_digit(path: Path) -> np.ndarray:
    """Return a picture's digit, light on dark, (28, 28), uint8. Raises UserError."""
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {reason}: --image expects files, such as photo.png")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise UserError(f"{path} is too large: expected at most {limit} megapixels") from error
    except PermissionError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three
        raise UserError(
            f"{path} cannot be read as a picture: expected a PNG or JPEG file, say"
        ) from error
    try:
        return as_mnist(picture)
    except UserError as error:
        raise UserError(f"{path} {error}: {EXPECTED}") from error
