"""Pictures of a digit, of any size, colour and polarity, in the form of MNIST's images."""

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from experiment.errors import UserError

SIDE, BOX = 28, 20  # pixels of MNIST's images, and of the longer side of their digits
CENTRE = 14  # pixel of the centre of mass of MNIST's digits, on both axes
PEN = 2.0  # pixels that MNIST's pens are wide at least, apart from 5 % of the digits
WORK, COARSE, PAPER = 300, 100, 50  # pixels of a picture's longer side, for its parts and paper
FAINT = 0.06  # contrast between ink and paper below which a picture counts as blank


def as_mnist(picture: Image.Image) -> np.ndarray:
    """Return the digit, light on dark, (28, 28), uint8, in the size and the place of MNIST's.

    Raises UserError where the picture shows nothing, or no single digit.
    """
    return _centred(_fitted(_without_specks(_ink(_levels(picture)))))


def _levels(picture: Image.Image) -> np.ndarray:
    """Return the three channels, (3, H, W), float, 0 to 255, in front of a plain background."""
    if picture.mode[0] in "IF":  # 16 or 32 bits
        deep = np.nan_to_num(np.asarray(picture, np.float64))
        deep = (deep - deep.min()) / max(np.ptp(deep), 1e-9)
        picture = Image.fromarray(np.rint(255 * deep).astype(np.uint8))
    picture = picture.convert("RGBA")
    picture.thumbnail((WORK, WORK))
    *colour, opaque = np.asarray(picture, np.float32).transpose(2, 0, 1)
    colour, opaque = np.stack(colour), opaque / 255
    seen = colour[:, opaque > 0.5]
    if opaque.mean() > 0.5:
        paper = np.median(seen, -1)[:, None, None]
    else:  # what is opaque is the ink
        paper = 255.0 if seen.size and seen.mean() < 128 else 0.0
    return paper + (colour - paper) * opaque


def _ink(levels: np.ndarray) -> np.ndarray:
    """Return the ink of each pixel, 0 to 1, (H, W), from the channel that shows it best."""
    contrast = max((_contrast(channel) for channel in levels), key=lambda c: (c**3).sum())
    noise = 1.5 * np.median(contrast)
    ink = (contrast**3).sum() / max((contrast**2).sum(), 1e-9)  # a mean in which paper has no part
    if ink < max(FAINT, 4 * noise):
        raise UserError("shows nothing, or too faintly")
    return (2 * contrast / ink - 0.5).clip(0, 1)  # none up to a quarter, full from three quarters


def _contrast(levels: np.ndarray) -> np.ndarray:
    """Return how much darker than the paper around it each pixel is, 0 to 1, (H, W).

    Light ink is inverted first. The paper is a morphological closing: the brightest within reach,
    then the darkest of that, which removes what is thinner than a pen and keeps edges of shadows.
    """
    coarse = Image.fromarray(np.rint(levels).astype(np.uint8))
    coarse.thumbnail((PAPER, PAPER), Image.Resampling.BOX)
    # more than half the width of a pen; a reflection takes less than the shorter side
    reach = max(1, min(max(coarse.size) // 6, min(coarse.size) - 1))
    deviation = np.asarray(coarse, float) - coarse.filter(ImageFilter.GaussianBlur(1.5 * reach))
    if (deviation**3).sum() > 0:  # the ink is what deviates most
        levels, coarse = 255 - levels, ImageOps.invert(coarse)
    # odd reflection continues a gradient of the light beyond the border, and brightens ink there
    padded = np.pad(np.asarray(coarse, np.float32), reach, "reflect", reflect_type="odd")
    padded = padded.clip(max=np.asarray(coarse).max())
    paper = Image.fromarray(padded).filter(ImageFilter.MaxFilter(2 * reach + 1))
    paper = ImageOps.crop(paper.filter(ImageFilter.MinFilter(2 * reach + 1)), reach)
    paper = np.asarray(paper.resize(levels.shape[::-1], Image.Resampling.BILINEAR))
    return (1 - levels / paper.clip(32)).clip(0)


def _without_specks(ink: np.ndarray) -> np.ndarray:
    """Return the ink of the largest connected part and of parts from a quarter of its size on."""
    coarse = Image.fromarray(ink)
    coarse.thumbnail((COARSE, COARSE), Image.Resampling.BOX)
    mask = np.asarray(coarse.filter(ImageFilter.MaxFilter(3))) > 0.15
    labels, grown = 0 * mask, np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    while (labels != grown).any():  # the largest number of a part spreads over it
        labels = grown
        spread = Image.fromarray(labels.astype(np.int32)).filter(ImageFilter.MaxFilter(3))
        grown = np.asarray(spread) * mask
    parts = [labels == label for label in np.unique(labels[mask])]
    sizes = [max(_box(part)[2:]) for part in parts]
    kept = [part for part, size in zip(parts, sizes, strict=True) if 4 * size >= max(sizes)]
    if not 1 <= len(kept) <= 4:
        raise UserError("shows no single digit")
    kept = Image.fromarray(np.any(kept, 0)).resize(ink.shape[::-1])
    return ink * np.asarray(kept)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return top, left, height and width of what is set."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def _fitted(ink: np.ndarray) -> np.ndarray:
    """Return the digit cropped, its longer side 20 pixels, its brightest pixel 1."""
    mask = ink > 0.5
    if not mask.any():
        raise UserError("shows nothing, or too faintly")
    top, left, height, width = _box(mask)
    mask = mask[top : top + height, left : left + width]
    if max(height, width) < 8:
        raise UserError(f"shows a digit of {max(height, width)} pixels, too small to read")
    if width > 2 * height or any(_side_by_side(part) for part in (mask, mask.T)):
        raise UserError("shows no single digit")
    shape = [max(1, round(side * BOX / max(height, width))) for side in (width, height)]
    box = (left, top, left + width, top + height)
    fine = Image.fromarray(ink).resize([4 * side for side in shape], Image.Resampling.BOX, box)
    missing = PEN - _pen_width(np.asarray(fine)) / 4
    if missing > 0:
        fine = fine.filter(ImageFilter.MaxFilter(2 * round(2 * missing) + 1))
    digit = np.asarray(fine.resize(shape, Image.Resampling.BOX))
    return digit / digit.max()


def _side_by_side(mask: np.ndarray) -> bool:
    """Tell whether a wide gap separates two parts that are each half as tall as both together."""
    filled = np.flatnonzero(mask.any(0))
    at = np.diff(filled).argmax() if len(filled) > 1 else 0
    if len(filled) < 2 or filled[at + 1] - filled[at] - 1 < 0.12 * len(mask):
        return False
    parts = mask[:, : filled[at] + 1], mask[:, filled[at + 1] :]
    return all(2 * _box(part)[2] >= len(mask) for part in parts)


def _pen_width(ink: np.ndarray) -> float:
    """Return twice the area over the length of the outline, in pixels."""
    slopes = np.gradient(np.pad(ink, 2))
    return 2 * ink.sum() / np.hypot(*slopes).sum()


def _centred(digit: np.ndarray) -> np.ndarray:
    """Return the digit, (h, w), with its centre of mass at pixel (14, 14) of (28, 28), uint8."""
    corner = []
    for axis, length in enumerate(digit.shape):
        mean = np.average(np.arange(length), weights=digit.sum(1 - axis))
        corner.append(min(max(0, round(CENTRE - mean)), SIDE - length))
    (y, x), (height, width) = corner, digit.shape
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[y : y + height, x : x + width] = np.rint(255 * digit)
    return image
