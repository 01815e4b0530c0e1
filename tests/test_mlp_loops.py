"""The C++ loops for MLPs: torch's scores to rounding, on what they cover and on nothing else."""

import subprocess
import sys
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll import (
    BlockLowRank,
    Evolution,
    FitnessError,
    LowRank,
    NodePerturbation,
    Smoothing,
    accuracy,
    compiled,
    cross_entropy,
)
from eggroll import evolution as evolution_module
from eggroll.blocks import Call, Draw, Layer
from eggroll.mlp_loops import (
    ACCURACY,
    CROSS_ENTROPY,
    GELU,
    LINEAR,
    LOOPS,
    RELU,
    SIGN,
    MlpLoops,
    Score,
)
from model import MLP

if LOOPS.library is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

INPUTS, CLASSES = 20, 10
ESTIMATORS = {
    "eggroll": BlockLowRank(60, sigma=0.05),
    "rank 2": BlockLowRank(60, sigma=0.05, rank=2, units=10),
    "node perturbation": NodePerturbation(60, sigma=0.05),
    "antithetic": NodePerturbation(60, sigma=0.05, units=8, antithetic=True),
}
FITNESSES = {
    "cross-entropy": (cross_entropy, None),
    "label smoothing": (partial(cross_entropy, label_smoothing=0.1), None),
    "temperature": (partial(cross_entropy, temperature=2.0), None),
    "smoothed accuracy": (accuracy, (2.0, 32)),
}


class Chain(nn.Module):
    """Linear layers with a function between them."""

    def __init__(self, *sizes, activation=F.gelu, bias=True):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias) for i, o in pairwise(sizes))
        self.activation = activation

    def forward(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)


def make(*hidden, activation=F.gelu, bias=True):
    torch.manual_seed(0)
    return Chain(INPUTS, *(hidden or (40, 37)), CLASSES, activation=activation, bias=bias)


def batch(examples=11):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(examples, INPUTS, generator=generator)
    return inputs, torch.randint(0, CLASSES, (examples,), generator=generator)


def trainer(network, fitness=cross_entropy, estimator="eggroll", smoothing=None, loops=True):
    """Return an Evolution that has inspected its network, with its loops or without."""
    estimator = ESTIMATORS.get(estimator, estimator)
    smoothing = Smoothing(*smoothing) if smoothing else None
    evolution = Evolution(network, fitness, estimator, seed=3, smoothing=smoothing)
    evolution.inspect(batch()[0])
    assert evolution._loops
    if not loops:
        evolution._loops = None
    return evolution


def scores(network, *args, examples=11, **options):
    """Return the scores by the loops and by torch."""
    return [
        trainer(network, *args, loops=loops, **options).evaluate(*batch(examples))
        for loops in (True, False)
    ]


def assert_equal_to_rounding(network, *args, **options):
    found, expected = scores(network, *args, **options)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    assert expected.std() > 1e-3


# ---- the same scores ----


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("fitness", FITNESSES)
def test_scores_are_torchs_for_every_estimator_and_fitness(estimator, fitness):
    fitness, smoothing = FITNESSES[fitness]
    assert_equal_to_rounding(make(), fitness, estimator, smoothing)


@pytest.mark.parametrize("examples", [128, 96, 88, 5, 1])
@pytest.mark.parametrize("hidden", [256, 40, 37])
def test_scores_are_torchs_for_every_batch_and_width(examples, hidden):
    for estimator in ("eggroll", "node perturbation"):
        assert_equal_to_rounding(make(hidden), estimator=estimator, examples=examples)


@pytest.mark.parametrize("units", [16, 10, 256, 1])
def test_scores_are_torchs_for_blocks_of_every_size(units):
    assert_equal_to_rounding(make(256, 37), estimator=BlockLowRank(300, 0.05, units=units))


@pytest.mark.parametrize("hidden", [(40,), (40, 37, 5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "activation",
    [F.gelu, nn.GELU(), F.relu, torch.relu, nn.ReLU(), nn.ReLU(inplace=True), torch.sign],
)
def test_scores_are_torchs_for_every_network(hidden, bias, activation):
    assert_equal_to_rounding(make(*hidden, activation=activation, bias=bias))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_accuracy_is_torchs_but_for_near_ties(estimator):
    found, expected = scores(make(), accuracy, estimator, examples=96)
    assert (found == expected).float().mean() > 0.99 and expected.std() > 0
    assert (found - expected).abs().max() <= 1


def test_scores_are_torchs_with_inputs_and_weights_that_are_not_contiguous():
    network, (inputs, labels) = make(), batch()
    network.layers[0].weight = nn.Parameter(network.layers[0].weight.detach().T.contiguous().T)
    for estimator in ESTIMATORS:
        found, expected = (
            trainer(network, estimator=estimator, loops=loops).evaluate(
                inputs.T.contiguous().T, labels
            )
            for loops in (True, False)
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_three_steps_of_training_end_in_the_same_weights(estimator):
    def weights(loops):
        network = make()
        evolution = trainer(network, estimator=estimator, loops=loops)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        for _ in range(3):
            evolution.backward(evolution.evaluate(*batch(96)))
            optimizer.step()
        return [parameter.detach() for parameter in network.parameters()]

    for found, expected, start in zip(
        weights(True), weights(False), make().parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert (found - start).abs().max() > 1e-4


# ---- the functions ----


def score_of_outputs(kind, target, outputs, *, activation=None, scale=1.0):
    """Return the loops' score, (B,), of outputs (B, C), or of C = 1 output that is activated."""
    classes = outputs.shape[1]
    count = 2 if activation else 1
    layers = [Layer(nn.Linear(classes, classes, bias=False)) for _ in range(count)]
    layers[-1].module.weight = nn.Parameter(torch.eye(classes), requires_grad=False)
    zeros = torch.zeros(1, *outputs.shape)
    loops = MlpLoops(layers, activation or GELU)
    loops.begin([Call(i, zeros, zeros) for i in range(len(layers))], Score(kind, target, scale))
    draw = Draw((0,), 0, directions=1, blocks=1, start=0, first_call=0, units=classes)
    return loops.scores(draw, outputs[None].contiguous())[0]


def activated(activation, x):
    return score_of_outputs(LINEAR, torch.ones(len(x), 1), x[:, None], activation=activation)


def test_gelu_is_exact_to_1e_6_of_outputs_up_to_30():
    x = torch.cat([torch.linspace(-30, 30, 50_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    assert (activated(GELU, x) - F.gelu(x.double())).abs().max() < 1e-6
    assert torch.equal(activated(RELU, x), F.relu(x))
    assert torch.equal(activated(SIGN, x), torch.sign(x))


def test_activations_hide_no_value_that_is_not_finite():
    values = torch.tensor([float("nan"), float("inf")])
    for activation in (GELU, RELU):
        torch.testing.assert_close(activated(activation, values), values, equal_nan=True)
    torch.testing.assert_close(activated(SIGN, values), values.sign(), equal_nan=True)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("spread", [0.01, 1, 30, 300])
def test_cross_entropy_is_exact_to_1e_6_of_its_size(spread, scale):
    outputs, labels = spread * (2 * torch.rand(5_000, 10) - 1), torch.randint(0, 10, (5_000,))
    target = F.one_hot(labels, 10).float()
    found = score_of_outputs(CROSS_ENTROPY, target, outputs, scale=scale)
    expected = cross_entropy(outputs[None].double(), labels, temperature=1 / scale)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_accuracy_takes_the_first_of_equal_outputs_as_torch_does():
    outputs, labels = torch.randint(0, 3, (500, 10)).float(), torch.randint(0, 10, (500,))
    found = score_of_outputs(ACCURACY, F.one_hot(labels, 10).float(), outputs)
    assert torch.equal(found, accuracy(outputs[None], labels)[0]) and found.any()


# ---- values that are not finite ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["inputs", "layer 0", "layer 1", "layer 2"])
@pytest.mark.parametrize("estimator", ["eggroll", "node perturbation"])
@pytest.mark.parametrize("fitness", ["cross-entropy", "smoothed accuracy"])
@pytest.mark.parametrize("activation", [F.gelu, F.relu])
def test_a_value_that_is_not_finite_ends_training(value, place, estimator, fitness, activation):
    network, (inputs, labels) = make(activation=activation), batch()
    fitness, smoothing = FITNESSES[fitness]
    evolution = trainer(network, fitness, estimator, smoothing)
    with torch.no_grad():
        changed = inputs if place == "inputs" else network.layers[int(place[-1])].weight
        changed[2, 3] = value
    with pytest.raises(FitnessError, match="not finite"):
        evolution.evaluate(inputs, labels)


# ---- the same bits ----


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_number_of_threads_changes_no_bit(estimator, restored_threads):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(trainer(make(), estimator=estimator).evaluate(*batch(96)))
    assert torch.equal(*found)


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_size_of_a_chunk_changes_no_bit_of_the_loops(estimator, monkeypatch):
    """Up to torch's product of inputs and noise, whose rounding depends on how many rows it has."""

    def evaluate():
        return trainer(make(), estimator=estimator).evaluate(*batch(96))

    exact, expected = "node" in estimator or estimator == "antithetic", evaluate()
    for numbers in (1, 96 * 40 * 2):
        monkeypatch.setitem(evolution_module.CHUNK, "cpu", numbers)
        found = evaluate()
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if exact else 1e-6)


def test_directions_together_and_one_by_one_have_the_same_bits():
    evolution = trainer(make())
    evolution.evaluate(*batch(96))
    for draw in evolution.draws:
        call = evolution.calls[draw.first_call]
        moved = call.y + 0.1 * torch.randn(draw.directions, *call.y.shape[1:])
        together = evolution._loops.scores(draw, moved)
        assert torch.equal(
            together, torch.cat([evolution._loops.scores(draw, m[None]) for m in moved])
        )


# ---- what the loops do not cover ----


class Changed(Chain):
    """A chain of two layers whose forward a test gives."""

    def __init__(self, forward):
        super().__init__(INPUTS, INPUTS, CLASSES)
        self.computes = forward

    def forward(self, x):
        return self.computes(x, *self.layers)


class Noted(nn.Linear):
    """A subclass, which may compute anything."""


def between(*modules):
    return nn.Sequential(nn.Linear(INPUTS, 12), *modules, nn.Linear(12, CLASSES))


def frozen():
    network = make()
    network.layers[1].requires_grad_(False)
    return network


def mixed(x, first, last):
    return last(F.gelu(first(F.relu(first(x)))))


def by_value(x, first, last):
    return last(F.gelu(first(x)) if x.sum() < 1e9 else first(x))


class ScaledInTraining(nn.Sequential):
    def forward(self, x):
        return (2 if self.training else 1) * super().forward(x)


NOT_COVERED = {
    "GELU by tanh": lambda: between(nn.GELU("tanh")),
    "gelu by tanh": lambda: make(activation=partial(F.gelu, approximate="tanh")),
    "tanh": lambda: make(activation=torch.tanh),
    "sigmoid": lambda: between(nn.Sigmoid()),
    "SiLU": lambda: between(nn.SiLU()),
    "relu6": lambda: make(activation=F.relu6),
    "ReLU6": lambda: between(nn.ReLU6()),
    "leaky ReLU": lambda: between(nn.LeakyReLU()),
    "nothing between": lambda: between(),
    "LayerNorm": lambda: between(nn.LayerNorm(12), nn.GELU()),
    "dropout": lambda: between(nn.GELU(), nn.Dropout(0.1)),
    "clamp": lambda: between(nn.GELU(), nn.Hardtanh()),
    "two activations": lambda: nn.Sequential(
        *between(nn.GELU()), nn.ReLU(), nn.Linear(CLASSES, CLASSES)
    ),
    "activation after the last": lambda: nn.Sequential(*between(nn.GELU()), nn.ReLU()),
    "called twice": lambda: Changed(mixed),
    "skip": lambda: Changed(lambda x, first, last: last(x + F.gelu(first(x)))),
    "scaled input of a layer": lambda: Changed(lambda x, first, last: last(2 * F.gelu(first(x)))),
    "scaled output": lambda: Changed(lambda x, first, last: 2 * last(F.gelu(first(x)))),
    "scaled in training": lambda: ScaledInTraining(*between(nn.GELU())),
    "control flow": lambda: Changed(by_value),
    "subclass": lambda: nn.Sequential(Noted(INPUTS, 12), nn.GELU(), nn.Linear(12, CLASSES)),
    "frozen layer": frozen,
}


def trains(network, fitness=cross_entropy, estimator="eggroll", data=None, smoothing=None):
    """Take a step; return whether the loops took it."""
    estimator = ESTIMATORS.get(estimator, estimator)
    evolution = Evolution(network, fitness, estimator, smoothing=smoothing)
    evolution.backward(evolution.evaluate(*(data or batch())))
    moved = [p.grad.abs().max() > 0 for p in network.parameters() if p.grad is not None]
    assert moved and all(moved)
    return evolution._loops is not None


@pytest.mark.filterwarnings("ignore:not evolved")
@pytest.mark.parametrize("network", NOT_COVERED)
def test_torch_scores_the_networks_that_the_loops_do_not_cover(network):
    torch.manual_seed(0)
    assert not trains(NOT_COVERED[network]())


HOOKS = {
    "layer": lambda network: network[0],
    "last layer": lambda network: network[2],
    "activation": lambda network: network[1],
    "network": lambda network: network,
}


@pytest.mark.parametrize("place", HOOKS)
def test_torch_scores_networks_with_hooks(place):
    network = between(nn.GELU())
    HOOKS[place](network).register_forward_hook(lambda module, inputs, output: 3 * output)
    assert not trains(network)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, first, last: last(F.gelu(input=first(x))),
        lambda x, first, last: last(input=F.gelu(first(x))),
    ],
)
def test_networks_that_call_with_keywords_train(forward):
    trains(Changed(forward))


@pytest.mark.parametrize("change", [torch.Tensor.byte, lambda labels: labels - 5])
def test_accuracy_takes_labels_that_compare_with_a_class(change):
    inputs, labels = batch()
    found = trainer(make(), accuracy).evaluate(inputs, change(labels))
    expected = trainer(make(), accuracy, loops=False).evaluate(inputs, change(labels))
    assert torch.equal(found, expected)


def test_torch_scores_float64_and_inputs_of_more_axes():
    inputs, labels = batch()
    assert not trains(make().double(), data=(inputs.double(), labels))
    several = (torch.stack([inputs, 2 * inputs], 1), labels[:, None].expand(-1, 2))

    def mean(outputs, labels):
        return cross_entropy(outputs, labels).mean(2)

    assert not trains(make(), mean, data=several)
    assert not trains(make(), mean, data=several, smoothing=Smoothing(2.0, 16))


def test_torch_scores_members_that_perturb_all_layers():
    assert not trains(make(), estimator=LowRank(32, sigma=0.05))


def test_torch_computes_a_users_fitness_and_the_loops_once_it_is_smoothed():
    def fitness(outputs, labels):
        return cross_entropy(outputs, labels) ** 3

    assert not trains(make(), fitness)
    assert trains(make(), fitness, smoothing=Smoothing(2.0, 16))


def test_the_loops_cover_the_experiments_network():
    assert trains(MLP(INPUTS, 32, CLASSES)) and trains(MLP(INPUTS, 32, CLASSES, bias=True))
    assert all(trains(MLP(INPUTS, 32, CLASSES, activation=name)) for name in ("relu", "sign"))
    assert not trains(MLP(INPUTS, 32, CLASSES, activation="step"))


# ---- the compiler ----


def test_without_a_compiler_one_line_says_so_and_torch_computes_the_scores(monkeypatch):
    expected = trainer(make()).evaluate(*batch())
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    monkeypatch.delitem(vars(LOOPS), "library")
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler: apt install g\+\+.*by torch") as seen:
        assert not trains(make())
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    with warnings.catch_warnings(action="error"):  # a second line
        evolution = Evolution(make(), cross_entropy, ESTIMATORS["eggroll"], seed=3)
        found = evolution.evaluate(*batch())
    assert evolution._loops is None
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


def test_a_compiler_that_fails_gives_its_message_in_one_line(monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('line 1:\\n  no such flag')\n")
    compiler.chmod(0o755)
    assert subprocess.run([compiler], capture_output=True).returncode == 1
    monkeypatch.setattr(compiled.shutil, "which", lambda _: str(compiler))
    monkeypatch.delitem(vars(LOOPS), "library")
    with pytest.warns(
        UserWarning, match=r"mlp_loops.cpp was not compiled \(line 1: no such flag\)"
    ):
        assert not trains(make())
