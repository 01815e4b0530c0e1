"""Training in integers: exact products, true to the gradient, and no floats."""

import io
import math
import platform
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eggroll import Smoothing, accuracy, compiled, evolution
from eggroll.int8 import (
    FRACTION_BITS,
    INT8_SCALE,
    Int8Accuracy,
    Int8CrossEntropy,
    Int8Evolution,
    Int8MLP,
    Int8NodePerturbation,
    Int8SGD,
    Int8Smoothing,
    arithmetic,
)
from eggroll.int8.arithmetic import kernels
from eggroll.int8.loops import Int8Loops
from eggroll.int8.network import activation
from eggroll.int8.node_perturbation import DELTA_BITS
from eggroll.int8.optimizer import RESIDUAL_BITS, follow
from model import MLP

ALL_ROWS = Int8NodePerturbation(10**6, sigma=1 / 32)
SMOOTHED_ACCURACY = {"fitness": Int8Accuracy(), "smoothing": Int8Smoothing(2.0, 64)}


class NoFloats(TorchDispatchMode):
    """Fails on any operation that reads or writes a floating tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                assert not leaf.is_floating_point(), f"{func} meets {leaf.dtype}"
        return result


class Repeated(Int8MLP):
    """All layers are called twice, and the second time with two rows for each example."""

    def forward(self, x):
        rows = super().forward(torch.stack([x.flip(-1), x.roll(1, -1)], -2))
        return super().forward(x) + rows.sum(-2, dtype=torch.int32)


class Trainer:
    """A network of odd sizes with its trainer and optimizer, and a batch."""

    def __init__(
        self,
        estimator=ALL_ROWS,
        fitness=None,
        smoothing=None,
        sizes=(21, 20, 5),
        lr=0.05,
        network=Int8MLP,
        examples=40,
    ):
        self.floats = MLP(*sizes, seed=1)
        self.network, generator = network(self.floats), torch.Generator().manual_seed(3)
        inputs = INT8_SCALE * torch.randn(examples, sizes[0], generator=generator)
        self.inputs = inputs.round().clamp(-127, 127).to(torch.int8)
        self.labels = torch.randint(0, sizes[2], (examples,), generator=generator)
        fitness = fitness or Int8CrossEntropy()
        self.evolution = Int8Evolution(self.network, fitness, estimator, 0, smoothing)
        self.optimizer = Int8SGD(self.network, lr=lr, examples=examples)

    def estimate(self):
        """Return the scores of a step; ascent directions are in the weights."""
        scores = self.evolution.evaluate(self.inputs, self.labels)
        self.evolution.backward(scores)
        return scores

    def train(self, steps):
        """Return the last scores, the optimizer's state and the weights."""
        for _ in range(steps):
            scores = self.estimate()
            self.optimizer.step()
        states = [x for state in self.optimizer.state.values() for x in state.values()]
        return [scores, *states, *(layer.weight.clone() for layer in self.network.layers)]


def int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def same_bits(first, second):
    return all(map(torch.equal, first, second))


# ---- arithmetic ----


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 7, 5), (128, 784, 256), (5, 1040, 10)])
def test_int8_products_equal_the_reference_implementation(sizes):
    rows, inner, columns = sizes
    x, y = int8(rows, inner), int8(columns, inner).T
    for matrix in (y, y.contiguous()):
        assert torch.equal(arithmetic.int_matmul(x, matrix), arithmetic.float_matmul(x, matrix))


def test_wide_products_are_exact_to_the_ends_of_their_range():
    most = arithmetic.WIDE_MAX
    x = torch.randint(-most, most + 1, (6, 50), dtype=torch.int32)
    x[0], x[1], y = most, -most, int8(50, 9)
    assert torch.equal(arithmetic.wide_matmul(x, y), (x.double() @ y.double()).int())


def test_divisions_and_shifts_round_to_nearest():
    x = torch.arange(-3000, 3000, dtype=torch.int32)
    for divisor in (1, 2, 28, 96, 256):
        nearest = torch.floor(x.double() / divisor + 0.5).int()
        assert torch.equal(arithmetic.rounded_division(x, divisor), nearest)
    assert torch.equal(arithmetic.rounded_shift(x, 8), nearest)


# ---- the network and its fitness ----


def real_logits(weights, x):
    """Compute the network's logits, in bits, in floating-point numbers, without any rounding."""
    for weight in weights[:-1]:
        x = x @ weight.T
        x = x * (x + 2).clamp(0, 4) / 4
    return x @ weights[-1].T


def test_the_mean_fitness_is_in_nats_or_a_fraction():
    run = Trainer()
    run.estimate()
    logits = run.network(run.inputs) * Int8MLP.nats_per_logit
    loss = F.cross_entropy(logits, run.labels).item()
    assert run.evolution.mean_fitness.item() == pytest.approx(-loss, rel=1e-3)
    right = (logits.argmax(-1) == run.labels).float().mean()
    for options in ({"fitness": Int8Accuracy()}, SMOOTHED_ACCURACY):
        run = Trainer(**options)
        run.estimate()
        assert run.evolution.mean_fitness == right


def test_the_integer_network_computes_what_its_float_form_does():
    run = Trainer()
    exact = real_logits([x.weight for x in run.floats.layers], run.inputs.float() / INT8_SCALE)
    error = run.network(run.inputs) / 2**FRACTION_BITS - exact
    assert exact.std() > 0.5 and error.abs().max() < 0.25 and error.std() < 0.08


def test_activations_saturate_and_never_wrap():
    far = torch.tensor([-(2**30), -1, 0, 1, 2**30], dtype=torch.int32)
    assert activation(far).tolist() == [0, 0, 0, 0, 127]


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_integer_log_likelihood_is_the_cross_entropy_in_bits(smoothing):
    most, labels = 9 << FRACTION_BITS, torch.randint(0, 10, (50,))
    logits = torch.randint(-most, most, (3, 50, 10), dtype=torch.int32)
    scores = Int8CrossEntropy(smoothing)(logits, labels)
    nats = (logits.double() * Int8MLP.nats_per_logit).flatten(0, 1)
    options = {"reduction": "none", "label_smoothing": smoothing}
    loss = F.cross_entropy(nats, labels.repeat(3), **options).view(3, 50)
    assert scores.dtype == torch.int32
    assert (scores * Int8CrossEntropy.unit + loss).abs().max() < 0.001


def test_integer_smoothing_points_where_that_of_floats_does():
    """Uniform noise in place of Gaussian: nearly the same direction, and the same size."""
    logits, labels, rng = torch.randn(12, 10), torch.randint(0, 10, (12,)), torch.Generator()
    integers = (logits / Int8MLP.nats_per_logit).round().int()
    tau = 127 / math.sqrt(3) * 2**7 * Int8MLP.nats_per_logit  # what a shift can make
    found, scores = Int8Smoothing(tau, 8_192).direction(Int8Accuracy(), integers, labels, rng)
    expected, right = Smoothing(tau, 8_192).direction(accuracy, logits, labels, rng)
    cosine = F.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0)
    size = found.float().norm() / (73 * 16) / expected.norm()
    assert cosine > 0.95 and 0.7 < size < 1.4
    certain = 40 * F.one_hot(labels, 10)  # no noise changes the answer: outputs decay alone
    integers = (certain / Int8MLP.nats_per_logit).int()
    found, _ = Int8Smoothing(tau, 64).direction(Int8Accuracy(), integers, labels, rng)
    expected, _ = Smoothing(tau, 64).direction(accuracy, certain.float(), labels, rng)
    assert found.sum() / (73 * 16) / expected.sum() == pytest.approx(1, abs=0.4)
    assert torch.equal(scores * Int8Accuracy.unit, right)


# ---- the estimator ----


@pytest.mark.parametrize(("sigma", "bits"), [(2**-6, -6), (2**-6 * 1.3, -6), (2**-6 * 1.5, -5)])
def test_the_size_of_a_perturbation_is_the_nearest_power_of_two(sigma, bits):
    x = torch.full((1, 4, 16), INT8_SCALE // 4, dtype=torch.int8)  # |x| is 1
    size = Int8NodePerturbation(24, sigma).size(x, Trainer().evolution.layers[0])
    assert size.item() == 2 ** (FRACTION_BITS + bits)


@pytest.mark.parametrize(
    ("network", "estimator", "cosine", "norm"),
    [
        (Int8MLP, ALL_ROWS, 0.98, 0.05),
        (Int8MLP, Int8NodePerturbation(24, 1 / 32, antithetic=True), 0.94, 0.1),
        (Repeated, ALL_ROWS, 0.94, 0.1),
    ],
)
def test_the_estimate_is_the_gradient_on_average(network, estimator, cosine, norm):
    run, total = Trainer(estimator, network=network), [0, 0, 0]
    for _ in range(60):
        run.estimate()
        total = [t + x.weight.ascent for t, x in zip(total, run.network.layers, strict=True)]
    weights = [(x.weight * x.scale).requires_grad_() for x in run.network.layers]
    x = run.inputs.float() / INT8_SCALE
    logits = real_logits(weights, x)
    if network is Repeated:
        logits = logits + real_logits(weights, x.flip(-1)) + real_logits(weights, x.roll(1, -1))
    (-F.cross_entropy(logits * math.log(2), run.labels) / math.log(2)).backward()
    for ascent, weight in zip(total, weights, strict=True):
        estimate = ascent / (60 * len(x) * INT8_SCALE * 2**DELTA_BITS)
        assert F.cosine_similarity(estimate.flatten(), weight.grad.flatten(), 0) > cosine
        assert estimate.norm() / weight.grad.norm() == pytest.approx(1, abs=norm)


@pytest.mark.parametrize(
    ("sizes", "examples"),
    [((21, 40, 7), 88), ((30, 200, 3), 96), ((784, 256, 10), 128), ((5, 530, 9), 5)],
)
@pytest.mark.parametrize(
    "options",
    [
        {"estimator": Int8NodePerturbation((32, 64, 3), sigma=2**-6)},
        {"estimator": Int8NodePerturbation((8, 40, 4), sigma=0.7, antithetic=True), "lr": 50.0},
        {"estimator": Int8NodePerturbation(24, units=512), **SMOOTHED_ACCURACY},
        {"estimator": Int8NodePerturbation(90, units=2), "fitness": Int8Accuracy()},
        {"estimator": Int8NodePerturbation(90, units=1), "fitness": Int8CrossEntropy(0.1)},
        {"fitness": Int8CrossEntropy(0.1), "network": Repeated},
    ],
)
def test_kernels_compute_the_same_bits_as_torch(sizes, examples, options, monkeypatch):
    first = Trainer(sizes=sizes, examples=examples, **options).train(3)
    assert kernels.library is not None
    monkeypatch.setattr(kernels, "library", None)
    assert same_bits(first, Trainer(sizes=sizes, examples=examples, **options).train(3))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other names of architectures")
@pytest.mark.parametrize("architecture", ["x86-64", "haswell"])
def test_kernels_compute_the_same_bits_on_older_processors(architecture, monkeypatch):
    options = [{"fitness": Int8CrossEntropy(0.1)}, {"fitness": Int8Accuracy()}, SMOOTHED_ACCURACY]
    first = [Trainer(**given).train(2) for given in options]
    flags = [f"-march={architecture}" if "march" in flag else flag for flag in compiled.FLAGS]
    monkeypatch.setattr(compiled, "FLAGS", flags)
    monkeypatch.delitem(vars(kernels), "library")
    assert all(
        same_bits(x, Trainer(**given).train(2)) for x, given in zip(first, options, strict=True)
    )
    assert kernels.library is not None


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"fitness": Int8Accuracy()}, True),
        (SMOOTHED_ACCURACY, True),
        ({"network": Repeated}, False),
        ({"estimator": Int8NodePerturbation(24, units=1)}, False),
    ],
)
def test_loops_score_the_members_that_they_cover(options, fused):
    run = Trainer(**options)
    run.estimate()
    assert isinstance(run.evolution._loops, Int8Loops) == fused


def test_no_bit_depends_on_threads_or_chunks(monkeypatch):
    first = Trainer().train(3)
    torch.set_num_threads(2)
    second = Trainer().train(3)
    torch.set_num_threads(1)
    monkeypatch.setitem(evolution.CHUNK, "cpu", 1)
    assert same_bits(first, second) and same_bits(first, Trainer().train(3))


def test_without_a_compiler_one_line_says_so(monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    monkeypatch.delitem(vars(kernels), "library")
    with pytest.warns(UserWarning, match="no C.. compiler: apt install g.*ten times as slowly"):
        slow = Trainer().train(1)
    with warnings.catch_warnings(action="error"):  # a second line
        Trainer().train(1)
    monkeypatch.undo()
    assert same_bits(slow, Trainer().train(1))


# ---- the update ----


@pytest.mark.parametrize("library", [kernels.library, None])
def test_error_feedback_loses_nothing_of_an_estimate(library, monkeypatch):
    monkeypatch.setattr(kernels, "library", library)
    weight = torch.zeros(300, dtype=torch.int8)
    memory, residual = torch.zeros(2, 300, dtype=torch.int32)
    direction = torch.randint(-(2**20), 2**20, (300,), dtype=torch.int32)
    for _ in range(50):
        follow(weight, direction, 0, 3000, memory, residual)
    exact = 50 * direction.double() * 3000 / 2**16 / 2**RESIDUAL_BITS
    assert (weight + residual / 2**RESIDUAL_BITS - exact).abs().max() < 50 / 2**RESIDUAL_BITS
    assert residual.abs().max() <= 2 ** (RESIDUAL_BITS - 1) and weight.abs().max() > 20


def test_steps_of_the_optimizer_are_those_of_sgd():
    run, ascents = Trainer(lr=0.5), []
    before = [layer.weight.clone() for layer in run.network.layers]
    for _ in range(2):
        run.train(1)
        ascents.append([layer.weight.ascent for layer in run.network.layers])
    for layer, weight, first, second in zip(run.network.layers, before, *ascents, strict=True):
        residual = run.optimizer.state[layer.weight]["residual"] / 2**RESIDUAL_BITS
        gradients = (first + (round(0.9 * 256) / 256 * first + second)) / 40
        expected = 0.5 * gradients / (INT8_SCALE * 2**DELTA_BITS) / layer.scale
        inside = layer.weight.abs() < 127
        assert ((layer.weight - weight.int() + residual - expected)[inside].abs() < 0.01).all()


@pytest.mark.parametrize("options", [{}, {"fitness": Int8Accuracy()}, SMOOTHED_ACCURACY])
def test_no_floating_tensor_takes_part_in_a_step(options, monkeypatch):
    monkeypatch.setattr(kernels, "library", None)
    monkeypatch.setattr(arithmetic, "FLOAT_IS_FASTER", False)
    run = Trainer(**options)
    run.evolution.inspect(run.inputs)
    before = [layer.weight.clone() for layer in run.network.layers]
    with NoFloats():
        *_, last = run.train(3)
    assert last.dtype == torch.int8
    assert not same_bits(before, [layer.weight for layer in run.network.layers])
    with pytest.raises(AssertionError, match="meets torch"), NoFloats():
        run.inputs.float()


@pytest.mark.parametrize("options", [{}, SMOOTHED_ACCURACY])
def test_fitness_rises(options):
    run, fitness = Trainer(**options), []
    for _ in range(40):
        run.train(1)
        fitness.append(run.evolution.mean_fitness.item())
    assert sum(fitness[-5:]) / 5 > sum(fitness[:5]) / 5 + 0.3


def test_a_resumed_run_continues_with_the_same_bits():
    run, resumed, saved = Trainer(), Trainer(), io.BytesIO()
    run.train(4)
    torch.save([x.state_dict() for x in (run.network, run.evolution, run.optimizer)], saved)
    states = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    for part, state in zip(("network", "evolution", "optimizer"), states, strict=True):
        getattr(resumed, part).load_state_dict(state)
    assert same_bits(run.train(4), resumed.train(4))


def test_a_bias_is_refused():
    with pytest.raises(ValueError, match="bias=False"):
        Int8MLP(MLP(bias=True))
