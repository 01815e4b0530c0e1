"""Compare what a card computes with the CPU and with itself; skipped without one."""

import copy

import pytest
import torch
from runs import EACH, interrupt_after, train, weights
from torch.nn import functional as F
from trainings import KINDS

from eggroll import (
    BlockLowRank,
    Evolution,
    GraphedStep,
    LowRank,
    NodePerturbation,
    cross_entropy,
    identity,
)
from eggroll import evolution as trainer_module
from eggroll.int8 import arithmetic
from experiment.config import FloatConfig
from experiment.optim import make_optimizer
from model import MLP

CUDA = torch.device("cuda")
STEPS = 8
KIND = pytest.mark.parametrize("kind", KINDS)
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
    pytest.mark.filterwarnings("ignore:not evolved"),
]


def weights_after(kind, *, graph):
    """Weights after some steps, the third of which has a cut batch."""
    training = KINDS[kind](CUDA)
    batches = training.batches(STEPS)
    cut = tuple(tensor[:30] for tensor in batches[2])
    step = training.step(graph=graph)
    step.warm_up(batches[0], cut)
    assert step.captured == graph
    fitness = []
    for number, batch in enumerate(batches):
        fitness.append(step(*(cut if number == 2 else batch)).item())
        training.optimizer.param_groups[0]["lr"] *= 0.5  # exact in the float32 of a graph too
    return fitness, [p.detach().double().cpu() for p in training.network.parameters()]


@KIND
def test_a_graph_trains_as_plain_calls_do(kind):
    graph, plain = weights_after(kind, graph=True), weights_after(kind, graph=False)
    assert graph[0] == pytest.approx(plain[0], rel=1e-4, abs=1e-5)
    for one, other in zip(graph[1], plain[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@KIND
def test_two_runs_of_one_seed_have_the_same_bits(kind):
    first, second = weights_after(kind, graph=True), weights_after(kind, graph=True)
    assert first[0] == second[0] and all(map(torch.equal, first[1], second[1]))


@KIND
@pytest.mark.parametrize("graph", [True, False])
def test_no_step_waits_for_the_card(graph, kind):
    training = KINDS[kind](CUDA)
    step, batches = training.step(graph=graph), training.batches(3)
    step.warm_up(batches[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_every_optimizer_can_be_captured(name):
    network = MLP().to(CUDA)
    optimizer = make_optimizer(network, FloatConfig(optimizer=name, lr=0.001))

    def train(inputs):
        optimizer.zero_grad()
        loss = network(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return -loss.detach()

    inputs = torch.randn(32, 784, device=CUDA)
    step = GraphedStep(train, network, optimizer)
    step.warm_up((inputs,))
    losses = [-step(inputs).item() for _ in range(20)]
    assert step.captured and losses[-1] < 0.9 * losses[0]


ESTIMATORS = {
    "block low rank": BlockLowRank(1056, shaping=identity),
    "rank 4": BlockLowRank(1056, rank=4, shaping=identity),
    "low rank": LowRank(256, shaping=identity),
    "all rows": NodePerturbation((256, 256, 16), sigma=0.01),
}


def estimate(network, estimator, *, in_bfloat16, batch=128):
    """Scores and gradients on random images; of float64 where the network is."""
    rng, dtype = torch.Generator().manual_seed(0), next(network.parameters()).dtype
    inputs = torch.randn(batch, 784, generator=rng).to(CUDA, dtype)
    labels = torch.randint(0, 10, (batch,), generator=rng).to(CUDA)
    evolution = Evolution(network, cross_entropy, estimator)
    evolution.inspect(inputs)
    evolution.in_bfloat16 = in_bfloat16
    scores = evolution.evaluate(inputs, labels)
    evolution.backward(scores)
    return scores.double(), [p.grad.double() for p in network.parameters()]


def cosines(one, other):
    pairs = zip(one, other, strict=True)
    return [F.cosine_similarity(x.flatten(), y.flatten(), 0).item() for x, y in pairs]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [128, 96])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_members_in_bfloat16_estimate_what_those_in_float32_do(name, batch, bias):
    network = MLP(bias=bias).to(CUDA)
    half = estimate(network, ESTIMATORS[name], in_bfloat16=True, batch=batch)
    full = estimate(network, ESTIMATORS[name], in_bfloat16=False, batch=batch)
    assert (half[0] - full[0]).square().mean().sqrt() < 0.1 * full[0].std()
    assert min(cosines(half[1], full[1])) > 0.95


def test_the_gradient_at_all_rows_is_that_of_float64():
    network = MLP().to(CUDA)
    _, found = estimate(network, ESTIMATORS["all rows"], in_bfloat16=True)
    exact = copy.deepcopy(network).double()
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 784, generator=rng).to(CUDA, torch.float64)
    labels = torch.randint(0, 10, (128,), generator=rng).to(CUDA)
    F.cross_entropy(exact(inputs), labels).backward()
    assert min(cosines(found, [p.grad for p in exact.parameters()])) > 0.95


@pytest.mark.parametrize("name", ESTIMATORS)
def test_chunks_change_nothing_but_rounding(name, monkeypatch):
    network = MLP().to(CUDA)
    whole = estimate(network, ESTIMATORS[name], in_bfloat16=False)
    monkeypatch.setitem(trainer_module.CHUNK, "cuda", 1 << 20)
    parts = estimate(network, ESTIMATORS[name], in_bfloat16=False)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-4, atol=1e-5)
    assert min(cosines(parts[1], whole[1])) > 0.9999


def test_cards_with_bfloat16_use_it():
    evolution = Evolution(MLP().to(CUDA), cross_entropy, BlockLowRank(66))
    evolution.inspect(torch.randn(4, 784, device=CUDA))
    assert evolution.in_bfloat16 == torch.cuda.is_bf16_supported(including_emulation=False)


@pytest.mark.parametrize("sizes", [(1, 3, 2), (17, 29, 10), (128, 784, 256), (40, 2_200, 9)])
def test_int8_products_are_exact(sizes):
    rows, inner, columns = sizes
    x = torch.randint(-127, 128, (rows, inner), dtype=torch.int8)
    y = torch.randint(-127, 128, (inner, columns), dtype=torch.int8)
    found = arithmetic.int_matmul(x.to(CUDA), y.to(CUDA))
    assert torch.equal(found.cpu(), (x.double() @ y.double()).int())


def test_integers_train_to_the_bits_of_the_cpu_from_the_same_noise(monkeypatch):
    """Noise of the CPU is moved to the card, whose generators draw other numbers."""
    monkeypatch.setattr(arithmetic.kernels, "library", None)
    sample = trainer_module.Evolution._noise
    cpu, card = KINDS["int8"](), KINDS["int8"](CUDA)
    noises = []

    def record(self, draw):
        noises.append(sample(self, draw))
        return noises[-1]

    def replay(self, draw):
        return {i: moves_on_card(moves) for i, moves in noises.pop(0).items()}

    def moves_on_card(moves):
        return type(moves)(*({p: x.to(CUDA) for p, x in part.items()} for part in moves))

    for _ in range(3):
        for training, noise in ((cpu, record), (card, replay)):
            monkeypatch.setattr(trainer_module.Evolution, "_noise", noise)
            training.train(*training.batches()[0])
    pairs = zip(cpu.network.parameters(), card.network.parameters(), strict=True)
    assert all(torch.equal(one, other.cpu()) for one, other in pairs)


@EACH
def test_a_resumed_run_has_the_bits_of_a_whole_one(kind, tmp_path, monkeypatch):
    train(kind, tmp_path / "whole", "--device", "cuda")
    with monkeypatch.context() as patch:
        interrupt_after(12, patch)
        train(kind, tmp_path / "stopped", "--device", "cuda", code=130)
    train(kind, tmp_path / "stopped", "--resume")
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")


def test_a_step_that_waits_is_called_as_it_is():
    """The last test, since a capture that fails leaves older torch unfit for another."""
    training = KINDS["block low rank"](CUDA)
    training = training._replace(train=lambda *batch: torch.tensor(float(batch[0].sum())))
    step, (batch,) = training.step(), training.batches()
    with pytest.warns(UserWarning, match="no CUDA graph"):
        step.warm_up(batch)
    assert step(*batch).item() == pytest.approx(batch[0].sum().item())
