"""Training in integers: exact products, true to the gradient, and no floats."""

import io
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eggroll import MLP, Evolution, ExampleMembers, accuracy, smoothed
from eggroll.int8 import (
    FRACTION_BITS,
    INT8_SCALE,
    Int8Accuracy,
    Int8CrossEntropy,
    Int8MLP,
    Int8SGD,
    Int8SmoothedAccuracy,
    arithmetic,
    kernels,
)
from eggroll.int8.arithmetic import (
    WIDE_MAX,
    float_matmul,
    int_matmul,
    rounded_division,
    rounded_shift,
    wide_matmul,
)
from eggroll.int8.gradient import DELTA_BITS, perturbation_size
from eggroll.int8.network import activation
from eggroll.int8.optimizer import RESIDUAL_BITS, top_signs, whole_part


class NoFloats(TorchDispatchMode):
    """Fails on any operation that reads or writes a floating tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                assert not leaf.is_floating_point(), f"{func} meets {leaf.dtype}"
        return result


def int8(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


def small(members=None, fitness=None, examples=40, **options):
    """A network of odd sizes with its trainer, and a batch."""
    network = Int8MLP(MLP(21, 16, 5, seed=1))
    generator = torch.Generator().manual_seed(3)
    inputs = (INT8_SCALE * torch.randn(examples, 21, generator=generator)).round().to(torch.int8)
    labels = torch.randint(0, 5, (examples,), generator=generator)
    fitness = fitness or Int8CrossEntropy(classes=5)
    members = members or ExampleMembers(1000, sigma=2**-6)
    return network, Evolution(network, fitness, members, **options), inputs, labels


def reference_gradients(network, inputs, labels):
    """Of the mean log-likelihood in bits, for the same real numbers without any rounding."""
    weights = [(x.weight.float() * x.scale).requires_grad_() for x in network.layers]
    x = inputs.float() / INT8_SCALE
    for weight in weights[:-1]:
        x = x @ weight.T
        x = x * (x + 2).clamp(0, 4) / 4
    logits = x @ weights[-1].T * math.log(2)
    (-F.cross_entropy(logits, labels) / math.log(2)).backward()
    return [weight.grad for weight in weights]


# ---- arithmetic ----


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(1, 1, 1), (3, 7, 5), (17, 8, 10), (128, 784, 256), (5, 1040, 3)]
)
def test_int8_products_are_those_of_the_reference_implementation(rows, inner, columns):
    x, y = int8(rows, inner), int8(inner, columns, seed=1)
    assert int_matmul(x, y).dtype == torch.int32
    assert torch.equal(int_matmul(x, y), float_matmul(x, y))
    transposed = int8(columns, inner, seed=1).t()
    assert torch.equal(int_matmul(x, transposed), float_matmul(x, transposed))


def test_wide_products_are_exact_to_the_ends_of_their_range():
    x = torch.randint(-WIDE_MAX, WIDE_MAX + 1, (6, 50), dtype=torch.int32)
    x[0], x[1] = WIDE_MAX, -WIDE_MAX
    y = int8(50, 9)
    assert torch.equal(wide_matmul(x, y), (x.double() @ y.double()).int())


@pytest.mark.parametrize("divisor", [1, 2, 28, 96, 256])
def test_division_rounds_to_nearest(divisor):
    x = torch.arange(-3000, 3000, dtype=torch.int32)
    nearest = torch.floor(x.double() / divisor + 0.5).int()
    assert torch.equal(rounded_division(x, divisor), nearest)
    assert torch.equal(rounded_division(x, torch.tensor(divisor)), nearest)


def test_shifts_do_not_lean_to_one_side():
    x = torch.arange(-4096, 4096, dtype=torch.int32)
    assert abs((rounded_shift(x, 8) - x / 256).mean()) < 0.01
    assert abs(((x >> 8) - x / 256).mean()) > 0.4  # what a bare shift does


# ---- the network and its fitness ----


def test_the_integer_network_computes_what_its_float_form_does():
    network, _, inputs, _ = small()
    x = inputs.float() / INT8_SCALE
    for layer in network.layers[:-1]:
        x = x @ (layer.weight * layer.scale).T
        x = x * (x + 2).clamp(0, 4) / 4
    exact = x @ (network.layers[-1].weight * network.layers[-1].scale).T
    error = network(inputs) / 2**FRACTION_BITS - exact
    assert exact.std() > 0.5 and error.abs().max() < 0.25 and error.std() < 0.08


def test_activations_saturate_and_never_wrap():
    far = torch.tensor([-(2**30), -1, 0, 1, 2**30], dtype=torch.int32)
    assert activation(far).tolist() == [0, 0, 0, 0, 127]


@pytest.mark.parametrize("temperature", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_integer_log_likelihood_is_the_cross_entropy_in_bits(temperature, smoothing):
    most = 9 << FRACTION_BITS
    logits = torch.randint(-most, most, (3, 50, 10), dtype=torch.int32)
    labels = torch.randint(0, 10, (50,))
    scores = Int8CrossEntropy(temperature, smoothing)(logits, labels)
    real = logits.double() / 2**FRACTION_BITS / temperature * math.log(2)
    loss = F.cross_entropy(
        real.flatten(0, 1), labels.repeat(3), reduction="none", label_smoothing=smoothing
    )
    assert scores.dtype == torch.int32
    error = scores.double() / 2**FRACTION_BITS + loss.view(3, 50) / math.log(2)
    assert error.abs().max() < 6 / 2**FRACTION_BITS


def test_integer_smoothing_points_where_that_of_floats_does():
    """Uniform noise in place of Gaussian: nearly the same direction, and the same size."""
    logits, labels = torch.randn(12, 10), torch.randint(0, 10, (12,))
    whole = (logits / Int8MLP.nats_per_logit).round().int()
    tau = 127 / math.sqrt(3) * 2**7 * Int8MLP.nats_per_logit  # what a shift can make
    (_, found), hits = Int8SmoothedAccuracy(tau, 8_192).prepare(whole, labels, torch.Generator())
    (_, expected), right = smoothed(accuracy, tau, 8_192).prepare(logits, labels, torch.Generator())
    cosine = F.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0)
    size = found.float().norm() / (73 * 16) / expected.norm()
    assert cosine > 0.95 and 0.7 < size < 1.4
    assert torch.equal(hits >> FRACTION_BITS, right.int())


def test_a_temperature_that_is_no_shift_is_refused():
    with pytest.raises(ValueError, match="no power of two"):
        Int8CrossEntropy(1.5)


# ---- members ----


@pytest.mark.parametrize(("sigma", "bits"), [(2**-6, -6), (2**-6 * 1.3, -6), (2**-6 * 1.5, -5)])
def test_the_size_of_a_perturbation_is_the_nearest_power_of_two(sigma, bits):
    x = torch.full((4, 16), INT8_SCALE // 4, dtype=torch.int8)  # |x| is 1
    assert perturbation_size(x, sigma).item() == 2 ** (FRACTION_BITS + bits)


def mean_estimate(steps, members):
    """Each layer's mean ascent direction, as the gradient of the mean fitness in bits."""
    network, evolution, inputs, labels = small(members)
    totals = [torch.zeros(layer.weight.shape, dtype=torch.float64) for layer in network.layers]
    for _ in range(steps):
        evolution.backward(evolution.evaluate(inputs, labels))
        for total, layer in zip(totals, network.layers, strict=True):
            assert layer.weight.ascent.dtype == torch.int32
            total += layer.weight.ascent
    unit = steps * len(labels) * INT8_SCALE * 2**DELTA_BITS
    return [
        ((t / unit).float().flatten(), true.flatten())
        for t, true in zip(totals, reference_gradients(network, inputs, labels), strict=True)
    ]


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_estimate_is_the_gradient_on_average(antithetic):
    for estimate, true in mean_estimate(60, ExampleMembers(24, 1 / 32, antithetic=antithetic)):
        assert F.cosine_similarity(estimate, true, 0) > 0.9
        assert estimate @ true / true.square().sum() == pytest.approx(1, abs=0.15)


def test_one_vote_per_member_points_along_the_gradient():
    """Each example has the same weight in it, however much its fitness changed."""
    for estimate, true in mean_estimate(40, ExampleMembers(1000, 1 / 32, shaping="sign")):
        assert F.cosine_similarity(estimate, true, 0) > 0.5


@pytest.mark.parametrize("options", [{"chunk_size": 64}, {"backend": "compile"}])
def test_neither_chunks_nor_compilation_change_a_bit(options, monkeypatch):
    members = ExampleMembers((16, 16, 8), sigma=2**-6)
    found = []
    for own in ({}, options):
        monkeypatch.setattr(kernels, "_library", None)
        network, evolution, inputs, labels = small(members, **own)
        scores = evolution.evaluate(inputs, labels)
        evolution.backward(scores)
        found.append([scores, *(layer.weight.ascent for layer in network.layers)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("sizes", [(21, 40, 7), (30, 700, 3), (784, 256, 10)])
@pytest.mark.parametrize(
    "members",
    [
        ExampleMembers((9, 20, 3), sigma=2**-6),
        ExampleMembers((2, 40, 4), sigma=0.7, antithetic=True, shaping="sign"),
    ],
)
def test_the_kernels_compute_the_same_bits_as_torch(sizes, members, monkeypatch):
    """Scores, ascent directions, and what the optimizer makes of them."""
    inputs, labels = int8(33, sizes[0]), torch.randint(0, sizes[2], (33,))
    found = []
    for backend in ("eager", "compile"):
        monkeypatch.setattr(kernels, "_library", None)
        network = Int8MLP(MLP(*sizes, seed=1))
        fitness = Int8CrossEntropy(2, 0.1, classes=sizes[2])
        evolution = Evolution(network, fitness, members, backend=backend)
        optimizer = Int8SGD(network, lr=0.3, examples=33)
        for _ in range(3):
            scores = evolution.evaluate(inputs, labels)
            evolution.backward(scores)
            optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        found.append([scores, *states, *(layer.weight for layer in network.layers)])
        assert (kernels._library is not None) == (backend == "compile")
    assert all(map(torch.equal, *found))


def test_a_rate_that_needs_more_bits_is_followed_too(monkeypatch):
    found = []
    for backend in ("eager", "compile"):
        monkeypatch.setattr(kernels, "_library", None)
        network, evolution, inputs, labels = small(backend=backend)
        optimizer = Int8SGD(network, lr=50.0, examples=4)
        evolution.backward(evolution.evaluate(inputs, labels))
        optimizer.step()
        found.append([layer.weight.clone() for layer in network.layers])
    assert all(map(torch.equal, *found))


# ---- the update ----


def test_nothing_of_an_estimate_is_lost_to_error_feedback():
    residual = torch.zeros(300, dtype=torch.int32)
    direction = torch.randint(-(2**20), 2**20, (300,), dtype=torch.int32)
    moved = torch.zeros(300, dtype=torch.int64)
    for _ in range(50):
        moved += whole_part(residual, direction, rate=3000)
    exact = 50 * direction.double() * 3000 / 2**16 / 2**RESIDUAL_BITS
    kept = moved + residual / 2**RESIDUAL_BITS
    assert (kept - exact).abs().max() < 50 / 2**RESIDUAL_BITS
    assert residual.abs().max() <= 2 ** (RESIDUAL_BITS - 1)


def test_votes_update_the_fraction_that_was_asked_for_and_never_a_weight_without_votes():
    votes = (torch.randn(400, 400) * 1000).int()
    votes[0] = 0
    step = top_signs(votes, 0.02)
    assert (step != 0).float().mean() == pytest.approx(0.02, rel=0.1)
    assert not step[0].any() and torch.equal(step, step.sign())
    assert step[step != 0].eq(votes.sign()[step != 0]).all()
    assert not top_signs(votes, 0.0).any()
    assert not top_signs(torch.zeros(4, 4, dtype=torch.int32), 0.5).any()


@pytest.mark.parametrize("update", ["error-feedback", "votes"])
@pytest.mark.parametrize("shaping", ["none", "sign"])
@pytest.mark.parametrize("fitness", [Int8Accuracy(), Int8SmoothedAccuracy(2.0, 64), None])
def test_no_floating_tensor_takes_part_in_a_step(update, shaping, fitness, monkeypatch):
    monkeypatch.setattr(arithmetic, "FLOAT_IS_FASTER", False)
    members = ExampleMembers(24, sigma=2**-4, shaping=shaping)
    network, evolution, inputs, labels = small(members, fitness)
    optimizer = Int8SGD(network, lr=0.05, update=update, examples=len(labels))
    before = [layer.weight.clone() for layer in network.layers]
    with NoFloats():
        for _ in range(3):
            scores = evolution.evaluate(inputs, labels)
            evolution.backward(scores)
            optimizer.step()
    assert any(not torch.equal(w, x.weight) for w, x in zip(before, network.layers, strict=True))
    assert all(layer.weight.dtype == torch.int8 for layer in network.layers)
    with pytest.raises(AssertionError, match="meets torch"), NoFloats():
        inputs.float()


@pytest.mark.parametrize("update", ["error-feedback", "votes"])
def test_fitness_rises(update):
    network, evolution, inputs, labels = small()
    optimizer = Int8SGD(network, lr=0.05, update=update, examples=len(labels))
    fitness = []
    for _ in range(40):
        evolution.backward(evolution.evaluate(inputs, labels))
        fitness.append(evolution.mean_fitness.item())
        optimizer.step()
    assert sum(fitness[-5:]) > 0.7 * sum(fitness[:5])
    assert 0 < optimizer.statistics()["weights_updated"] < 0.6
    assert optimizer.statistics()["weights_updated"] == 0  # counts anew


def test_a_saved_state_goes_on_with_the_same_bits():
    """Residuals and momentum are part of it, and stay int32."""

    def steps(network, evolution, optimizer, inputs, labels, count):
        for _ in range(count):
            evolution.backward(evolution.evaluate(inputs, labels))
            optimizer.step()
        return [layer.weight.clone() for layer in network.layers]

    network, evolution, inputs, labels = small()
    optimizer = Int8SGD(network, lr=0.05, examples=len(labels))
    steps(network, evolution, optimizer, inputs, labels, 4)
    saved = io.BytesIO()
    parts = (network, evolution, optimizer)
    torch.save([part.state_dict() for part in parts], saved)
    whole = steps(*parts, inputs, labels, 4)
    network, evolution, inputs, labels = small()
    optimizer = Int8SGD(network, lr=0.05, examples=len(labels))
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    for part, state in zip((network, evolution, optimizer), states, strict=True):
        part.load_state_dict(state)
    assert all(s["residual"].dtype == torch.int32 for s in optimizer.state.values())
    resumed = steps(network, evolution, optimizer, inputs, labels, 4)
    assert all(map(torch.equal, whole, resumed))


def test_what_integers_cannot_do_is_said():
    with pytest.raises(ValueError, match="no bias"):
        Int8MLP(MLP(bias=True))
    with pytest.raises(ValueError, match="try error-feedback or votes"):
        Int8SGD(Int8MLP(MLP()), lr=0.1, update="rounding")
    with pytest.raises(ValueError, match="below 1"):
        Int8SGD(Int8MLP(MLP()), lr=1.0, update="votes")
