"""Fitness: higher is better, ties share their rank, and bad scores are named."""

import pytest
import torch
from torch.nn import functional as F

from eggroll import FitnessError, accuracy, cross_entropy, smoothed
from eggroll.fitness import (
    OUTPUT_DECAY,
    centered_rank,
    check_finite,
    check_scores,
    unshaped,
    z_score,
)


def test_cross_entropy_is_the_log_likelihood_of_each_example():
    logits, labels = torch.randn(4, 6, 10), torch.randint(0, 10, (6,))
    for temperature in (1.0, 2.0):
        scores = cross_entropy(temperature)(logits, labels)
        for member in range(4):
            expected = -F.cross_entropy(logits[member] / temperature, labels, reduction="none")
            torch.testing.assert_close(scores[member], expected)


def test_accuracy_counts_hits():
    logits = F.one_hot(torch.tensor([[0, 1, 2], [0, 0, 0]]), 3).float()
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(accuracy(logits, torch.tensor([0, 1, 1])), expected)


def test_tied_scores_share_the_mean_of_their_ranks():
    ranks = centered_rank(torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0]))
    assert torch.allclose(ranks, torch.tensor([0.25, -0.5, 0.25, -0.25, 0.25]))


def test_centered_ranks_span_minus_half_to_half_and_ignore_position():
    scores = torch.randn(50)
    order = torch.randperm(50)
    ranks = centered_rank(scores)
    assert ranks.min() == -0.5 and ranks.max() == 0.5
    assert torch.equal(ranks[order], centered_rank(scores[order]))


def test_a_population_of_ties_has_no_signal():
    ties = torch.full((8,), 0.3)
    for shaping in (z_score, centered_rank):
        shaped = shaping(ties)
        assert torch.equal(shaped[0::2] - shaped[1::2], torch.zeros(4))


def test_z_score_is_free_of_offset_and_scale():
    scores = torch.randn(100)
    shaped = z_score(scores)
    assert abs(shaped.mean()) < 1e-6 and abs(shaped.square().mean() - 1) < 1e-5
    torch.testing.assert_close(shaped, z_score(7 * scores + 3), rtol=1e-4, atol=1e-5)


def test_unshaped_scores_are_left_alone():
    scores = torch.randn(6)
    assert torch.equal(unshaped(scores), scores)


@pytest.mark.parametrize("shape", [(3,), (), (4, 5, 6), (5, 4)])
def test_scores_of_a_wrong_shape_are_named(shape):
    with pytest.raises(FitnessError, match=r"4 members and 5 examples; return \(4, 5\) or \(4,\)"):
        check_scores(torch.zeros(shape), 4, 5, by_example=False)


def test_example_members_need_a_score_for_each_example():
    check_scores(torch.zeros(4, 5), 4, 5, by_example=True)
    with pytest.raises(FitnessError, match="use smoothed, or batch members"):
        check_scores(torch.zeros(4), 4, 5, by_example=True)


def test_scores_that_are_not_finite_are_counted():
    scores = torch.tensor([0.0, float("nan"), float("inf"), 1.0])
    with pytest.raises(FitnessError, match="2 of 4 members is not finite at step 7"):
        check_finite(scores, 7)


# ---- smoothing in output space ----


def direction(fitness, outputs, labels, tau=2.0, samples=256):
    generator = torch.Generator().manual_seed(0)
    (_, found), scores = smoothed(fitness, tau, samples).prepare(outputs, labels, generator)
    return found + OUTPUT_DECAY / tau * outputs, scores  # without the pull towards 0


def hits_of_the_batch(outputs, labels):
    return accuracy(outputs, labels).mean(1)


@pytest.mark.parametrize("whole_batch", [False, True])
def test_a_smoothed_fitness_points_where_autograd_points(whole_batch):
    """Of a fitness that has a gradient, up to the size of each example's."""

    def fitness(outputs, labels):
        scores = cross_entropy()(outputs, labels)
        return scores.mean(1) if whole_batch else scores

    outputs, labels = torch.randn(6, 10, requires_grad=True), torch.randint(0, 10, (6,))
    cross_entropy()(outputs, labels).sum().backward()
    found, _ = direction(fitness, outputs.detach(), labels, tau=0.05, samples=8_192)
    pairs = [(found, outputs.grad)] if whole_batch else zip(found, outputs.grad, strict=True)
    for own, true in pairs:
        assert F.cosine_similarity(own.flatten(), true.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("fitness", [accuracy, hits_of_the_batch])
@pytest.mark.parametrize(("scale", "offset"), [(1000, 7), (0.001, -3), (2, 0)])
def test_scale_and_offset_of_a_fitness_change_nothing(fitness, scale, offset):
    outputs, labels = torch.randn(9, 10), torch.randint(0, 10, (9,))
    plain = direction(fitness, outputs, labels)[0]
    found = direction(lambda *seen: scale * fitness(*seen) + offset, outputs, labels)[0]
    assert plain.any()
    torch.testing.assert_close(found, plain, rtol=1e-2, atol=1e-3)


def test_a_constant_fitness_has_no_direction():
    found, scores = direction(lambda o, _: torch.ones(o.shape[:2]), torch.randn(5, 10), None)
    assert found.abs().max() < 1e-6 and torch.equal(scores, torch.ones(5))


def test_the_fitness_is_asked_once_and_the_unperturbed_outputs_come_first():
    asked, outputs = [], torch.randn(5, 10)

    def fitness(noisy, labels):
        asked.append(noisy)
        return accuracy(noisy, labels)

    direction(fitness, outputs, torch.zeros(5), samples=16)
    assert [len(noisy) for noisy in asked] == [17]
    assert torch.equal(asked[0][0], outputs)


def test_a_members_score_is_how_far_its_outputs_moved_in_the_right_direction():
    own = smoothed(accuracy)
    outputs, labels = torch.randn(5, 3, 10), torch.randint(0, 10, (5, 3))

    def fitness(noisy, labels):  # positions are scored together
        return accuracy(noisy, labels).mean(-1)

    prepared, scores = smoothed(fitness).prepare(outputs, labels, torch.Generator())
    moves = torch.randn(4, 5, 3, 10)
    expected = (moves * prepared[1]).sum((-1, -2))
    torch.testing.assert_close(own(outputs + moves, prepared), expected, rtol=1e-3, atol=1e-5)
    assert scores.shape == (5,) and not own(outputs[None], prepared).any()


@pytest.mark.parametrize(("tau", "samples"), [(0.0, 4), (1.0, 3), (1.0, 0)])
def test_a_smoothing_that_cannot_be_is_refused(tau, samples):
    with pytest.raises(FitnessError, match=r"\(try "):
        smoothed(accuracy, tau, samples)
