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
from runs import assert_one_line, read_csv

pytest.importorskip("optuna")

import mnist_backprop
import mnist_eggroll
import mnist_eggroll_int8
from experiment import search as search_module
from experiment.config import as_flags
from experiment.errors import Diverged, UserError
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
        (folder / "config.json").write_text(json.dumps({"commit": "abc"}))
        lr = float(words[words.index("--lr") + 1])
        seed = int(words[words.index("--seed") + 1])
        if lr > 0.3:
            raise Diverged("training has diverged")
        return {"validation_accuracy": 1 - abs(lr - 0.2) - seed / 100, "train_seconds": 2.0}

    monkeypatch.setattr(search_module, "finish", finish)
    return calls


def run(search, trials=None, seconds=None):
    while held := search.next_trial(trials, seconds):
        search.run(held)
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
    with pytest.raises(UserError, match="another --out-dir"):
        make(tmp_path, flags=("--epochs", "2"))


def test_the_journal_survives_a_half_written_line(tmp_path, trained):
    rows = run(make(tmp_path), trials=2)
    with (tmp_path / "journal.log").open("a") as file:
        file.write('{"op_code":')
    assert run(make(tmp_path), trials=2) == rows
    assert len(run(make(tmp_path))) == 6


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
        ("lr = [1", "cannot be read"),
        ("[settings]", "must hold the table settings"),
        ("[settings]\nlr = 0.1", "lr must be a list"),
        ("[settings]\nlr = { low = 2.0, high = 1.0 }", "lr must be a list"),
        ("[other]\n[settings]\nlr = [1]", "got other, settings"),
    ],
)
def test_a_grid_that_cannot_be_used_gets_one_line(tmp_path, text, message):
    (tmp_path / "grid.toml").write_text(text)
    grid = tmp_path / "grid.toml"
    assert_one_line(call("search.py", "backprop", "--grid", grid, "--out-dir", tmp_path), message)


def test_a_flag_that_the_script_does_not_know_gets_its_line(tmp_path):
    (tmp_path / "grid.toml").write_text(TOML)
    words = ("--grid", tmp_path / "grid.toml", "--out-dir", tmp_path / "out", "--sigma", "1")
    done = call("search.py", "backprop", *words)
    assert done.returncode == 2 and "--sigma" in done.stderr


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


def test_cells_of_a_heat_map_are_the_best_of_complete_trials():
    rows = [
        {"state": "COMPLETE", "values": "0.9 0.8", "lr": 0.1, "sigma": 1.0},
        {"state": "COMPLETE", "values": "0.9 0.9", "lr": 0.1, "sigma": 1.0},
        {"state": "PRUNED", "values": "", "lr": 0.2, "sigma": 1.0},
        {"state": "COMPLETE", "values": "0.7 0.7", "lr": 0.2, "sigma": 2.0},
    ]
    cells = best_cells(rows, "lr", "sigma")
    assert cells == {(0.1, 1.0): pytest.approx(90), (0.2, 2.0): pytest.approx(70)}
    axes = figure(cells, ["lr", "sigma"], "title", (0.1, 1.0)).axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["70.0", "90.0"]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    mesh = axes.collections[0].get_array()
    assert mesh.shape == (2, 2) and mesh.mask.sum() == 2  # blank where nothing ran
