"""The explaining figures: that they can be drawn, and that what they show is what the code does."""

from itertools import combinations

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import run_script
from matplotlib.text import Text
from torch.utils.flop_counter import FlopCounterMode

from eggroll import MLP, Population
from eggroll.estimator import estimate_layer, materialised_estimate, pair_weights
from visualizations import algorithm, how_eggroll_works, why_low_rank
from visualizations.canvas import TALK_STYLE
from visualizations.make_figures import FIGURES, draw_all

SCRIPT = "visualizations/make_figures.py"


def test_the_script_writes_six_files_and_they_come_out_the_same_again(tmp_path):
    done = run_script(SCRIPT, "--out-dir", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    (tmp_path / "second").mkdir()
    again = draw_all(tmp_path / "second")
    assert len(again) == 6
    assert {path.name for path in (tmp_path / "first").iterdir()} == {path.name for path in again}
    for path in again:
        image = (tmp_path / "first" / path.name).read_bytes()
        assert 0 < len(image) < 400_000, path
        assert image == path.read_bytes(), path


def test_an_out_dir_that_cannot_be_is_named_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run_script(SCRIPT, "--out-dir", tmp_path / "file" / "figures")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "make_figures.py: error:" in done.stderr and "file" in done.stderr


@pytest.mark.parametrize("module", FIGURES)
def test_no_text_is_clipped_or_overlaps_another(module):
    with plt.rc_context(TALK_STYLE):
        figure = module.draw()
        figure.draw_without_rendering()
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    plt.close(figure)
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    overlaps = [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
    assert not overlaps


def test_the_drawn_update_is_the_sum_of_the_drawn_perturbations():
    step = how_eggroll_works.measure()
    layer = step.population.layers[how_eggroll_works.LAYER]
    plain, _ = materialised_estimate(layer, step.noise, step.pair_weights)
    torch.testing.assert_close(step.estimate, plain)
    moved = step.weights + how_eggroll_works.LEARNING_RATE * plain
    torch.testing.assert_close(step.new_weights, moved)
    assert how_eggroll_works.rank_of_members(step) == 1
    assert how_eggroll_works.rank(step.estimate) == min(step.weights.shape)


@torch.no_grad()
def test_the_drawn_shapes_are_those_of_the_code(small_network, batch):
    inputs, _ = batch
    population = Population(small_network, size=6, rank=2, sigma=0.1, seed=0, step=0)
    (noise,), (chunk,) = list(population.noise_blocks(2)), list(population.chunks())
    head = small_network.layers[2]
    weights = pair_weights(torch.randn(6), "z-score", 0.1)
    tensors = {
        "a": noise.a,
        "b": noise.b,
        "W": head.weight,
        "y": chunk.forward(inputs),
        "w": weights,
        "estimate g": estimate_layer(head, [noise], weights)[0],
    }
    sizes = {"P": 6, "N": 3, "B": 11, "R": 2, "O": 3, "I": 5}
    drawn = {shape.name: shape for line in algorithm.LINES for shape in line.shapes}
    for name, tensor in tensors.items():
        assert tensor.shape == tuple(sizes[letter] for letter in drawn[name].axes), name


def test_the_plotted_costs_are_those_of_a_layer():
    outputs, inputs, rank, batch = 5, 7, 3, 11
    layer = MLP(inputs, outputs, 2).layers[0]
    population = Population(torch.nn.Sequential(layer), 2, rank, sigma=0.1, seed=0, step=0)
    (noise,) = population.noise_blocks(0)
    perturbation, x = noise.materialise()[0], torch.randn(batch, inputs)

    low = why_low_rank.noise_numbers_low(outputs, inputs, rank)
    assert low == noise.a.numel() + noise.b.numel()
    assert why_low_rank.noise_numbers_full(outputs, inputs) == perturbation.numel()

    with FlopCounterMode(display=False) as counter:
        x @ noise.b[0].T @ noise.a[0]
    # torch counts a multiply-add as two operations
    counted = counter.get_total_flops() // 2
    assert why_low_rank.multiply_adds_low(outputs, inputs, rank, batch) == counted
    formed = layer.weight + population.sigma * perturbation
    assert why_low_rank.multiply_adds_full(outputs, inputs) == formed.numel()
