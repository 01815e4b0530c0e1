"""Methods can be told apart in plots, by colour-blind readers too, and plots are opaque."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from experiment import report, style

# Machado, Oliveira and Fernandes 2009, severity 1, of linear RGB
VISION = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array(  # sRGB's primaries, white D65
    [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]
)
METHODS = list(report.METHODS)


def linear(colours):
    """Return linear RGB (n, 3)."""
    rgb = np.array([to_rgb(colour) for colour in colours])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """Return CIELAB (n, 3) of linear RGB."""
    xyz = rgb @ TO_XYZ.T / TO_XYZ.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def distances(vision):
    """Return CIELAB distances between the colours of all pairs of methods."""
    seen = linear(map(style.colour, METHODS)) @ np.array(VISION[vision]).T
    places = lab(seen.clip(0, 1))
    pairs = np.triu_indices(len(METHODS), 1)
    return np.linalg.norm(places[:, None] - places, axis=-1)[pairs]


@pytest.mark.parametrize("vision", VISION)
def test_colours_of_methods_lie_far_apart(vision):
    assert distances(vision).min() > 30


def test_cielab_is_that_of_known_colours():
    expected = [[100, 0, 0], [53.24, 80.09, 67.2], [32.3, 79.19, -107.86]]
    np.testing.assert_allclose(lab(linear(["white", "red", "blue"])), expected, atol=0.1)


def test_colours_stand_out_from_white_paper():
    luminance = linear(map(style.colour, METHODS)) @ TO_XYZ[1]
    assert (1.05 / (luminance + 0.05)).min() > 3  # WCAG's contrast for large text and graphics


def test_every_method_has_a_colour_and_a_mark_of_its_own():
    assert list(style.COLOURS) == list(style.LINES) == METHODS
    assert len({style.line_format(method)[0] for method in METHODS}) == len(METHODS)
    assert style.line_format("node-perturbation-int8").endswith("--")
    assert style.colour("another") not in style.COLOURS.values()


def test_saved_plots_are_opaque(tmp_path):
    with plt.rc_context(style.STYLE):
        figure = plt.figure(figsize=(1, 1))
        png, _ = style.save(figure, tmp_path, "plot")
    assert (plt.imread(png)[..., -1] == 1).all()
