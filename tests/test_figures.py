"""The figures can be read, and show what the code computes."""

import sys
from dataclasses import replace
from itertools import combinations

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import run_command
from matplotlib.collections import QuadMesh
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mnist_backprop
import mnist_eggroll
from eggroll import BlockLowRank, z_score
from eggroll.factors import add_low_rank
from visualizations import (
    estimators,
    how_eggroll_works,
    learning,
    one_direction,
    what_scores_tell,
    why_low_rank,
)
from visualizations.canvas import SHEET_STYLE
from visualizations.make_figures import FIGURES, draw_all

SCRIPT = (sys.executable, "-m", "visualizations.make_figures")


def test_the_script_writes_png_and_svg_and_equal_files_each_time(tmp_path):
    done = run_command(*SCRIPT, "--out-dir", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    again = draw_all(tmp_path / "second")
    assert len(again) == 2 * len(FIGURES)
    assert {path.name for path in (tmp_path / "first").iterdir()} == {path.name for path in again}
    for path in again:
        image = (tmp_path / "first" / path.name).read_bytes()
        assert 0 < len(image) < 500_000, path
        assert image == path.read_bytes(), path


def test_an_invalid_out_dir_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_command(*SCRIPT, "--out-dir", tmp_path / "file" / "figures")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "make_figures.py: error:" in done.stderr and "file" in done.stderr


def check_texts(figure):
    """Assert that texts are large enough, inside of their frames, and overlap nothing."""
    figure.draw_without_rendering()
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    pixels = 800 / figure.get_figwidth() / 72  # per point, where the figure is 800 pixels wide
    assert min(text.get_fontsize() for text in texts) * pixels > 11
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    frames = [patch.get_window_extent() for patch in figure.findobj(FancyBboxPatch)]
    meshes = [mesh.get_window_extent() for mesh in figure.findobj(QuadMesh)]
    plt.close(figure)
    for text, box in boxes:
        for frame in (figure.bbox, *(frame for frame in frames if frame.overlaps(box))):
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text
            assert frame.y0 <= box.y0 and box.y1 <= frame.y1, text
        assert not any(mesh.overlaps(box) for mesh in meshes), text
    assert not [(one, two) for (one, a), (two, b) in combinations(boxes, 2) if a.overlaps(b)]


@pytest.mark.parametrize("module", FIGURES)
def test_text_is_large_enough_and_nothing_overlaps_it_or_cuts_it_off(module):
    with plt.rc_context(SHEET_STYLE):
        check_texts(module.draw())


def test_the_drawn_update_is_the_weighted_sum_of_the_drawn_perturbations():
    step = how_eggroll_works.measure()
    pairs = zip(step.pair_weights, step.a, step.b, strict=True)
    total = sum(weight * a.T @ b for weight, a, b in pairs)
    torch.testing.assert_close(step.estimate, total)
    torch.testing.assert_close(step.partial_sum(how_eggroll_works.PAIRS), total)
    updated = step.weights + how_eggroll_works.LEARNING_RATE * total
    torch.testing.assert_close(step.new_weights, updated)
    assert how_eggroll_works.rank(step.perturbations[0]) == 1
    assert how_eggroll_works.rank(step.estimate) == min(step.weights.shape)


def test_the_drawn_pair_weights_follow_from_the_drawn_scores():
    step = how_eggroll_works.measure()
    shaped = z_score(step.scores)
    torch.testing.assert_close(step.pair_weights, (shaped[0::2] - shaped[1::2]) / len(shaped))
    assert step.new_fitness > step.fitness


def test_the_three_estimators_are_those_of_the_presets_and_do_what_is_written():
    measured = {}
    for preset, estimator in estimators.PRESETS.items():
        assert estimator == mnist_eggroll.PRESETS[preset].es
        assert estimators.INIT_SCALES[preset] == mnist_eggroll.PRESETS[preset].init_scale
        measured[preset] = estimators.measure(preset)
    dense, blocks, nodes = measured.values()
    assert [m.members for m in (dense, blocks, nodes)] == [2, 32, 16]
    assert [m.scores.dim() for m in (dense, blocks, nodes)] == [1, 1, 2]
    assert blocks.changes == "8 × 784 weights" and nodes.changes == "16 outputs"  # noqa: RUF001
    expected = (1 + 268_801 / (dense.population / 2)) ** -0.5  # of Gaussian noise, in pairs
    assert dense.changes == "268,800 weights" and dense.cosine == pytest.approx(expected, abs=0.015)
    assert dense.cosine < blocks.cosine < nodes.cosine


def test_the_plotted_costs_are_those_of_a_layer():
    outputs, inputs, rank, examples = 5, 7, 3, 11
    x, y = torch.randn(1, examples, inputs), torch.randn(1, examples, outputs)
    a, b = torch.randn(1, rank, outputs), torch.randn(1, rank, inputs)
    with FlopCounterMode(display=False) as counter:
        add_low_rank(y, x, a, b)
    counted = counter.get_total_flops() // 2  # torch counts a multiply-add as two operations
    assert why_low_rank.multiply_adds(outputs, inputs, rank, examples) == counted
    assert why_low_rank.noise(outputs, inputs, rank) == a.numel() + b.numel()
    assert why_low_rank.noise(outputs, inputs, None) == (a.mT @ b).numel()
    assert why_low_rank.in_blocks(why_low_rank.noise, 256) == 512 / 32


def test_each_drawn_member_has_its_own_block_of_the_drawn_direction():
    drawn, units = one_direction.measure(), one_direction.ESTIMATOR.units
    weights = torch.cat(drawn.columns, 1)
    assert torch.linalg.matrix_rank(drawn.move) == 1
    for k, member in enumerate(drawn.members):
        y, block = drawn.y.clone(), slice(k * units, (k + 1) * units)
        y[:, block] += drawn.move[:, block]
        torch.testing.assert_close(member, F.gelu(y) @ weights.T)


def test_the_plotted_cosines_rise_with_the_members_and_a_score_per_example_tells_most():
    ends = {}
    for method in what_scores_tell.ESTIMATORS:
        members, cosines = what_scores_tell.measured(method)
        assert len(members) >= 4 and (cosines[:, 1:] > cosines[:, :-1]).all()
        ends[method] = members[-1], cosines[:, -1].min()
    nodes, blocks, dense = ends.values()
    assert nodes[0] < dense[0] < blocks[0]
    assert 1 > nodes[1] > 0.99 and nodes[1] > blocks[1] > dense[1]


# ---- the film ----


@pytest.fixture
def recordings(monkeypatch, tmp_path):
    """Two epochs of both methods on the sample, with few members and frames."""
    monkeypatch.setattr(learning, "ESTIMATOR", BlockLowRank(330))
    monkeypatch.setattr(learning, "FRAMES", 6)
    flags = learning.Flags(dataset="mnist-sample", recording=tmp_path / "weights.npz")
    recorded, read = learning.record_both(flags), learning.record_both(flags)
    for one, other in zip(recorded.values(), read.values(), strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))
    return recorded


def test_the_film_compares_equal_steps_from_equal_weights_and_can_be_made_again(
    recordings, tmp_path
):
    backprop, eggroll = recordings.values()
    assert (backprop.steps == eggroll.steps).all() and backprop.steps[-1] == 56
    assert (backprop.weights[0] == eggroll.weights[0]).all()
    assert min(backprop.accuracy[-1], eggroll.accuracy[-1]) > 0.3
    films = [tmp_path / name for name in ("one.gif", "two.gif")]
    for film in films:
        learning.write_film(recordings, film)
    assert films[0].read_bytes() == films[1].read_bytes()
    with plt.rc_context(SHEET_STYLE):
        check_texts(learning.draw(recordings, len(backprop.steps) - 1))


def test_the_film_has_the_settings_of_the_presets():
    preset = mnist_eggroll.PRESETS["eggroll"]
    assert preset.es == learning.ESTIMATOR
    usual = replace(preset, epochs=learning.CONFIGS["eggroll"].epochs)
    lr = mnist_eggroll.scaled_lr(usual, preset, sum(preset.es.population))
    assert learning.CONFIGS["eggroll"].lr == pytest.approx(lr, rel=0.01)
    for method, settings in {"eggroll": preset, **mnist_backprop.PRESETS}.items():
        for name in ("schedule", "momentum", "weight_decay", "label_smoothing", "batch_size"):
            assert getattr(learning.CONFIGS[method], name) == getattr(settings, name), name


def test_the_committed_film_is_small_and_stays_at_its_last_frame():
    assert learning.FILE.stat().st_size < 1_000_000
    with Image.open(learning.FILE) as film:
        durations = []
        for frame in range(film.n_frames):
            film.seek(frame)
            durations.append(film.info["duration"])
    assert len(durations) > 30 and set(durations[:-1]) == {100} and durations[-1] >= 3_000
