"""The search for settings: it loses no trial and runs none twice, whatever stops it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT, call
from runs import assert_one_line, read_csv, read_json

pytest.importorskip("optuna")

import mnist_backprop
import mnist_eggroll
import mnist_eggroll_int8
from experiment import search as search_module
from experiment.commands import COMMANDS, finish
from experiment.config import as_flags
from experiment.errors import UserError
from experiment.grid import Grid
from experiment.heat_map import best_cells, figure
from experiment.search import Search

GRIDS = sorted((ROOT / "results" / "grids").glob("*.toml"))
PRESETS = mnist_backprop.PRESETS | mnist_eggroll.PRESETS | mnist_eggroll_int8.PRESETS
CELLS = {"lr": [0.1, 0.2, 0.4], "sigma": [0.01, 0.02]}
RANGE = {"lr": {"low": 0.01, "high": 1.0, "log": True}, "schedule": ["linear", "cosine"]}
TOML = """
flags = "--dataset mnist-sample --hidden-dim 8 --epochs 1 --threads 1"
[settings]
lr = [0.01, 0.02]
momentum = [0.8, 0.9]
"""


@pytest.fixture
def trained(monkeypatch):
    """A training script that returns at once; the list has the words of its calls."""
    calls = []

    def finish(command, folder, *words):
        calls.append(words)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"method": "eggroll", "flags": {}, "commit": "abc"}
        (folder / "config.json").write_text(json.dumps(config))
        lr = float(words[words.index("--lr") + 1])
        seed = int(words[words.index("--seed") + 1])
        status = "diverged" if lr > 0.3 else "finished"
        accuracy = 1 - abs(lr - 0.2) - seed / 100
        return {"status": status, "validation_accuracy": accuracy, "train_seconds": 2.0}

    monkeypatch.setattr(search_module, "finish", finish)
    return calls


def run(search, trials=None, seconds=None):
    while running := search.next_trial(trials, seconds):
        search.run(running)
    return [row for row in search.rows() if row["state"] != "WAITING"]


def make(folder, settings=CELLS, seeds=(0, 1), flags=("--epochs", "1"), preset=None):
    return Search("eggroll", Grid("", settings, preset or {}), seeds, list(flags), folder)


def settings_of(rows):
    return sorted((row["lr"], row["sigma"]) for row in rows)


def test_a_grid_tries_every_cell_once_with_every_seed(tmp_path, trained):
    rows = run(make(tmp_path))
    assert settings_of(rows) == [(lr, s) for lr in CELLS["lr"] for s in CELLS["sigma"]]
    assert {row["state"] for row in rows if row["lr"] < 0.3} == {"COMPLETE"}
    words = " ".join(trained[0])
    assert "--epochs 1" in words and "--sigma" in words and "--seed 0" in words
    saved = read_csv(tmp_path / "trials.csv")
    assert list(saved[0])[:6] == ["number", "state", "seeds", "values", "seconds", "commit"]
    assert [row["commit"] for row in saved if row["state"] == "COMPLETE"] == ["abc"] * 4
    assert not list((tmp_path / "runs").iterdir())  # finished trials leave no files


def test_a_diverged_trial_is_pruned_and_not_tried_again(tmp_path, trained):
    rows = run(make(tmp_path))
    assert [row["state"] for row in rows if row["lr"] == 0.4] == ["PRUNED"] * 2
    assert [row["seconds"] for row in rows] == [2.0 if row["lr"] == 0.4 else 4.0 for row in rows]
    calls = len(trained)
    assert run(make(tmp_path)) == rows and len(trained) == calls


def test_best_is_the_highest_mean_accuracy(tmp_path, trained):
    search = make(tmp_path)
    run(search)
    assert search.best()["lr"] == 0.2 and search.best()["values"] == "1.0000 0.9900"


def test_trials_and_seconds_count_those_of_earlier_calls(tmp_path, trained):
    assert len(run(make(tmp_path), trials=2)) == 2
    assert len(run(make(tmp_path), trials=2)) == 2
    assert len(run(make(tmp_path), trials=3)) == 3
    done = sum(row["seconds"] for row in make(tmp_path).rows())
    assert len(run(make(tmp_path), seconds=done)) == 3


def test_a_failed_trial_is_tried_again_by_the_next_call(tmp_path, trained, monkeypatch):
    works = search_module.finish

    def fails(*_):
        raise UserError("mnist_eggroll.py: error: out of memory")

    monkeypatch.setattr(search_module, "finish", fails)
    with pytest.raises(UserError, match="out of memory"):
        run(make(tmp_path))
    monkeypatch.setattr(search_module, "finish", works)
    rows = run(make(tmp_path))
    assert [row["state"] for row in rows].count("FAIL") == 1
    assert settings_of(r for r in rows if r["state"] != "FAIL") == settings_of(
        run(make(tmp_path / "other"))
    )


def test_trials_of_a_process_that_is_gone_are_tried_again_and_those_of_others_left(
    tmp_path, trained
):
    dead, alive = make(tmp_path), make(tmp_path)
    lost, held = dead.next_trial(None, None), alive.next_trial(None, None)
    assert lost and held
    lost.lock.release()  # as the system does when the process ends
    rows = run(make(tmp_path))
    assert rows[lost.trial.number]["state"] == "FAIL"
    assert rows[held.trial.number]["state"] == "RUNNING"
    again = [row for row in rows if row["state"] in ("COMPLETE", "PRUNED")]
    assert lost.trial.params in [{"lr": row["lr"], "sigma": row["sigma"]} for row in again]
    assert len(again) == 5
    alive.run(held)
    assert len(settings_of(r for r in alive.rows() if r["state"] != "FAIL")) == 6


def test_tpe_goes_on_with_other_suggestions_and_starts_with_the_preset(tmp_path, trained):
    preset = {"lr": 0.2, "schedule": "cosine"}
    for trials in (3, 6, 9):  # a new process each time
        rows = run(make(tmp_path, RANGE, preset=preset), trials=trials)
    assert {name: rows[0][name] for name in preset} == preset
    assert len({row["lr"] for row in rows}) == len(rows) == 9
    whole = run(make(tmp_path / "whole", RANGE, preset=preset), trials=9)
    assert [row["lr"] for row in whole] == [row["lr"] for row in rows]


def test_two_processes_never_get_the_same_suggestion(tmp_path, trained):
    first, second = make(tmp_path, RANGE), make(tmp_path, RANGE)
    held = [search.next_trial(8, None) for search in (first, second) for _ in range(4)]
    assert len({one.trial.params["lr"] for one in held}) == 8


def test_wilcoxon_prunes_where_there_are_enough_seeds(tmp_path, trained):
    settings = {"lr": [0.2, 0.05], "sigma": [0.01]}
    preset = {"lr": 0.2, "sigma": 0.01}  # comes first
    rows = run(make(tmp_path, settings, seeds=tuple(range(8)), preset=preset))
    assert [row["state"] for row in rows] == ["COMPLETE", "PRUNED"]
    assert 2 < len(rows[1]["values"].split()) < 8
    rows = run(make(tmp_path / "two", settings, preset=preset))
    assert [row["state"] for row in rows] == ["COMPLETE"] * 2


def test_a_folder_of_another_search_is_refused(tmp_path, trained):
    run(make(tmp_path), trials=1)
    with pytest.raises(UserError, match=r"other flags: .*--epochs.*another --out-dir"):
        make(tmp_path, flags=("--epochs", "2"))
    with pytest.raises(UserError, match="other method"):
        Search("backprop", Grid("", CELLS, {}), (0, 1), ["--epochs", "1"], tmp_path)


def test_a_search_of_which_nothing_ran_gives_way_to_another(tmp_path, trained, monkeypatch):
    def fails(*_):
        raise UserError("Unrecognized options: --epoch")

    with monkeypatch.context() as patch:
        patch.setattr(search_module, "finish", fails)
        with pytest.raises(UserError):
            run(make(tmp_path, flags=("--epoch", "1")))
    assert settings_of(run(make(tmp_path))) == settings_of(run(make(tmp_path / "other")))


def test_flags_that_the_search_sets_are_refused(tmp_path):
    for flags, message in (
        (("--train-on-all",), "leave it out"),
        (("--seed=3",), "leave it out"),
        (("--lr", "0.1"), "--lr cannot be a setting and a flag"),
    ):
        with pytest.raises(UserError, match=message):
            make(tmp_path, flags=flags)


def test_the_journal_survives_a_half_written_line(tmp_path, trained):
    search = make(tmp_path)
    rows = run(search, trials=2)
    with (tmp_path / "journal.log").open("a") as file:
        file.write('{"op_code":')  # by another process, which is killed
    assert run(search, trials=3)[:2] == rows
    with (tmp_path / "journal.log").open("a") as file:
        file.write('{"op_code":')
    assert len(run(make(tmp_path))) == 6


def test_a_kill_while_the_settings_are_written_loses_no_cell(tmp_path, trained):
    search = make(tmp_path)
    run(search, trials=2)
    lost = search.next_trial(None, None)
    lost.lock.release()
    journal = tmp_path / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]))  # the last one is of the second setting
    rows = [row for row in run(make(tmp_path)) if row["state"] != "FAIL"]
    assert settings_of(rows) == settings_of(run(make(tmp_path / "whole")))


def test_a_trial_that_always_fails_is_given_up(tmp_path, trained, monkeypatch):
    works = search_module.finish

    def finish(command, folder, *words):
        if words[words.index("--lr") + 1] == "0.1":
            raise UserError("out of memory")
        return works(command, folder, *words)

    monkeypatch.setattr(search_module, "finish", finish)
    for _ in range(4):
        with pytest.raises(UserError):
            run(make(tmp_path))
    assert len(run(make(tmp_path))) == 4 + 4  # two failed attempts at each of two cells


def test_what_a_kill_leaves_of_an_ended_trial_is_removed(tmp_path, trained, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(search_module.shutil, "rmtree", lambda *_, **__: None)
        run(make(tmp_path), trials=2)
    assert len(list((tmp_path / "runs").iterdir())) == 2
    make(tmp_path)
    assert not list((tmp_path / "runs").iterdir())


# ---- runs ----

SMALL = ("--dataset", "mnist-sample", "--hidden-dim", "8", "--threads", "1")
LONG = (*SMALL, "--epochs", "80", "--eval-every", "100")
CALL = """
import sys
from pathlib import Path
from experiment.commands import COMMANDS, finish
print("begins", flush=True)
finish(COMMANDS["backprop"], Path(sys.argv[1]), *sys.argv[2:])
"""


def start(folder, *flags):
    command = [sys.executable, "-c", CALL, folder, *flags]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begins\n"
    return process


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists()


@pytest.mark.parametrize("moment", ["at the start", "in training"])
def test_a_run_that_its_caller_has_left_is_waited_for(moment, tmp_path):
    caller = start(tmp_path / "run", *LONG)
    wait_for(tmp_path / "run" / (".caller" if moment == "at the start" else "config.json"))
    time.sleep(0.2)  # the training script is a process by now
    caller.kill()
    caller.wait()
    again = start(tmp_path / "run", *LONG)
    assert again.stdout.readline().startswith("waiting for the run in")
    assert again.wait() == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("backprop on mnist-sample") == 1 and "finished" in log


def test_ctrl_c_lets_a_run_save(tmp_path):
    command = [sys.executable, "-c", CALL, tmp_path / "run", *LONG]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, start_new_session=True)
    wait_for(tmp_path / "run" / "checkpoint.pt")
    os.killpg(process.pid, signal.SIGINT)
    process.wait()
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "interrupted"


def test_a_run_with_other_flags_is_not_taken_for_this_one(tmp_path):
    finish(COMMANDS["backprop"], tmp_path / "run", *SMALL, "--epochs", "1")
    assert finish(COMMANDS["backprop"], tmp_path / "run", *SMALL, "--epochs", "1")["epochs"] == 1
    with pytest.raises(UserError, match=r"a run of .* --epochs 1, not of .* --epochs 2"):
        finish(COMMANDS["backprop"], tmp_path / "run", *SMALL, "--epochs", "2")


def test_a_run_that_diverges_has_a_status_of_its_own(tmp_path):
    flags = (*SMALL, "--epochs", "3", "--lr", "1e30")
    assert finish(COMMANDS["backprop"], tmp_path, *flags)["status"] == "diverged"
    assert finish(COMMANDS["backprop"], tmp_path, *flags)["status"] == "diverged"


# ---- the script ----


def test_a_search_killed_twice_loses_no_trial_and_runs_none_twice(tmp_path):
    grid, folder = tmp_path / "grid.toml", tmp_path / "search"
    grid.write_text(TOML)
    command = [sys.executable, "search.py", "backprop", "--grid", grid, "--out-dir", folder]
    for _ in range(2):
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, start_new_session=True)
        begun = len(list(folder.glob("runs/*/seed*")))
        deadline = time.monotonic() + 60
        while len(list(folder.glob("runs/*/seed*"))) <= begun and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(random.uniform(0, 6))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = call("search.py", *command[2:])
    assert done.returncode == 0, done.stderr
    rows = read_csv(folder / "trials.csv")
    complete = [(row["lr"], row["momentum"]) for row in rows if row["state"] == "COMPLETE"]
    assert len(complete) == len(set(complete)) == 4
    assert {row["state"] for row in rows} <= {"COMPLETE", "FAIL"}
    assert all(len(row["values"].split()) == 2 for row in rows if row["state"] == "COMPLETE")
    assert "best: trial" in done.stdout and (folder / "heat_map.png").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = [1", "is not TOML"),
        ("[settings]", "must hold a table settings"),
        ("settings = 5", "must hold a table settings"),
        ("[settings]\nlr = 0.1", "lr must be a list"),
        ("[settings]\nlr = [[96, 128]]", "lr must be a list"),
        ("[settings]\nlr = { low = 2.0, high = 1.0 }", "lr must be a list"),
        ("[settings]\nlr = { low = 0.0, high = 1.0, log = true }", "lr must be a list"),
        ("[settings]\nlr = { low = 0.0, high = 1.0, base = 2 }", "lr must be a list"),
        ("[other]\n[settings]\nlr = [1]", "got other, settings"),
        ("flags = [1]\n[settings]\nlr = [1]", "flags must be a string"),
        ("[settings]\nlr = [1]\n[preset]\nsigma = 1", "preset may name settings alone"),
    ],
)
def test_a_grid_that_cannot_be_used_gets_one_line(tmp_path, text, message):
    (tmp_path / "grid.toml").write_text(text)
    grid = tmp_path / "grid.toml"
    assert_one_line(call("search.py", "backprop", "--grid", grid, "--out-dir", tmp_path), message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--trials", "-3"), "--trials must be > 0, got -3"),
        (("--seconds", "0"), "--seconds must be > 0"),
        (("--seeds", "1", "1"), "--seeds must be different numbers"),
        (("--grid", "nowhere.toml"), "nowhere.toml cannot be read: No such file"),
    ],
)
def test_wrong_flags_of_the_search_get_one_line(tmp_path, flags, message):
    assert_one_line(call("search.py", "backprop", "--out-dir", tmp_path, *flags), message)


def test_without_optuna_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "experiment.search", None)
    done = call("search.py", "backprop", "--out-dir", tmp_path)
    assert_one_line(done, "pip install -r requirements-dev.txt")


def test_a_flag_that_the_script_does_not_know_gets_its_line(tmp_path):
    (tmp_path / "grid.toml").write_text(TOML)
    words = ("--grid", tmp_path / "grid.toml", "--out-dir", tmp_path / "out", "--sigma", "1")
    assert_one_line(call("search.py", "backprop", *words), "Unrecognized options: --sigma")


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_committed_grids_hold_the_preset(path):
    grid = Grid.read(path)
    method = path.stem.removesuffix("-tpe")
    flags, own = as_flags(PRESETS[method]), grid.preset
    for name, value in own.items():
        usual = flags[name.replace("-", "_")]
        if method == "eggroll" and name in ("lr", "population"):
            continue  # smaller than the preset's: the next test
        assert value == (" ".join(map(str, usual)) if isinstance(usual, list) else usual) or (
            name == "weight-decay" and usual == 0 and value <= 1e-6  # no logarithm of 0
        )


@pytest.mark.parametrize("name", ["eggroll", "eggroll-tpe"])
def test_the_preset_of_fewer_members_has_the_learning_rate_of_the_rule(name):
    grid, usual = Grid.read(ROOT / "results" / "grids" / f"{name}.toml"), PRESETS["eggroll"]
    words = grid.flags.split()
    config = replace(usual, epochs=int(words[words.index("--epochs") + 1]))
    members = 1248 + 1248 + 40
    assert grid.preset["lr"] == pytest.approx(
        mnist_eggroll.scaled_lr(config, usual, members), rel=0.01
    )


TRIALS = sorted((ROOT / "results" / "reference").glob("*/search/*.csv"))


@pytest.mark.parametrize("path", TRIALS, ids=lambda path: path.stem)
def test_committed_trials_are_those_of_a_committed_grid(path):
    grid = Grid.read(ROOT / "results" / "grids" / path.name.replace("csv", "toml"))
    rows = read_csv(path)
    assert list(rows[0]) == [*search_module.COLUMNS, *grid.settings]
    assert {row["state"] for row in rows} <= {"COMPLETE", "PRUNED", "FAIL"}
    assert all(len(row["values"].split()) == 2 for row in rows if row["state"] == "COMPLETE")
    tried = [tuple(row[name] for name in grid.settings) for row in rows if row["state"] != "FAIL"]
    assert len(set(tried)) == len(tried)  # none twice
    if not grid.has_range:
        assert set(tried) == {tuple(str(cell[n]) for n in grid.settings) for cell in grid.first}


def test_cells_of_a_heat_map_are_the_best_of_complete_trials():
    rows = [
        {"state": "COMPLETE", "values": "0.9 0.8", "lr": 0.1, "sigma": 1.0},
        {"state": "COMPLETE", "values": "0.9 0.9", "lr": 0.1, "sigma": 1.0},
        {"state": "PRUNED", "values": "", "lr": 0.2, "sigma": 1.0},
        {"state": "WAITING", "values": "", "lr": 0.4, "sigma": 1.0},
        {"state": "COMPLETE", "values": "0.7 0.7", "lr": 0.2, "sigma": 2.0},
    ]
    cells = best_cells(rows, "lr", "sigma")
    accuracies = {(0.1, 1.0): 90, (0.2, 1.0): float("nan"), (0.2, 2.0): 70}
    assert cells == pytest.approx(accuracies, nan_ok=True)
    values = [[0.1, 0.2, 0.4], [1.0, 2.0]]
    axes = figure(cells, ["lr", "sigma"], values, "title", (0.1, 1.0)).axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["70.0", "90.0", "diverged"]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    mesh = axes.collections[0].get_array()
    assert mesh.shape == (2, 3) and mesh.mask.sum() == 4  # blank where nothing ran, or diverged
