"""Ten digits that are drawn by strokes, as by hand, for the tests of pictures."""

import math
import random

import numpy as np
from PIL import Image, ImageDraw


def arc(x, y, rx, ry, start, end):
    """Return points of an arc, clockwise on the page; 0 degrees is at the right."""
    angles = [math.radians(start + (end - start) * i / 30) for i in range(31)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


# strokes in a box of width 1 and height 1
STROKES = {
    0: [arc(0.5, 0.5, 0.33, 0.47, -80, 285)],
    1: [[(0.58, 0.03), (0.52, 0.5), (0.45, 0.97)]],
    2: [[*arc(0.48, 0.3, 0.3, 0.27, -170, 30), (0.45, 0.72), (0.15, 0.95), (0.85, 0.93)]],
    3: [[*arc(0.45, 0.27, 0.28, 0.24, -150, 90), *arc(0.45, 0.73, 0.32, 0.24, -90, 150)]],
    4: [[(0.3, 0.05), (0.18, 0.55), (0.85, 0.52)], [(0.7, 0.08), (0.66, 0.5), (0.6, 0.97)]],
    5: [
        [(0.32, 0.08), (0.27, 0.42), *arc(0.45, 0.68, 0.31, 0.27, -120, 140)],
        [(0.32, 0.08), (0.8, 0.05)],
    ],
    6: [[(0.66, 0.03), (0.38, 0.3), (0.23, 0.62), *arc(0.48, 0.72, 0.25, 0.24, 180, -180)]],
    7: [[(0.15, 0.1), (0.8, 0.07), (0.6, 0.45), (0.42, 0.97)]],
    8: [[*arc(0.5, 0.27, 0.24, 0.23, 90, 450), *arc(0.5, 0.74, 0.29, 0.24, -90, 270)]],
    9: [[*arc(0.48, 0.28, 0.25, 0.24, -10, -370), (0.72, 0.5), (0.66, 0.97)]],
}


def mask(digit, size, pen=0.09, shape=None, corner=None, seed=0):
    """Return the ink of a digit, float, 0 to 1.

    size    height in pixels
    pen     width of the pen, as a fraction of the height
    shape   (height, width) of the picture: by default there is a margin of 30 %
    corner  (y, x) of the digit's box: by default in the middle
    """
    height, width = shape or (round(1.6 * size), round(1.6 * size))
    top, left = corner or ((height - size) // 2, (width - size) // 2)
    hand = random.Random(seed + digit)
    times = 4 if size < 500 else 1  # drawn larger, then reduced: ImageDraw has no anti-aliasing
    image = Image.new("L", (times * width, times * height))
    draw = ImageDraw.Draw(image)
    for stroke in STROKES[digit]:
        points = [
            (times * (left + size * x * 0.8 + tremble), times * (top + size * y + tremble))
            for x, y in stroke
            for tremble in [hand.gauss(0, 0.006 * size)]
        ]
        thick = max(1, round(times * pen * size))
        draw.line(points, fill=255, width=thick, joint="curve")
        for x, y in (points[0], points[-1]):
            draw.circle((x, y), thick / 2, fill=255)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX)) / 255


def picture(ink, colour=(20, 20, 20), paper=(255, 255, 255), light=None):
    """Return ink on paper as an RGB picture; `light`, (H, W), multiplies both."""
    ink = ink[..., None]
    levels = np.asarray(paper) * (1 - ink) + np.asarray(colour) * ink
    if light is not None:
        levels = levels * light[..., None]
    return Image.fromarray(np.rint(levels).clip(0, 255).astype(np.uint8))


def uneven_light(height, width):
    """Return light that falls off to the right, with the soft shadow of a hand below."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return (0.95 - 0.35 * x) * (1 - 0.35 / (1 + np.exp(-12 * (y - 0.3 * x - 0.55))))


def ten_pictures():
    """Return a picture of every digit, each of its own size, pen, place, colour or light."""
    dark, light = {"colour": (15, 15, 15)}, {"colour": (240, 240, 240), "paper": (25, 25, 25)}
    lit = mask(7, 500, pen=0.06)
    return {
        0: picture(mask(0, 15), **dark),  # 24 pixels
        1: picture(mask(1, 60), **light),
        2: picture(mask(2, 200, shape=(700, 500), corner=(40, 270)), **dark),
        3: picture(mask(3, 300), colour=(200, 30, 40), paper=(250, 240, 190)),
        4: picture(mask(4, 1250), **light),  # 2000 pixels
        5: picture(mask(5, 400, pen=0.22), **dark),
        6: picture(mask(6, 600, pen=0.012), **dark),
        7: picture(lit, (40, 40, 60), (235, 230, 220), uneven_light(*lit.shape)),
        8: picture(mask(8, 150, shape=(300, 900), corner=(120, 30)), **light),
        9: picture(mask(9, 30), colour=(30, 60, 200)),
    }
