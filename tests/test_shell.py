"""run_experiments.sh, run_tests.sh and setup.sh, with stand-ins for Python."""

import importlib
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from experiment import config

METHODS = "backprop eggroll eggroll-dense node-perturbation node-perturbation-int8"
# records each command; fails as told; has no MNIST when told
PYTHON = """#!/bin/bash
printf '%q ' "$@" >> calls; echo >> calls
[ "$2" != experiment.data ] || [ -z "$NO_MNIST" ] || echo --dataset mnist-sample --epochs 30
[ "$1" != "$FAILS" ] || exit 130
"""


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path):
    """Return a copy of the shell scripts with a stand-in for .venv/bin/python."""
    for pattern in ("*.sh", "requirements*"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, tmp_path)
    write_program(tmp_path / ".venv" / "bin" / "python", PYTHON)
    for name in ("requirements.txt", "requirements-dev.txt"):
        os.utime(tmp_path / name, (0, 0))
        (tmp_path / ".venv" / f"installed-{name}").touch()
    return tmp_path


def experiments(folder, *flags, code=0, **env):
    """Run ./run_experiments.sh; return the commands that it ran, and its output."""
    (folder / "calls").write_text("")
    done = subprocess.run(
        [folder / "run_experiments.sh", *flags],
        env={"PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    calls = [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]
    return [call for call in calls if call[0].startswith("mnist")], done


def rows_of(calls):
    return [call[-1].split("/")[-2] for call in calls]


def test_the_usual_runs_are_four_methods_with_one_seed(folder):
    calls, _ = experiments(folder)
    assert rows_of(calls) == [m for m in METHODS.split() if m != "eggroll-dense"]
    expected = "mnist_backprop.py --train-on-all --seed 0 --resume --out-dir"
    assert calls[0] == [*expected.split(), "results/latest/backprop/seed0"]


def test_variables_choose_seeds_methods_and_folder(folder):
    calls, _ = experiments(folder, SEEDS="3 5", METHODS="eggroll backprop", RESULTS_DIR="a b")
    out = [f"a b/{method}/seed{seed}" for seed in (3, 5) for method in ("backprop", "eggroll")]
    assert [call[-1] for call in calls] == out


def test_flags_go_to_every_script_and_arguments_of_a_side_to_that_side(folder):
    sides = {"BACKPROP_ARGS": "--optimizer adam", "EGGROLL_ARGS": "--sigma 0.1"}
    calls, _ = experiments(folder, "--hidden-dim", "64", METHODS=METHODS, **sides)
    for call in calls:
        assert "--hidden-dim 64 --seed" in " ".join(call)
        assert (
            ("--optimizer" in call) == (call[0] == "mnist_backprop.py") == ("--sigma" not in call)
        )


def test_without_mnist_every_run_gets_the_sample(folder):
    calls, _ = experiments(folder, "--lr", "1", NO_MNIST="1")
    assert all("--dataset mnist-sample --epochs 30" in " ".join(call) for call in calls)
    assert "-m experiment.data --lr 1 " in (folder / "calls").read_text()


def test_a_run_that_stops_ends_the_experiment_with_its_code(folder):
    calls, _ = experiments(folder, code=130, FAILS="mnist_eggroll.py")
    assert len(calls) == 2 and "experiment.report" not in (folder / "calls").read_text()


def test_a_mistyped_method_is_one_line(folder):
    calls, done = experiments(folder, code=2, METHODS="backprop egroll")
    assert not calls and "got egroll" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", [("--quick",), ("--all",)])
def test_every_command_is_one_that_its_script_accepts(flags, folder, monkeypatch):
    calls, _ = experiments(folder, *flags, METHODS=METHODS)
    rows = rows_of(calls)
    assert len(rows) == len(set(rows)) == (5 if flags == ("--quick",) else 25)
    for script, *words in calls:
        if not (ROOT / script).exists():
            continue
        presets = importlib.import_module(script.removesuffix(".py")).PRESETS
        monkeypatch.setattr(sys, "argv", [script, *words])
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(folder)  # where there are no results to resume
            _, parsed = config.parse(presets, "Purpose.")
        assert parsed.train_on_all and parsed.resume
        fitness = getattr(parsed, "fitness", "accuracy")
        assert ":" not in fitness or (ROOT / fitness.partition(":")[0]).exists()


def test_help_is_the_header_of_the_script(folder):
    _, done = experiments(folder, "--help")
    assert done.stdout.startswith("Train MNIST") and done.stdout.count("\n") < 24
    assert "--quick" in done.stdout and "set -e" not in done.stdout


# ---- setup.sh ----

PYTHON3 = """#!/bin/bash
case "$*" in
    *version_info*) exit $OLD ;;
    --version) echo Python 3.9.1 ;;
    *"import torch"*) exit $NO_TORCH ;;
    *"import site"*) echo /packages ;;
    "-m venv"*) echo "$*" >> calls; mkdir -p .venv/bin; cp pip .venv/bin/python ;;
esac
"""
PIP = """#!/bin/bash
case "$*" in
    *sysconfig*) echo .venv ;;
    *" -c "*) echo "$*" >> calls; exit $NO_TESTED_VERSIONS ;;
    *) echo "$*" >> calls; exit $NO_NETWORK ;;
esac
"""


def use_python(folder, code=0, **env):
    """Source setup.sh and call use_python; return what was installed, and the output."""
    shutil.rmtree(folder / ".venv")
    (folder / "calls").write_text("")
    write_program(folder / "bin" / "python3", PYTHON3)
    write_program(folder / "pip", PIP)
    usual = dict.fromkeys(("OLD", "NO_TORCH", "NO_TESTED_VERSIONS", "NO_NETWORK"), "0")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", "source ./setup.sh; use_python requirements.txt; echo $PYTHON"],
        cwd=folder,
        env={"PATH": path, **usual, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return (folder / "calls").read_text(), done


def test_an_old_python_is_refused(folder):
    calls, done = use_python(folder, code=2, OLD="1")
    assert "expected Python 3.11 or newer, got Python 3.9.1" in done.stderr and not calls


def test_an_environment_has_the_tested_versions(folder):
    calls, done = use_python(folder, NO_TORCH="1")
    assert done.stdout.endswith(".venv/bin/python\n")
    assert "-m venv .venv" in calls and "-c requirements.lock -r requirements.txt" in calls


def test_versions_that_cannot_be_had_are_replaced_by_others(folder):
    calls, done = use_python(folder, NO_TORCH="1", NO_TESTED_VERSIONS="1")
    assert "tested versions" in done.stderr and "check -r requirements.txt" in calls


def test_an_environment_is_built_on_top_of_a_pytorch_that_is_there(folder):
    calls, _ = use_python(folder)
    assert "--system-site-packages" in calls and "requirements.lock" not in calls
    assert (folder / ".venv" / "python3.pth").read_text() == "/packages\n"


def test_a_failed_installation_is_one_line_and_tried_again_the_next_time(folder):
    for no_torch in "01":
        failing = {"NO_TESTED_VERSIONS": "1", "NO_NETWORK": "1", "NO_TORCH": no_torch}
        _, done = use_python(folder, code=2, **failing)
        assert "pip could not install requirements.txt" in done.stderr
        assert not (folder / ".venv" / "installed-requirements.txt").exists()


def test_the_lock_has_every_requirement():
    locked = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().split()}
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert line.startswith("-r ") or line.partition(">")[0] in locked


def test_results_are_made_by_a_script_that_goes_on_where_it_was_stopped(folder, tmp_path):
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
    (folder / "calls").write_text("")
    script = folder / "benchmarks" / "results.sh"
    done = subprocess.run([script, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = (folder / "calls").read_text().splitlines()
    runs = [call for call in calls if call.startswith("mnist")]
    assert all("--resume" in call and "--train-on-all" in call for call in runs)
    assert sum("/table/eggroll+accuracy/" in call for call in runs) == 5
    assert sum("/table/eggroll-dense/" in call for call in runs) == 3
    assert sum("/table/eggroll+unsmoothed-accuracy/" in call for call in runs) == 3
    assert sum("--population 39000" in call for call in runs) == 3
    for name in ("speed", "ablations", "frontier"):
        assert any(f"benchmarks/{name}.py" in call for call in calls)
    assert not [call for call in runs if str(tmp_path / "out") not in call]
    shown = subprocess.run([script], capture_output=True, text=True)
    assert shown.returncode == 0 and "usage: benchmarks/results.sh FOLDER" in shown.stdout
