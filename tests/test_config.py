"""Flags, presets and their errors; how a script ends; optimizers."""

import re
import typing
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, call, captured
from runs import BACKPROP, SAMPLE, assert_one_line
from torch import nn

import model
from experiment import config, device, script
from experiment.config import FloatConfig, as_flags
from experiment.errors import Finished, Interrupted, UserError
from experiment.files import write_json
from experiment.fitness_file import load_fitness
from experiment.optim import load_optimizer, make_optimizer, make_schedule


@dataclass(frozen=True)
class Wide:
    population: int | tuple[int, ...] = (96, 16)
    """Members."""
    antithetic: bool = True
    """Pairs."""
    shaping: typing.Callable = abs


@dataclass(frozen=True)
class Deep:
    rank: int = 1
    """Rank."""


@dataclass(frozen=True, kw_only=True)
class Config(FloatConfig):
    es: Wide | Deep


PRESETS = {"wide": Config(es=Wide(), lr=0.3), "deep": Config(es=Deep(2), epochs=7)}


def parse(*words):
    """Return the preset and Config of a command line, and what was printed."""
    result = []
    done = captured("own.py", words, lambda: result.append(config.parse(PRESETS, "Purpose.")))
    return (*result[0], done) if result else (None, None, done)


# ---- presets ----


def test_the_first_preset_is_the_default_and_flags_win_over_it():
    assert parse()[1].lr == 0.3
    name, flags, _ = parse("deep", "--rank", "5")
    assert (name, flags.es, flags.epochs, flags.preset) == ("deep", Deep(5), 7, "deep")
    assert parse("--population", "64")[1].es.population == 64
    assert parse("wide", "--population", "64", "32", "--no-antithetic")[1].es == Wide(
        (64, 32), False
    )


def test_a_mistyped_preset_is_one_line_that_lists_them():
    with pytest.raises(UserError, match="unknown preset 'wid'; choose from wide, deep"):
        parse("wid")


def test_a_flag_of_another_estimator_is_unknown():
    _, _, done = parse("wide", "--rank", "2")
    assert done.returncode == 2 and "--rank" in done.stderr


def test_help_shows_the_presets_and_their_defaults_on_three_screens(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = parse("deep", "--help")[2].stdout
    assert len(text.splitlines()) <= 150
    assert "presets: wide (the default), deep." in " ".join(text.split())
    assert "(default: 7)" in text and "--preset" not in text
    for name in as_flags(PRESETS["deep"]).keys() - {"preset"}:
        assert "--" + name.replace("_", "-") in text


def test_activations_are_those_of_the_model():
    names = typing.get_args(typing.get_type_hints(FloatConfig)["activation"])
    assert set(names) == set(model.ACTIVATIONS)


# ---- resuming ----


def save(folder, preset, status="running", **flags):
    saved = as_flags(PRESETS[preset]) | {"preset": preset, "threads": 1} | flags
    write_json(folder / "config.json", {"method": preset, "flags": saved})
    write_json(folder / "summary.json", {"status": status})
    return ("--resume", "--out-dir", folder)


def test_saved_flags_are_the_defaults_of_a_resumed_run(tmp_path):
    resume = save(tmp_path, "wide", population=[32, 8], antithetic=False, lr=0.25, bias=True)
    for words in ((), ("wide", "--bias", "--lr", "0.25", "--population", "32", "8")):
        name, flags, done = parse(*words, *resume)
        assert name == "wide" and (flags.lr, flags.bias) == (0.25, True), done.stderr
        assert flags.es == Wide((32, 8), antithetic=False)
    assert parse(*save(tmp_path, "deep", rank=9))[1].es == Deep(9)


def test_other_flags_on_resume_are_all_listed(tmp_path):
    resume = save(tmp_path, "wide")
    expected = r"--lr was 0\.3 and is 0\.7 now, --antithetic was True and is False now"
    with pytest.raises(UserError, match=expected):
        parse(*resume, "--lr", "0.7", "--no-antithetic", "--data-dir", "elsewhere")
    with pytest.raises(UserError, match="holds a run of wide, not of deep"):
        parse("deep", *resume)


def test_a_finished_run_needs_no_more_than_its_folder(tmp_path):
    resume = save(tmp_path, "wide", status="finished")
    with pytest.raises(Finished, match="finished already"):
        parse(*resume)
    with pytest.raises(UserError, match="other flags"):
        parse(*resume, "--lr", "0.7")


def test_resuming_an_empty_folder_starts_the_run(tmp_path):
    assert parse("--resume", "--out-dir", tmp_path, "--lr", "0.7")[1].lr == 0.7


@pytest.mark.parametrize("content", ["rubbish", "{}", "[]"])
def test_a_damaged_config_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        parse("--resume", "--out-dir", tmp_path)


# ---- invalid values ----

INVALID = {
    "--epochs 0": "--epochs must be >= 1, got 0",
    "--threads 0": "--threads must be >= 1, got 0",
    "--lr 0": "--lr must be > 0, got 0.0",
    "--lr nan": "--lr must be > 0, got nan",
    "--momentum=-1": "--momentum must be >= 0, got -1.0",
    "--batch-size 5000": "--batch-size must be <= 3500",
    "--device cuda": "try --device cpu",
    "--resume": "--resume needs --out-dir",
    "--resume --overwrite --out-dir x": "give one of them",
    "--seed=-1": "--seed must be >= 0, got -1",
    f"--seed {2**32}": f"--seed must be < {2**32}",
    "--label-smoothing 1": "--label-smoothing must be < 1, got 1.0",
    "sgd": "unknown preset 'sgd'; choose from backprop",
    "--init-from nowhere": "nowhere cannot be read",
}


@pytest.mark.parametrize("flags", INVALID)
def test_an_invalid_value_gets_one_line_and_exit_code_2(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = flags.split()
    place = 1 if not words[0].startswith("-") else 0
    done = call(BACKPROP, *words[:place], *SAMPLE, *words[place:])
    assert_one_line(done, f"{BACKPROP}: error: ", INVALID[flags])
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epoch 3", "--epochs"),
        ("--epochs many", "--epochs"),
        ("--dataset cifar", "mnist-sample"),
        ("--sigma 0.1", "--sigma"),
    ],
)
def test_a_flag_that_cannot_be_read_is_explained(flags, message):
    done = call(BACKPROP, *flags.split())
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_threads_are_set_and_reported():
    assert parse("--threads", "1")[1].threads == 1
    assert parse()[1].threads == torch.get_num_threads()


# ---- ends ----


def ends(error):
    def main():
        raise error

    return captured("own.py", [], lambda: script.run_script(main, "own.py", (ZeroDivisionError,)))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("expected this\n  got that"), 2, "own.py: error: expected this got that"),
        (ZeroDivisionError("of a library"), 2, "own.py: error: of a library"),
        (OSError(28, "No space left on device", "run/x"), 2, "run/x: No space left .*--resume"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--batch-size"),
        (MemoryError(), 2, "smaller --population"),
        (Interrupted("stopped", 15), 143, "^stopped$"),
        (KeyboardInterrupt(), 130, "^$"),
        (Finished("done"), 0, "^$"),
    ],
)
def test_a_script_ends_with_one_line_and_an_exit_code(error, code, said):
    done = ends(error)
    assert done.returncode == code and re.search(said, done.stderr.strip())
    assert len(done.stderr.splitlines()) <= 1 and "\n\n" not in done.stdout


def test_an_error_in_the_code_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        ends(RuntimeError("a bug"))


# ---- fitness files ----


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("{file}:five", "has no function 'five'; it defines hits"),
        ("{file}", "FILE.py:FUNCTION"),
        ("nowhere.py:f", "nowhere.py does not exist"),
        ("acuracy", "must be a built-in name or FILE.py:FUNCTION"),
    ],
)
def test_a_flag_that_names_no_function_says_what_is_expected(flag, message, tmp_path):
    (tmp_path / "own.py").write_text("five = 5\ndef hits(outputs, labels):\n    return outputs\n")
    with pytest.raises(UserError, match=message):
        load_fitness(flag.format(file=tmp_path / "own.py"))


def test_an_error_in_the_users_file_is_its_own(tmp_path):
    (tmp_path / "own.py").write_text("import nowhere_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        load_fitness(f"{tmp_path / 'own.py'}:f")
    assert callable(load_fitness(f"{ROOT / 'examples' / 'macro_f1.py'}:macro_f1"))


# ---- optimizers, clock, memory ----


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizers_state_keeps_the_options_of_its_device(fused):
    network = nn.Linear(2, 2)
    saved, loaded = (
        torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=f)
        for f in (not fused, fused)
    )
    network(torch.ones(1, 2)).sum().backward()
    saved.step()
    load_optimizer(loaded, saved.state_dict())
    assert loaded.param_groups[0]["fused"] == fused
    for parameter in network.parameters():
        momenta = (o.state[parameter]["momentum_buffer"] for o in (saved, loaded))
        assert torch.equal(*momenta)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.8536, 0.5, 0.1464]),
        ("onecycle", [0.04, 0.9821, 0.6690, 0.2123]),
    ],
)
def test_schedules_by_epoch(schedule, expected):
    flags = FloatConfig(lr=1.0, schedule=schedule)
    optimizer = make_optimizer(nn.Linear(2, 2), flags)
    steps = make_schedule(optimizer, flags, 40)
    rates = []
    for step in range(40):
        if step % 10 == 0:
            rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        steps.step()
    assert rates == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers_take_their_flags(name):
    flags = FloatConfig(lr=0.5, optimizer=name, weight_decay=0.25, momentum=0.75)
    optimizer = make_optimizer(nn.Linear(2, 2), flags)
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__.lower() == name
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    assert group.get("momentum", 0.75) == 0.75


def test_the_clock_counts_from_start_to_stop_only():
    clock = device.Clock(torch.device("cpu"), seconds=5.0)
    clock.start()
    clock.stop()
    assert 5.0 < clock.seconds < 5.5
    before = clock.seconds
    assert clock.seconds == before


def test_peak_memory_includes_an_allocation():
    block = torch.ones(256 << 20, dtype=torch.uint8)
    assert device.peak_memory_mb(torch.device("cpu")) > block.numel() / 2**20
