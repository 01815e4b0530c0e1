"""evaluate.py --image: pictures of a digit as MNIST's own images, and the network's answers."""

import re
from pathlib import Path

import numpy as np
import pictures
import pytest
from conftest import call
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import assert_one_line, train

from experiment.picture_files import chart
from experiment.pictures import as_mnist

TEN = pictures.ten_pictures()
EXPECTED = "expected one digit, dark on light or light on dark"


def difference(found, expected):
    return np.abs(found.astype(int) - expected).mean()


def assert_as_mnist(image):
    """Assert a longer side of 20 pixels and a centre of mass within half a pixel of (14, 14)."""
    assert image.shape == (28, 28) and image.dtype == np.uint8 and image.max() == 255
    sides = [np.ptp(np.flatnonzero(image.any(axis))) + 1 for axis in (0, 1)]
    assert max(sides) == 20
    for axis in (0, 1):
        centre = np.average(np.arange(28), weights=image.sum(axis, dtype=float))
        assert centre == pytest.approx(14, abs=0.51)


@pytest.mark.parametrize("digit", range(10))
def test_a_picture_gets_the_size_the_place_and_the_polarity_of_mnist(digit):
    image = as_mnist(TEN[digit])
    assert_as_mnist(image)
    assert 0.05 < (image > 127).mean() < 0.3  # light ink on a dark page


@settings(max_examples=25, deadline=None)
@given(
    digit=st.integers(0, 9),
    size=st.integers(60, 150),
    pen=st.floats(0.04, 0.2),
    place=st.tuples(st.integers(5, 45), st.integers(5, 45)),
)
def test_size_place_and_polarity_of_the_picture_do_not_matter(digit, size, pen, place):
    expected = as_mnist(pictures.picture(pictures.mask(digit, 100, pen)))
    moved = pictures.mask(digit, size, pen, (size + 50, size + 50), place)
    dark = pictures.picture(moved, colour=(0, 0, 0))
    found = as_mnist(dark)
    assert_as_mnist(found)
    # a pixel of difference in the crop, or in rounding the centre, moves the digit by one pixel
    shifts = [np.roll(found, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    assert min(difference(shift, expected) for shift in shifts) < 12
    inverted = Image.fromarray(255 - np.asarray(dark))
    assert difference(as_mnist(inverted), found) == 0


def test_light_colour_and_specks_do_not_matter():
    ink = pictures.mask(5, 200)
    expected = as_mnist(pictures.picture(ink))
    light = pictures.uneven_light(*ink.shape)
    assert difference(as_mnist(pictures.picture(ink, light=light)), expected) < 6
    yellow = pictures.picture(ink, colour=(250, 250, 0))
    assert difference(as_mnist(yellow), expected) < 6
    speckled = ink.copy()
    speckled[10:14, 10:14] = speckled[-20:-15, 40:44] = 1
    assert difference(as_mnist(pictures.picture(speckled)), expected) < 1


def test_a_thin_pen_becomes_as_wide_as_mnists():
    thin, usual = (as_mnist(pictures.picture(pictures.mask(3, 500, pen))) for pen in (0.005, 0.1))
    assert 0.6 < thin.sum(dtype=float) / usual.sum(dtype=float) < 1.2


def in_mode(mode, ink):
    """Return dark ink in a mode of Pillow."""
    levels = np.rint(255 * (1 - ink)).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(levels.astype(np.uint16) * 16)  # 12 bits of 16
    if mode.startswith("transparent"):
        colour = 255 if mode.endswith("white") else 0
        alpha = 255 - levels
        return Image.fromarray(np.stack([np.full_like(levels, colour), alpha], -1), "LA")
    return Image.fromarray(levels).convert(mode)


MODES = ["1", "P", "RGBA", "LA", "CMYK", "F", "I", "I;16", "transparent black", "transparent white"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_a_picture_is_read(mode):
    ink = pictures.mask(2, 120)
    expected = as_mnist(Image.fromarray(np.rint(255 * (1 - ink)).astype(np.uint8)))
    assert difference(as_mnist(in_mode(mode, ink)), expected) < 6


# ---- the command ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train("backprop", folder, "--hidden-dim", "256", "--epochs", "8")
    return folder


def answers(text):
    return [int(answer) for answer in re.findall(r"^\S+: (\d) \(", text, re.MULTILINE)]


def test_a_trained_network_reads_the_ten_pictures(run, tmp_path):
    for digit, picture in TEN.items():
        picture.save(tmp_path / f"{digit}.png")
    paths = [tmp_path / f"{digit}.png" for digit in TEN]
    done = call("evaluate.py", run, "--image", *paths, "--save", tmp_path / "seen")
    assert done.returncode == 0, done.stderr
    right = [answer == digit for digit, answer in enumerate(answers(done.stdout))]
    assert len(right) == 10 and sum(right) >= 8
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "test accuracy" not in done.stdout
    with Image.open(tmp_path / "seen" / "4-3-seen.png") as seen:
        assert np.array_equal(np.asarray(seen)[5::10, 5::10], as_mnist(TEN[3]))


def test_the_orientation_of_a_photo_is_obeyed(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to show
    TEN[7].rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif)
    TEN[7].save(tmp_path / "upright.jpg")
    both = [tmp_path / "turned.jpg", tmp_path / "upright.jpg"]
    turned, upright = answers(call("evaluate.py", run, "--image", *both).stdout)
    assert turned == upright


def test_integers_read_pictures_as_their_training_images(tmp_path):
    train("node-perturbation-int8", tmp_path / "run", "--epochs", "1")
    TEN[1].save(tmp_path / "1.png")
    done = call("evaluate.py", tmp_path / "run", "--image", tmp_path / "1.png")
    assert done.returncode == 0 and len(answers(done.stdout)) == 1, done.stderr


def test_a_chart_has_80_columns_and_names_the_answer():
    lines = chart(tmp := Path("x" * 200 + ".png"), [0.0] * 9 + [1.0]).splitlines()
    assert lines[0].endswith(".png: 9 (100.0%)") and len(str(tmp)) > 80
    assert len(lines) == 11 and max(map(len, lines)) <= 80
    assert lines[1] == "  0:   0.0%" and lines[10].count("#") == 50


def save(picture):
    return lambda path: picture.save(path, "PNG")


def page(*inks, axis=1):
    return save(pictures.picture(np.concatenate(inks, axis)))


INVALID = {
    "does not exist": lambda path: None,
    "is a folder": lambda path: path.mkdir(),
    "cannot be read as a picture": lambda path: path.write_text("3"),
    "is too large": save(Image.new("1", (20_000, 10_000))),
    f"shows nothing, or too faintly: {EXPECTED}": save(Image.new("RGB", (90, 60), "white")),
    "of 5 pixels, too small": page(pictures.mask(3, 5, shape=(200, 200))),
    f"shows no single digit: {EXPECTED}": page(pictures.mask(3, 90), pictures.mask(7, 90)),
    "shows no single": page(*(pictures.mask(digit, 90) for digit in range(4))),
    "no single digit": page(pictures.mask(3, 90), pictures.mask(7, 90), axis=0),
}


@pytest.mark.parametrize("message", INVALID)
def test_what_shows_no_single_digit_ends_with_one_line(message, run, tmp_path):
    INVALID[message](tmp_path / "photo.png")
    done = call("evaluate.py", run, "--image", tmp_path / "photo.png", "--save", tmp_path / "seen")
    assert_one_line(done, "photo.png", message)
    assert not (tmp_path / "seen").exists() and not done.stdout


def test_noise_is_blank():
    noise = np.random.default_rng(0).normal(200, 8, (300, 200))
    with pytest.raises(Exception, match="shows nothing"):
        as_mnist(Image.fromarray(noise.clip(0, 255).astype(np.uint8)))


def test_flags_that_exclude_each_other_end_with_one_line(run, tmp_path):
    assert_one_line(call("evaluate.py", run, "--save", tmp_path), "--save expects pictures")
    flags = ("--image", "3.png", "--fitness", "own.py:f")
    assert_one_line(call("evaluate.py", run, *flags), "leave out one flag")
