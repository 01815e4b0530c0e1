"""Members in bfloat16, as on a card; here on a CPU, whose autocast rounds at the same places."""

import pytest
import torch
from networks import SMOOTH, batch, make
from torch.nn import functional as F

from eggroll import BlockLowRank, Evolution, LowRank, NodePerturbation, cross_entropy, identity
from model import MLP

ESTIMATORS = {
    "block low rank": BlockLowRank(96, 0.05, units=4, shaping=identity),
    "low rank": LowRank(96, 0.05, shaping=identity),
    "node perturbation": NodePerturbation(24, 0.02, units=4),
}
EACH = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)


def evolution_of(network, estimator, inputs, *, in_bfloat16):
    evolution = Evolution(network, cross_entropy, estimator)
    evolution.inspect(inputs)
    evolution._loops, evolution.in_bfloat16 = None, in_bfloat16
    return evolution


@EACH
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.filterwarnings("ignore:not evolved")
def test_scores_differ_from_those_of_float32_by_rounding(name, estimator):
    inputs, labels = batch(40)
    scores = [
        evolution_of(make(name), estimator, inputs, in_bfloat16=half).evaluate(inputs, labels)
        for half in (False, True)
    ]
    error = (scores[1] - scores[0]).square().mean().sqrt()
    assert error < 0.1 * scores[0].std() and scores[1].dtype == torch.float32
    assert error > 0 or name in ("head first", "positions")  # those may have no hidden product


@EACH
def test_outputs_that_are_scored_are_not_rounded_to_bfloat16(estimator):
    inputs, labels = batch(40)
    evolution, seen = evolution_of(make("mlp"), estimator, inputs, in_bfloat16=True), []
    evolution.fitness = lambda outputs, labels: (
        seen.append(outputs) or cross_entropy(outputs, labels)
    )
    evolution.evaluate(inputs, labels)
    assert len(seen) > 1
    for outputs in seen:
        assert outputs.dtype == torch.float32
        assert not torch.equal(outputs, outputs.bfloat16().float())


def test_members_of_all_layers_write_bfloat16_to_memory():
    """Those of one layer are few before they split off, and keep how they differ in float32."""
    inputs, labels = batch(40)
    network, seen = make("mlp"), []
    for module in (network[1], network[3]):
        module.register_forward_hook(lambda _, x, y: seen.append((len(y), y.dtype)))
    evolution = evolution_of(network, ESTIMATORS["low rank"], inputs, in_bfloat16=True)
    seen.clear()
    evolution.evaluate(inputs, labels)
    assert {dtype for members, dtype in seen if members > 1} == {torch.bfloat16}


@pytest.mark.parametrize(
    "estimator",
    [BlockLowRank(330), LowRank(40), NodePerturbation((256, 256, 16), sigma=0.01)],
    ids=ESTIMATORS,
)
def test_the_estimate_is_that_of_float32_but_for_rounding(estimator):
    """At the experiment's sizes."""
    inputs, labels = torch.randn(64, 784), torch.randint(0, 10, (64,))
    network, found = MLP(), []
    for half in (False, True):
        evolution = evolution_of(network, estimator, inputs, in_bfloat16=half)
        evolution.backward(evolution.evaluate(inputs, labels))
        found.append([p.grad.clone() for p in network.parameters()])
    for one, other in zip(*found, strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.97
        assert other.norm() / one.norm() == pytest.approx(1, abs=0.03)
