"""Fitness, shaping and smoothing."""

import pytest
import torch
from torch.nn import functional as F

from eggroll import (
    FitnessError,
    Smoothing,
    accuracy,
    centered_rank,
    cross_entropy,
    identity,
    z_score,
)
from eggroll.smoothing import GAIN, OUTPUT_DECAY


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_minus_torchs_for_each_example(temperature, label_smoothing):
    logits, labels = torch.randn(4, 6, 10), torch.randint(0, 10, (6,))
    scores = cross_entropy(logits, labels, label_smoothing, temperature)
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    for member in range(4):
        expected = -F.cross_entropy(logits[member] / temperature, labels, **options)
        torch.testing.assert_close(scores[member], expected)


def test_accuracy_is_1_where_the_largest_output_is_the_labels():
    logits = F.one_hot(torch.tensor([[0, 1, 2], [0, 0, 0]]), 3).float()
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(accuracy(logits, torch.tensor([0, 1, 1])), expected)


def test_tied_scores_share_the_mean_of_their_ranks():
    ranks = centered_rank(torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0]))
    assert torch.allclose(ranks, torch.tensor([0.25, -0.5, 0.25, -0.25, 0.25]))


def test_centered_ranks_span_minus_half_to_half_and_ignore_position():
    scores, order = torch.randn(50), torch.randperm(50)
    ranks = centered_rank(scores)
    assert ranks.min() == -0.5 and ranks.max() == 0.5
    assert torch.equal(ranks[order], centered_rank(scores[order]))


def test_a_population_of_ties_has_no_signal():
    for shaping in (z_score, centered_rank):
        assert not shaping(torch.full((8,), 0.3)).any()


def test_z_score_ignores_offset_and_scale():
    scores = torch.randn(100)
    shaped = z_score(scores)
    assert abs(shaped.mean()) < 1e-6 and abs(shaped.square().mean() - 1) < 1e-5
    torch.testing.assert_close(shaped, z_score(7 * scores + 3), rtol=1e-4, atol=1e-5)
    assert identity(scores) is scores


# ---- smoothing in output space ----


def direction(fitness, outputs, labels, tau=2.0, samples=256):
    """The direction without the pull towards 0, and the unperturbed scores."""
    rng = torch.Generator().manual_seed(0)
    found, scores = Smoothing(tau, samples).direction(fitness, outputs, labels, rng)
    return found / GAIN + OUTPUT_DECAY / tau * outputs, scores


def accuracy_of_the_batch(outputs, labels):
    return accuracy(outputs, labels).mean(1)


@pytest.mark.parametrize("whole_batch", [False, True])
def test_a_smoothed_fitness_points_where_autograd_points(whole_batch):
    """Up to the length of each example's direction."""

    def fitness(outputs, labels):
        scores = cross_entropy(outputs, labels)
        return scores.mean(1) if whole_batch else scores

    outputs, labels = torch.randn(6, 10, requires_grad=True), torch.randint(0, 10, (6,))
    cross_entropy(outputs, labels).sum().backward()
    found, _ = direction(fitness, outputs.detach(), labels, tau=0.05, samples=8_192)
    pairs = [(found, outputs.grad)] if whole_batch else zip(found, outputs.grad, strict=True)
    for own, true in pairs:
        assert F.cosine_similarity(own.flatten(), true.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("fitness", [accuracy, accuracy_of_the_batch])
@pytest.mark.parametrize(("scale", "offset"), [(1000, 7), (0.001, -3), (2, 0)])
def test_scale_and_offset_of_a_fitness_change_nothing(fitness, scale, offset):
    outputs, labels = torch.randn(9, 10), torch.randint(0, 10, (9,))
    plain = direction(fitness, outputs, labels)[0]
    found = direction(lambda *seen: scale * fitness(*seen) + offset, outputs, labels)[0]
    assert plain.any()
    torch.testing.assert_close(found, plain, rtol=1e-2, atol=1e-3)


def test_accuracy_is_followed_by_the_gradient_of_its_log_share():
    """Advantages of accuracy are (F - mean) / (mean + 0.01)."""
    outputs, labels, noise = torch.randn(5, 10), torch.randint(0, 10, (5,)), []

    def fitness(copies, labels):
        noise.append((copies[1:] - copies[0]) / 2.0)
        return accuracy(copies, labels)

    found, _ = direction(fitness, outputs, labels)
    hits = accuracy(outputs + 2.0 * noise[0], labels)
    weights = (hits - hits.mean(0)) / (hits.mean(0) + 0.01)
    expected = (weights[:, :, None] * noise[0]).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_outputs_are_pulled_towards_0():
    outputs = torch.randn(5, 10)
    rng = torch.Generator().manual_seed(0)
    found, scores = Smoothing().direction(lambda o, _: torch.ones(o.shape[:2]), outputs, None, rng)
    torch.testing.assert_close(found, -GAIN * OUTPUT_DECAY / 2 * outputs, rtol=1e-3, atol=1e-6)
    assert torch.equal(scores, torch.ones(5))


def test_the_fitness_is_called_once_and_row_0_is_the_unperturbed_network():
    calls, outputs = [], torch.randn(5, 10)

    def fitness(copies, labels):
        calls.append(copies)
        return accuracy(copies, labels)

    direction(fitness, outputs, torch.zeros(5), samples=16)
    assert [len(copies) for copies in calls] == [17]
    assert torch.equal(calls[0][0], outputs)
    torch.testing.assert_close(calls[0][1:9] - outputs, outputs - calls[0][9:])  # antithetic


def test_a_members_score_is_how_far_its_outputs_moved_along_the_direction():
    outputs, moves, g = torch.randn(5, 3, 10), torch.randn(4, 5, 3, 10), torch.randn(5, 3, 10)
    scores = Smoothing().score(outputs + moves, outputs, g)
    torch.testing.assert_close(scores, (moves * g).sum((-1, -2)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("tau", "samples"), [(0.0, 4), (1.0, 3), (1.0, 0)])
def test_invalid_smoothing_is_refused(tau, samples):
    with pytest.raises(FitnessError, match=r"\(try "):
        Smoothing(tau, samples)
