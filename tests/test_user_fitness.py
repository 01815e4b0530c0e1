"""A fitness of the user's own: its faults are blamed on its line; the examples do as they say."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SAMPLE, call, run_command, run_script

import mnist_eggroll
from eggroll import BatchMembers, Evolution, ExampleMembers, accuracy
from lab.errors import UserError
from lab.user_fitness import UserFitness, load, warm_up

FUNCTIONS = """\
import torch

def hits(logits, labels):
    return (logits.argmax(-1) == labels).float()

def per_member(logits, labels):
    return hits(logits, labels).mean(1)

def wrong_shape(logits, labels):
    return logits

def no_tensor(logits, labels):
    return [0.0] * len(logits)

def not_finite(logits, labels):
    return torch.log(-hits(logits, labels))

def raises(logits, labels):
    return helper(logits)

def helper(logits):
    raise KeyError("nothing here")

def constant(logits, labels):
    return torch.ones(logits.shape[:2])

def counts(logits, labels):
    return (logits.argmax(-1) == labels).sum(1)

five = 5
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(FUNCTIONS)
    return path


def try_out(file, name):
    return UserFitness(file, name).try_out(8, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("wrong_shape", "def wrong_shape", r"shape \(4, 8, 10\).*return shape \(4, 8\) or \(4,\)"),
        ("no_tensor", "def no_tensor", "returned a list"),
        ("not_finite", "def not_finite", "4 of 4 members that are not finite"),
        ("raises", 'in helper: `raise KeyError("nothing here")`', "KeyError"),
    ],
)
def test_what_a_function_does_wrong_is_blamed_on_its_own_line(file, name, line, message):
    with pytest.raises(UserError, match=message) as caught:
        try_out(file, name)
    number = FUNCTIONS.split(line)[0].count("\n") + 1 if line.startswith("def") else 22
    assert f"{file}:{number}, in " in str(caught.value) and line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_score_of_the_whole_batch_is_known_as_one_and_smoothed_or_refused(file, tmp_path):
    assert not try_out(file, "hits") and try_out(file, "per_member")
    flags = (*SAMPLE, "--fitness", f"{file}:per_member", "--print-config")
    settings = json.loads(call("mnist_eggroll.py", *flags).stdout)["flags"]
    assert (settings["smoothing"], settings["smoothing_samples"]) == (2.0, 1024)
    done = call("mnist_eggroll.py", *flags, "--smoothing", "0")
    assert done.returncode == 2 and "leave out --smoothing 0, or add --members" in done.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("{file}:five", "has no function five \\(there is hits, per_member"),
        ("{file}", "own.py is a file without a function"),
        ("{file}:", "names no file or no function"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("acuracy", "--fitness acuracy is not known"),
    ],
)
def test_a_flag_that_names_no_function_says_what_to_type(file, flag, message):
    with pytest.raises(UserError, match=message):
        load(flag.format(file=file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(x, y):\n    return (x\n", "own.py:2: `return \\(x`: SyntaxError"),
        ("import nowhere_to_be_found\n", "own.py:1, in <module>.*ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
    ],
)
def test_a_file_that_does_not_run_is_blamed_on_its_own_line(file, text, message):
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        UserFitness(file, "f")


def test_members_that_tie_in_every_population_are_a_constant_fitness(file, small_network, batch):
    def warmed_up(name):
        evolution = Evolution(small_network, UserFitness(file, name), BatchMembers(8, sigma=0.5))
        warm_up(evolution, *batch)
        return evolution

    assert warmed_up("hits").step == 0
    with pytest.raises(UserError, match=r"own.py:24, in constant.*is constant"):
        warmed_up("constant")


def gradients(network, members, fitness, batch, **options):
    evolution = Evolution(network, fitness, members, **options)
    evolution.backward(evolution.evaluate(*batch))
    return torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("perturb", ["all", "one"])
def test_a_score_of_the_whole_batch_is_as_good_as_the_mean_over_examples(
    file, small_network, batch, perturb
):
    members = BatchMembers(48, sigma=0.5, shaping="none", perturb=perturb)
    found = [
        gradients(small_network, members, fitness, batch)
        for fitness in (accuracy, UserFitness(file, "per_member"))
    ]
    torch.testing.assert_close(*found)
    assert found[0].any()


@pytest.mark.parametrize("members", [BatchMembers(48, sigma=0.5), ExampleMembers(12, sigma=0.5)])
def test_compiled_members_are_scored_by_a_function_that_no_compiler_could_follow(
    members, small_network, batch
):
    def asks_a_program(outputs, labels):
        answers = str(outputs.argmax(-1).tolist())
        said = subprocess.run(["cat"], input=answers, capture_output=True, text=True).stdout
        return (torch.tensor(json.loads(said)) == labels).float()

    found = [
        gradients(small_network, members, asks_a_program, batch, backend=backend)
        for backend in ("eager", "compile")
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_a_function_that_answers_differently_each_time_is_allowed(small_network, batch):
    def moody(outputs, labels):
        return accuracy(outputs, labels) + torch.rand(outputs.shape[:2])

    assert gradients(small_network, ExampleMembers(12, sigma=0.5), moody, batch).isfinite().all()


def test_the_script_ends_with_one_line_before_anything_is_written(file, tmp_path):
    flags = (*SAMPLE, "--fitness", f"{file}:raises", "--out-dir", tmp_path / "run")
    done = run_script("mnist_eggroll.py", *flags)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"error: {file}:22, in helper: `raise" in done.stderr


# ---- examples/ ----


FITNESSES = [p for p in (ROOT / "examples").glob("*.py") if "--fitness" in p.read_text()]


def command_in(example):
    """What the example's header says to type."""
    text = (ROOT / "examples" / example).read_text().replace("\\\n    ", "")
    return re.search(r"^python (.*?)(?:   .*)?$", text, re.M)[1].split()


@pytest.mark.parametrize("example", [p.name for p in FITNESSES])
def test_an_example_fitness_trains_by_its_headers_command(example, tmp_path, monkeypatch):
    epochs = "30" if example == "sum_of_a_row.py" else "2"  # a bit for four images is little
    small = (*SAMPLE, "--population", "64", "--epochs", epochs, "--hidden-dim", "32")
    script, *flags = command_in(example)
    assert script == "mnist_eggroll.py"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *flags, *small, "--out-dir", str(tmp_path)])
    mnist_eggroll.main()
    assert json.loads((tmp_path / "config.json").read_text())["flags"]["population"] == "64"
    assert json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] > 0.25


def test_macro_f1_is_the_mean_of_the_classes_f1():
    macro_f1 = load(str(ROOT / "examples" / "macro_f1.py") + ":macro_f1")
    labels = torch.tensor([0, 0, 0, 1])
    logits = torch.eye(3)[torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])]
    # class 0: 2 of 2 and 2 of 3; class 1: 1 of 2 and 1 of 1; class 2 is never mentioned
    expected = torch.tensor([(4 / 5 + 2 / 3) / 3, (6 / 7) / 3, 2 / 3])
    torch.testing.assert_close(macro_f1(logits, labels), expected)


def test_a_4_for_a_9_costs_as_much_as_fifty_other_mistakes():
    minus_cost = load(str(ROOT / "examples" / "costly_confusion.py") + ":minus_cost")
    logits = torch.eye(10)[torch.tensor([[4, 9, 3, 4]])]
    assert minus_cost(logits, torch.tensor([9, 4, 3, 1])).tolist() == [[-50, -1, 0, -1]]


def test_even_digits_alone_count():
    even_hits = load(str(ROOT / "examples" / "even_digits.py") + ":even_hits")
    logits = torch.eye(10)[torch.tensor([[4, 9, 3, 0]])]
    assert even_hits(logits, torch.tensor([4, 9, 4, 0])).tolist() == [[1, 0, 0, 1]]


def test_a_row_is_right_where_its_sum_is_whatever_its_digits_are():
    sum_is_right = load(str(ROOT / "examples" / "sum_of_a_row.py") + ":sum_is_right")
    answers = torch.tensor([[1, 2, 3, 4, 9, 9], [4, 3, 2, 1, 9, 8], [1, 2, 3, 5, 8, 9]])
    labels = torch.tensor([1, 2, 3, 4, 9, 8])  # a row of four and one of two
    found = sum_is_right(torch.eye(10)[answers], labels)
    expected = [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert found.tolist() == expected


def test_the_program_outside_gives_each_member_its_score_whatever_their_number():
    verdict = load(str(ROOT / "examples" / "external_program.py") + ":verdict")
    labels = torch.randint(0, 10, (30,))
    for members in (1, 3, 600):
        logits = torch.randn(members, 30, 10)
        expected = accuracy(logits, labels).mean(1)
        torch.testing.assert_close(verdict(logits, labels), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("example", ["own_network.py", "binary_weights.py"])
def test_an_example_network_learns_what_its_header_says(example):
    done = run_command(sys.executable, *command_in(example))
    assert done.returncode == 0, done.stderr
    promised = float(
        re.search(r"([\d.]+) % of 1,000", (ROOT / "examples" / example).read_text())[1]
    )
    assert float(re.search(r"accuracy ([\d.]+)%", done.stdout)[1]) > promised - 3
