"""Training in integers: exact against plain twins, true to the gradient, and free of floats."""

import io
import json
import math

import pytest
import torch
from conftest import SAMPLE, run_script
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mnist_eggroll
from eggroll import MLP, PopulationError
from eggroll.integer import (
    IntegerEvolution,
    IntegerMLP,
    IntegerOptimizer,
    integer_accuracy,
    integer_log_likelihood,
)
from eggroll.integer.arithmetic import (
    WIDE_MOST,
    float_matmul,
    int_matmul,
    rounded_division,
    rounded_shift,
    wide_matmul,
)
from eggroll.integer.credit import CREDIT
from eggroll.integer.evolution import Drawn, shift_of
from eggroll.integer.network import FINE, ONE, activation
from eggroll.integer.noise import draw_integer_directions
from eggroll.integer.update import RESIDUAL, elected, whole_part
from lab import cli, data

INT8 = (*SAMPLE, "--dtype", "int8", "--hidden-dim", "32", "--population", "96", "--epochs", "2")


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


def small(population=600, groups=4, fitness=None, examples=40, **options):
    """A network of odd sizes with its trainer, and a batch."""
    network = IntegerMLP(MLP(21, 16, 5, seed=1))
    generator = torch.Generator().manual_seed(3)
    inputs = (ONE * torch.randn(examples, 21, generator=generator)).round().to(torch.int8)
    labels = torch.randint(0, 5, (examples,), generator=generator)
    fitness = fitness or integer_log_likelihood(classes=5)
    evolution = IntegerEvolution(network, fitness, population=population, groups=groups, **options)
    return network, evolution, inputs, labels


def twin_gradients(network, inputs, labels):
    """Of the mean log-likelihood in bits, for the same real numbers without any rounding."""
    weights = [(x.weight.float() * x.scale).requires_grad_() for x in network.layers]
    x = inputs.float() / ONE
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
def test_int8_products_are_those_of_the_plain_twin(rows, inner, columns):
    x, y = int8(rows, inner), int8(inner, columns, seed=1)
    assert int_matmul(x, y).dtype == torch.int32
    assert torch.equal(int_matmul(x, y), float_matmul(x, y))
    transposed = int8(columns, inner, seed=1).t()
    assert torch.equal(int_matmul(x, transposed), float_matmul(x, transposed))


def test_wide_products_are_exact_to_the_ends_of_their_range():
    x = torch.randint(-WIDE_MOST, WIDE_MOST + 1, (6, 50), dtype=torch.int32)
    x[0], x[1] = WIDE_MOST, -WIDE_MOST
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


def test_the_integer_network_computes_what_its_float_twin_does():
    network, _, inputs, _ = small()
    x = inputs.float() / ONE
    for layer in network.layers[:-1]:
        x = x @ (layer.weight * layer.scale).T
        x = x * (x + 2).clamp(0, 4) / 4
    exact = x @ (network.layers[-1].weight * network.layers[-1].scale).T
    error = network(inputs) / 2**FINE - exact
    assert exact.std() > 0.5 and error.abs().max() < 0.25 and error.std() < 0.08


def test_activations_saturate_and_never_wrap():
    far = torch.tensor([-(2**30), -1, 0, 1, 2**30], dtype=torch.int32)
    assert activation(far).tolist() == [0, 0, 0, 0, 127]


@pytest.mark.parametrize("temperature", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_integer_log_likelihood_is_the_cross_entropy_in_bits(temperature, smoothing):
    logits = torch.randint(-(9 << FINE), 9 << FINE, (3, 50, 10), dtype=torch.int32)
    labels = torch.randint(0, 10, (50,))
    scores = integer_log_likelihood(temperature, smoothing)(logits, labels)
    real = logits.double() / 2**FINE / temperature * math.log(2)
    loss = F.cross_entropy(
        real.flatten(0, 1), labels.repeat(3), reduction="none", label_smoothing=smoothing
    )
    assert scores.dtype == torch.int32
    error = scores.double() / 2**FINE + loss.view(3, 50) / math.log(2)
    assert error.abs().max() < 6 / 2**FINE


def test_a_temperature_that_is_no_shift_is_refused():
    with pytest.raises(ValueError, match="no power of two"):
        integer_log_likelihood(1.5)


# ---- perturbations and credit ----


def test_directions_are_signs_and_orthogonal():
    generator = torch.Generator().manual_seed(0)
    a = draw_integer_directions("orthogonal", 3, 12, 16, int8(1), generator)
    products = a.int() @ a.int().mT
    assert torch.equal(products, (16 * torch.eye(12)).int().expand(3, -1, -1))
    a = draw_integer_directions("rademacher", 3, 40, 16, int8(1), generator)
    assert a.dtype == torch.int8 and set(a.unique().tolist()) == {-1, 1}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_member_is_the_network_with_a_low_rank_matrix_added_to_one_layer(index):
    """For weights in steps of 2^-shift the sum W + sigma A B^T is itself an int8 matrix."""
    network, evolution, inputs, labels = small(groups=1, population=9, sigma=1 / 16)
    layer = network.layers[index]
    layer.divisor = ONE  # a weight's unit is then 1/256, and sigma 16 of them
    layer.weight.copy_(layer.weight // 2)  # room for the sum
    read, wrote = network.all_outputs(inputs)
    drawn = evolution.draw(index, 3, read[index])
    group = torch.zeros(len(labels), dtype=torch.int64)
    scores = evolution.evaluate(index, drawn, wrote[index], labels, group)
    before = layer.weight.clone()
    for m in range(3):
        layer.weight.copy_(before + 16 * torch.outer(drawn.a[0, m], drawn.b[m]))
        assert torch.equal(scores[m], evolution.fitness(network(inputs), labels))
    layer.weight.copy_(before)


def mean_estimate(steps, **options):
    network, evolution, inputs, labels = small(**options)
    totals = [0] * 3
    for _ in range(steps):
        evolution.estimate(inputs, labels)
        totals = [t + x.estimate.double() for t, x in zip(totals, network.layers, strict=True)]
    unit = steps * len(labels) * ONE * 2**CREDIT
    return [t / unit for t in totals], twin_gradients(network, inputs, labels)


def test_per_example_credit_is_the_gradient_on_average():
    estimates, gradients = mean_estimate(60, sigma=1 / 32)
    for estimate, gradient in zip(estimates, gradients, strict=True):
        estimate, gradient = estimate.flatten().float(), gradient.flatten()
        assert F.cosine_similarity(estimate, gradient, dim=0) > 0.9
        assert estimate @ gradient / gradient.square().sum() == pytest.approx(1, abs=0.15)


def test_votes_point_along_the_gradient():
    estimates, gradients = mean_estimate(40, credit="member", noise="rademacher", sigma=1 / 32)
    for estimate, gradient in zip(estimates, gradients, strict=True):
        cosine = F.cosine_similarity(estimate.flatten().float(), gradient.flatten(), dim=0)
        assert cosine > 0.6


def test_votes_are_the_sum_of_materialised_perturbations():
    network, evolution, inputs, labels = small(credit="member", noise="rademacher", population=24)
    read, wrote = network.all_outputs(inputs)
    baseline = evolution.fitness(wrote[-1], labels)
    expected = []
    for index, count in enumerate(evolution.members()):
        drawn = evolution.draw(index, count, read[index])
        group = torch.arange(len(labels)) % 4
        scores = evolution.evaluate(index, drawn, wrote[index], labels, group) - baseline
        total = torch.zeros(network.layers[index].weight.shape, dtype=torch.int64)
        for g in range(4):
            for m in range(count):
                sign = scores[m, g::4].sum().sign()
                total += sign * torch.outer(drawn.a[g, m], drawn.b[m]).long()
        expected.append(rounded_division(total * (len(labels) * ONE << CREDIT), 4 * count))
    evolution.estimate(inputs, labels)
    for layer, votes in zip(network.layers, expected, strict=True):
        assert torch.equal(layer.estimate, votes.int())


@pytest.mark.parametrize("credit", ["example", "member"])
def test_neither_chunks_nor_compilation_change_a_bit(credit):
    kinds = ({}, {"chunk_size": 7}, {"backend": "compile", "chunk_size": 20})
    results = []
    for kind in kinds:
        network, evolution, inputs, labels = small(credit=credit, population=300, **kind)
        fitness = evolution.estimate(inputs, labels)
        results.append([fitness, *(layer.estimate for layer in network.layers)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_noise_is_fresh_at_every_step_and_layer():
    evolution = small(population=36)[1]
    first = evolution.draw(1, 3, int8(40, 16))
    assert torch.equal(first.b, evolution.draw(1, 3, int8(40, 16)).b)
    other_layer = evolution.draw(2, 3, int8(40, 16))
    evolution.step = 1
    later = evolution.draw(1, 3, int8(40, 16))
    assert not torch.equal(first.b, later.b) and not torch.equal(first.b, other_layer.b)
    assert isinstance(later, Drawn)


# ---- the update ----


def test_nothing_of_an_estimate_is_lost_to_error_feedback():
    residual = torch.zeros(300, dtype=torch.int32)
    direction = torch.randint(-(2**20), 2**20, (300,), dtype=torch.int32)
    moved = torch.zeros(300, dtype=torch.int64)
    for _ in range(50):
        moved += whole_part(residual, direction, rate=3000)
    exact = 50 * direction.double() * 3000 / 2**16 / 2**RESIDUAL
    kept = moved + residual / 2**RESIDUAL
    assert (kept - exact).abs().max() < 50 / 2**RESIDUAL
    assert residual.abs().max() <= 2 ** (RESIDUAL - 1)


def test_votes_move_the_fraction_that_was_asked_for_and_never_a_weight_without_votes():
    votes = (torch.randn(400, 400) * 1000).int()
    votes[0] = 0
    step = elected(votes, 0.02)
    assert (step != 0).float().mean() == pytest.approx(0.02, rel=0.1)
    assert not step[0].any() and torch.equal(step, step.sign())
    assert step[step != 0].eq(votes.sign()[step != 0]).all()
    assert not elected(votes, 0.0).any()
    assert not elected(torch.zeros(4, 4, dtype=torch.int32), 0.5).any()


@pytest.mark.parametrize("update", ["error-feedback", "votes"])
@pytest.mark.parametrize("credit", ["example", "member"])
@pytest.mark.parametrize("fitness", [integer_accuracy, None])
def test_no_floating_tensor_takes_part_in_a_step(update, credit, fitness):
    network, evolution, inputs, labels = small(fitness=fitness, credit=credit, population=48)
    optimizer = IntegerOptimizer(network, lr=0.05, update=update)
    before = [layer.weight.clone() for layer in network.layers]
    with NoFloats():
        for _ in range(3):
            evolution.estimate(inputs, labels)
            optimizer.step(len(labels))
    assert any(not torch.equal(w, x.weight) for w, x in zip(before, network.layers, strict=True))
    assert all(layer.weight.dtype == torch.int8 for layer in network.layers)
    with pytest.raises(AssertionError, match="meets torch"), NoFloats():
        inputs.float()


@pytest.mark.parametrize("update", ["error-feedback", "votes"])
def test_fitness_rises(update):
    network, evolution, inputs, labels = small()
    optimizer = IntegerOptimizer(network, lr=0.05, update=update)
    fitness = []
    for _ in range(40):
        fitness.append(evolution.estimate(inputs, labels).item())
        optimizer.step(len(labels))
    assert sum(fitness[-5:]) > 0.7 * sum(fitness[:5])
    assert 0 < optimizer.weights_moved() < 0.6


def test_a_saved_state_goes_on_with_the_same_bits():
    """Residuals and momentum are part of it, and stay int32."""

    def trainer():
        network, evolution, *batch = small()
        optimizer = IntegerOptimizer(network, lr=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=8)
        return network, optimizer, schedule, evolution, batch

    def train(parts, steps):
        _, optimizer, schedule, evolution, batch = parts
        for _ in range(steps):
            evolution.estimate(*batch)
            optimizer.step(len(batch[1]))
            schedule.step()

    whole, stopped, resumed = trainer(), trainer(), trainer()
    train(whole, 8)
    train(stopped, 3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in stopped[:3]], file)
    file.seek(0)
    for part, state in zip(resumed[:3], torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    resumed[3].step = 3
    train(resumed, 5)
    for own, other in zip(whole[0].layers, resumed[0].layers, strict=True):
        assert torch.equal(own.weight, other.weight)
        states = whole[1].state[own.weight], resumed[1].state[other.weight]
        assert states[1]["residual"].dtype == torch.int32 and states[1]["residual"].any()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_integers_cannot_do_is_said():
    with pytest.raises(PopulationError, match=r"try 0\.00390625"):
        shift_of(0.004)
    with pytest.raises(PopulationError, match="cannot be shared evenly"):
        small(population=10)
    with pytest.raises(PopulationError, match="not for integers"):
        small(noise="gaussian")
    with pytest.raises(ValueError, match="fraction of weights"):
        IntegerOptimizer(small()[0], lr=1.0, update="votes")


# ---- the script ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dtype int8 --bias", "--bias is not for --dtype int8 .leave it out"),
        ("--dtype int8 --optimizer adam", "--optimizer sgd"),
        ("--dtype int8 --preset tools", "--preset auto"),
        ("--dtype int8 --sigma 0.004", r"try 0\.00390625"),
        ("--dtype int8 --sampling whitened", "--sampling rademacher"),
        ("--dtype int8 --temperature 1.5", "no power of two"),
        ("--dtype int8 --shaping z-score", "--shaping none"),
        ("--dtype int8 --update votes --lr 1", "fraction of weights"),
        ("--update votes", "add --dtype int8"),
        ("--sampling rademacher", "'rademacher' is not known"),
    ],
)
def test_flags_that_integers_do_not_know_are_refused(flags, message):
    config = cli.parse(mnist_eggroll.Config, "", flags.split())
    with pytest.raises(PopulationError, match=message):
        mnist_eggroll.resolve(config, torch.device("cpu"))


def test_images_are_quantised_once_and_exactly():
    images = torch.arange(256, dtype=torch.uint8).expand(3, 256).clone()
    split = data.Split(images, torch.zeros(3))
    floats = data.Dataset("x", split, split[:0], split[:0], 0.13, 0.31)
    exact = (ONE * floats.scale(images)).round().to(torch.int8)
    integers = data.quantised(floats, ONE)
    assert torch.equal(integers.scale(integers.train.images), exact)


@pytest.mark.parametrize(
    ("estimator", "flags"),
    [("per-example", []), ("population", ["--population", "384", "--lr", "0.2"])],
)
def test_an_int8_run_trains_exports_a_quarter_and_is_evaluated_again(estimator, flags, tmp_path):
    out = tmp_path / "run"
    done = run_script("mnist_eggroll.py", *INT8, "--estimator", estimator, *flags, "--out-dir", out)
    assert done.returncode == 0, done.stderr
    assert f"preset {estimator}-int8" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary["method"].endswith("int8") and summary["test_accuracy"] > 0.2
    weights = load_file(out / "model.safetensors")
    assert weights["layers.0.weight"].dtype == torch.int8
    assert weights["layers.0.scale"].item() == pytest.approx(1 / (16 * 28))
    size = sum(w.numel() for name, w in weights.items() if name.endswith("weight"))
    assert (out / "model.safetensors").stat().st_size < 4 * size / 3.5
    last = (out / "metrics.csv").read_text().splitlines()
    row = dict(zip(last[0].split(","), last[-1].split(","), strict=True))
    assert 0 < float(row["weights_moved"]) < 1 and 0 <= float(row["saturated_weights"]) < 1
    assert 0 <= float(row["saturated_activations"]) < 1
    if estimator == "per-example":
        again = run_script("evaluate.py", out)
        assert f"test accuracy {summary['test_accuracy']:.2%}" in again.stdout, again.stderr
