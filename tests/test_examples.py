"""Each example runs in seconds, and does what its docstring says."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT, call, run_command
from torch.nn import functional as F

from eggroll import accuracy
from examples.spiking import SpikingMLP, spikes
from experiment.fitness_file import load_fitness

EXAMPLES = ROOT / "examples"
FITNESSES = [p.name for p in EXAMPLES.glob("*.py") if "--fitness" in p.read_text()]


def commands_in(example):
    """Return the commands of an example's docstring, as words after `python`."""
    text = (EXAMPLES / example).read_text()
    return [line.partition("  #")[0].split() for line in re.findall(r"^python (.*)$", text, re.M)]


def load(example, function):
    return load_fitness(f"{EXAMPLES / example}:{function}")


def one_hot(answers, classes=10):
    """Return outputs (P, B, classes) whose argmax is `answers` (P, B)."""
    return torch.eye(classes)[torch.tensor(answers)]


def test_every_example_has_a_command_that_is_tested():
    assert len(FITNESSES) == 5
    assert all(commands_in(path.name) for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("example", FITNESSES)
def test_a_fitness_trains_by_its_command(example, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *flags = commands_in(example)[0]
    epochs = 30 if example == "sum_of_a_row.py" else 2  # one bit for four images says little
    small = f"--dataset mnist-sample --population 64 --hidden-dim 32 --epochs {epochs}".split()
    done = call(script, *flags, *small, "--out-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["method"] == "node-perturbation" and summary["test_accuracy"] > 0.25


def test_the_command_that_evaluates_a_run_by_a_fitness(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    small = ("--dataset", "mnist-sample", "--hidden-dim", "8", "--epochs", "1", "--out-dir", run)
    assert call("mnist_backprop.py", *small).returncode == 0
    script, _, *flags = commands_in("costly_confusion.py")[1]
    done = call(script, run, *flags)
    assert done.returncode == 0 and "minus_cost" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("example", "least", "flags"),
    [
        ("own_network.py", 87.0, ()),
        ("binary_weights.py", 89.0, ()),
        ("spiking.py", 60.0, ("--epochs", "1")),
    ],
)
def test_a_network_learns_in_seconds(example, least, flags):
    done = run_command(sys.executable, *commands_in(example)[0], *flags)
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"accuracy ([\d.]+)%", done.stdout)[-1]) > least
    warned = re.findall(r"Warning: (.*)", done.stderr)
    embedding = ["not evolved, since no nn.Linear uses them: ink.weight"]
    assert warned == (embedding if example == "own_network.py" else [])


def test_a_unit_spikes_where_its_leaky_potential_reaches_1_which_is_then_subtracted():
    currents = torch.tensor([[0.4, 0.0, 2.0], [0.4, 1.0, 0.0], [0.4, 0.0, -1.0], [0.4, 0.0, 0.9]])
    # unit 0: 0.4, 0.76, 1.084 - 1, 0.4756; unit 2: 2 - 1, 0.9, -0.19, 0.729
    expected = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(spikes(currents), expected)


def test_backprop_trains_the_last_of_the_spiking_layers_alone():
    network, calls = SpikingMLP(hidden_dim=16), []
    for layer in network.layers:
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    F.cross_entropy(network(torch.randn(5, 784)), torch.arange(5)).backward()
    first, second, last = network.layers
    assert calls == [first, second, last]  # each once, for all time steps
    assert first.weight.grad is None and second.weight.grad is None
    assert last.weight.grad.abs().sum() > 0


def test_binary_weights_take_the_flags_of_the_scripts(mnist_dir):
    command = (sys.executable, "-m", "examples.binary_weights", "--epochs")
    flags = ("--dataset", "mnist", "--data-dir", mnist_dir, "--seed", "1", "--train-on-all")
    done = run_command(*command, "1", *flags)
    assert done.returncode == 2 and "--batch-size must be <= 80" in done.stderr  # of the fixture
    done = run_command(*command, "0")
    assert done.returncode == 2 and "--epochs must be >= 1, got 0" in done.stderr


def test_macro_f1_is_the_mean_of_the_classes_f1():
    outputs = one_hot([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], classes=3)
    # class 0: 2 of 2 and 2 of 3; class 1: 1 of 2 and 1 of 1; class 2 is neither answered nor there
    expected = torch.tensor([(4 / 5 + 2 / 3) / 3, (6 / 7) / 3, 2 / 3])
    found = load("macro_f1.py", "macro_f1")(outputs, torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(found, expected)


def test_a_4_for_a_9_costs_as_much_as_fifty_other_mistakes():
    minus_cost = load("costly_confusion.py", "minus_cost")
    costs = minus_cost(one_hot([[4, 9, 3, 4]]), torch.tensor([9, 4, 3, 1]))
    assert costs.tolist() == [[-50, -1, 0, -1]]


def test_even_digits_alone_count():
    scores = load("even_digits.py", "even_hits")(
        one_hot([[4, 9, 3, 0]]), torch.tensor([4, 9, 4, 0])
    )
    assert scores.tolist() == [[1, 0, 0, 1]]


def test_a_row_is_right_where_its_sum_is():
    outputs = one_hot([[1, 2, 3, 4, 9, 9], [4, 3, 2, 1, 9, 8], [1, 2, 3, 5, 8, 9]])
    labels = torch.tensor([1, 2, 3, 4, 9, 8])  # a row of four and one of two
    expected = [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert load("sum_of_a_row.py", "sum_is_right")(outputs, labels).tolist() == expected


@pytest.mark.parametrize("members", [1, 3, 600])
def test_the_external_program_scores_any_number_of_members(members):
    logits, labels = torch.randn(members, 30, 10), torch.randint(0, 10, (30,))
    scores = load("external_program.py", "verdict")(logits, labels)
    torch.testing.assert_close(scores, accuracy(logits, labels).mean(1), rtol=0, atol=1e-4)
