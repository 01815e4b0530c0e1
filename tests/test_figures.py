"""The explaining figures: that they can be drawn, and that what they show is what the code does."""

from itertools import combinations

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import run_script
from matplotlib.text import Text
from torch.utils.flop_counter import FlopCounterMode

from eggroll import MLP, BatchMembers, Evolution, ExampleMembers, cross_entropy
from eggroll.fitness import z_score
from eggroll.members import Step, make_blocks
from eggroll.noise import Keys
from eggroll.seam import record
from visualizations import algorithm, how_eggroll_works, two_kinds_of_members, why_low_rank
from visualizations.canvas import TALK_STYLE
from visualizations.make_figures import FIGURES, draw_all

SCRIPT = "visualizations/make_figures.py"


def test_the_script_writes_both_files_of_each_figure_and_the_same_ones_again(tmp_path):
    done = run_script(SCRIPT, "--out-dir", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    (tmp_path / "second").mkdir()
    again = draw_all(tmp_path / "second")
    assert len(again) == 2 * len(FIGURES)
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
    pairs = zip(step.pair_weights, step.a, step.b, strict=True)
    formed = sum(weight * a @ b.T for weight, a, b in pairs)
    torch.testing.assert_close(step.gradient_estimate, formed)
    torch.testing.assert_close(step.partial_sum(how_eggroll_works.PAIRS), formed)
    updated = step.weights + how_eggroll_works.LEARNING_RATE * formed
    torch.testing.assert_close(step.new_weights, updated)
    assert how_eggroll_works.rank_of_members(step) == 1
    assert how_eggroll_works.rank(step.gradient_estimate) == min(step.weights.shape)


def test_the_drawn_pair_weights_are_those_of_the_drawn_scores():
    step = how_eggroll_works.measure()
    shaped = z_score(step.scores)
    difference = shaped[0::2] - shaped[1::2]
    torch.testing.assert_close(step.pair_weights, difference / (2 * how_eggroll_works.PAIRS))
    assert step.new_fitness > step.fitness


SIZES = {"P": 6, "N": 3, "B": 11, "R": 2, "O": 3, "I": 5}


def known_to_a_step(network, inputs, labels):
    """A Step, and the call of the last layer."""
    weights = [layer.weight for layer in network.layers]
    calls, outputs = record(network, weights, inputs)
    baseline = cross_entropy()(outputs, labels)[0]
    return Step(Keys(0, 0, inputs.device), weights, [], calls, baseline), calls[-1]


@torch.no_grad()
def test_the_listing_of_batch_members_computes_what_the_code_computes(small_network, batch):
    inputs, labels = batch
    members = BatchMembers(SIZES["P"], sigma=0.1, rank=SIZES["R"])
    step, call = known_to_a_step(small_network, inputs, labels)
    noise = members.draw(step, make_blocks([(None, SIZES["P"])], 32))
    evolution = Evolution(small_network, cross_entropy(), members)
    scores = evolution.evaluate(inputs, labels)
    evolution.backward(scores)

    a, b, x = noise["a2"], noise["b2"], call.x
    u = x @ b.mT
    z = z_score(scores)
    w = (z[0::2] - z[1::2]) / (members.sigma * SIZES["P"])
    g = (w[:, None, None] * a.mT @ b).sum(0)
    torch.testing.assert_close(small_network.layers[2].weight.grad, -g)
    y = members.add(noise, 0, 2, None, x[None], call.y)
    torch.testing.assert_close(y, call.y + torch.stack([u @ a, -u @ a], 1).flatten(0, 1))
    made = {"a": a, "b": b, "u": u, "y": y, "scores": scores, "z": z, "w": w, "g": g}
    assert drawn_shapes(algorithm.BATCH) == {name: tensor.shape for name, tensor in made.items()}


@torch.no_grad()
def test_the_listing_of_example_members_computes_what_the_code_computes(small_network, batch):
    inputs, labels = batch
    members = ExampleMembers((2, 2, 4), sigma=0.1)
    step, call = known_to_a_step(small_network, inputs, labels)
    evolution = Evolution(small_network, cross_entropy(), members)
    scores = evolution.evaluate(inputs, labels)
    evolution.backward(scores)

    noise = members.draw(step, evolution.blocks[-1:])
    a, d = members.rows(noise, 0).squeeze(1), noise["d0"]
    c = members.sigma * call.x.square().sum(-1).mean().sqrt()
    torch.testing.assert_close(a.abs(), c.expand_as(a))
    y = call.y + d * a[:, None]
    scores = scores[-4:]  # of the members of the last layer
    torch.testing.assert_close(scores, cross_entropy()(y, labels))
    change = scores - step.baseline
    delta = d * (change.T @ a) / (c**2 * 4)
    g = delta.T @ call.x / SIZES["B"]
    torch.testing.assert_close(small_network.layers[2].weight.grad, -g)
    made = {"a": a, "d": d, "y": y, "scores": scores, "change": change}
    made |= {"δ": delta, "g": g}
    drawn = drawn_shapes(algorithm.EXAMPLE, SIZES | {"P": 4})
    assert drawn == {name: tensor.shape for name, tensor in made.items()}


def drawn_shapes(listing, sizes=SIZES):
    return {
        shape.name: tuple(sizes[letter] for letter in shape.axes)
        for line in listing
        for shape in line.shapes
    }


def test_144_example_members_come_nearer_to_the_gradient_than_39_000_batch_members_would():
    cosines, figure = two_kinds_of_members.measure(), two_kinds_of_members
    dimensions = figure.parameters(MLP())
    expected = [figure.expected_cosine(dimensions, count) for count in figure.BATCH_POPULATIONS]
    assert cosines.batch == pytest.approx(expected, abs=0.015)
    place = figure.EXAMPLE_POPULATIONS.index(figure.OURS)
    theirs = figure.expected_cosine(dimensions, figure.THEIRS)
    assert min(cosines.example[place], cosines.example_trained[place]) > 1.5 * theirs
    assert min(cosines.example[-1], cosines.example_trained[-1]) > 0.99


def test_the_plotted_costs_are_those_of_a_layer():
    outputs, inputs, rank, batch = 5, 7, 3, 11
    weight, x = torch.randn(outputs, inputs), torch.randn(batch, inputs)
    members = BatchMembers(2, sigma=0.1, rank=rank)
    step = Step(Keys(0, 0, x.device), [weight], [], [], torch.zeros(()))
    noise = members.draw(step, make_blocks([(None, 2)], 32))
    a, b = noise["a0"][0], noise["b0"][0]

    assert why_low_rank.noise_numbers_low(outputs, inputs, rank) == a.numel() + b.numel()
    assert why_low_rank.noise_numbers_full(outputs, inputs) == weight.numel()

    with FlopCounterMode(display=False) as counter:
        x @ b.T @ a
    # torch counts a multiply-add as two operations
    counted = counter.get_total_flops() // 2
    assert why_low_rank.multiply_adds_low(outputs, inputs, rank, batch) == counted
    assert why_low_rank.multiply_adds_full(outputs, inputs) == (weight + a.T @ b).numel()
