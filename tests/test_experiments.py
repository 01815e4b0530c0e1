"""./run_experiments.sh: which flags go where, what is run once, and what is reported."""

import json

import pytest
import torch
from conftest import call, captured

from lab import experiments, report
from lab.errors import UserError
from lab.runlog import SUMMARY_KEYS


@pytest.fixture
def made(monkeypatch):
    """Commands of the runs that would be made; each leaves a finished run behind."""
    found = []

    def popen(command):
        folder = experiments.Path(command[command.index("--out-dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        method = folder.parent.name.partition("+")[0]
        numbers = dict.fromkeys(SUMMARY_KEYS, 1) | {"device": "cpu", "dataset": "mnist-sample"}
        own = {"method": method, "seed": int(folder.name[4:]), "status": "finished"}
        (folder / "summary.json").write_text(json.dumps(numbers | own))
        settings = experiments.flags_with_effect(folder.parent.name, flags_of(command))[1]
        saved = {"method": method, "command": [], "flags": settings["flags"]}
        (folder / "config.json").write_text(json.dumps(saved))
        rows = ["epoch,train_seconds,forward_passes_per_image,test_accuracy,train_cross_entropy"]
        rows += ["0,0,0,0.1,2.3", "1,1.0,100,0.9,0.5"]
        (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
        (folder / "train.log").touch()
        found.append(command)
        return type("Process", (), {"wait": lambda self: 0})()

    monkeypatch.setattr(experiments.subprocess, "Popen", popen)
    return found


def flags_of(command):
    """What was typed for the run, without what the experiment adds for each seed."""
    own = len(experiments.COMMANDS[experiments.Path(command[-2]).parent.name]) + 1
    return command[own : command.index("--seed")]


@pytest.fixture
def in_process(monkeypatch):
    """Settings are asked of the scripts in this process: another takes seconds to start."""

    start = experiments.subprocess.run

    def run(command, **options):
        if not command[1].endswith(".py"):  # an example's own program
            return start(command, **options)
        return call(experiments.Path(command[1]).name, *command[2:])

    monkeypatch.setattr(experiments.subprocess, "run", run)


def experiment(folder, *args, methods=("backprop", "eggroll", "eggroll-batch")):
    typed = ["--dataset", "mnist-sample", *args]
    return captured(
        "experiments", [], lambda: experiments.experiment(list(typed), folder, list(methods))
    )


def test_a_flag_goes_to_the_methods_where_it_has_an_effect(in_process):
    args = ["--population", "64", "--rank", "2", "--momentum", "0.8", "--no-antithetic"]
    assert experiments.flags_with_effect("backprop", args)[0] == ["--momentum", "0.8"]
    without_rank = ["--population", "64", "--momentum", "0.8", "--no-antithetic"]
    assert experiments.flags_with_effect("eggroll", args)[0] == without_rank
    taken, settings = experiments.flags_with_effect("eggroll-batch", args)
    assert taken == args and settings["flags"]["rank"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--rank", "2"), "--rank 2 has no effect"), (("--populaton", "48"), "--population")],
)
def test_a_flag_that_no_method_takes_ends_with_a_scripts_own_line(flags, message, tmp_path, capfd):
    """Which suggests the nearest where it is a slip of the finger."""
    args = ["--dataset", "mnist-sample", "--quick", *flags]
    with pytest.raises(SystemExit) as stop:
        experiments.experiment(args, tmp_path, ["backprop", "eggroll"])
    said = capfd.readouterr()
    assert stop.value.code == 2 and message in said.out + said.err


def test_a_wrong_value_ends_with_the_scripts_own_line(in_process, capsys):
    with pytest.raises(SystemExit) as stop:
        experiments.flags_with_effect("eggroll", ["--sigma", "0"])
    assert stop.value.code == 2 and "--sigma 0.0 is not above 0" in capsys.readouterr().err


def test_finished_runs_are_skipped_and_others_moved_aside(in_process, made, tmp_path, monkeypatch):
    monkeypatch.setenv("SEEDS", "0 1")
    folder = tmp_path / "latest"
    experiment(folder)
    assert len(made) == 6
    done = experiment(folder)
    assert len(made) == 6 and done.stdout.count("finished already") == 6
    assert {p.name for p in folder.iterdir()} >= {"summary.csv", "summary.md"}
    experiment(folder, "--bias")
    assert len(made) == 12 and len(list(tmp_path.glob("latest_until_*"))) == 1


def test_rows_of_all_are_reported_with_a_figure_of_their_own(in_process, made, tmp_path):
    methods = ["backprop", "eggroll", "backprop+sign", "eggroll+sign", "eggroll+macro-F1"]
    experiment(tmp_path / "latest", methods=methods)
    table = (tmp_path / "latest" / "summary.md").read_text()
    assert "| eggroll+sign |" in table and "| macro_f1.py:macro_f1 |" in table
    assert (tmp_path / "latest" / "any_signal.png").stat().st_size > 10_000
    report.publish(tmp_path / "latest", tmp_path / "reference")
    assert len(list((tmp_path / "reference").glob("*/seed0/summary.json"))) == 5


@pytest.mark.parametrize("method", experiments.COMMANDS)
def test_every_row_is_a_command_that_its_script_understands(method, in_process):
    taken, settings = experiments.flags_with_effect(method, [])
    assert taken == [] and settings["method"] == method.partition("+")[0]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("SEEDS", "0 one", 'SEEDS="0 1 2"'), ("METHODS", "eggrol", "there are: backprop, eggroll")],
)
def test_a_wrong_variable_is_named(name, value, message, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        experiments.chosen_seeds(False), experiments.chosen_methods(False)


@pytest.mark.parametrize("flag", ["--members", "--dtype", "--seed", "--out-dir", "--resume"])
def test_a_flag_that_the_experiment_sets_says_what_to_type(flag, monkeypatch):
    monkeypatch.setattr("sys.argv", ["experiments", flag, "x"])
    with pytest.raises(UserError, match="is set here for each run"):
        experiments.main()


@pytest.mark.parametrize("flag", ["--activation=relu", "--fitness=accuracy"])
def test_a_flag_that_a_row_of_all_sets_is_refused_with_it(flag, monkeypatch):
    monkeypatch.setattr("sys.argv", ["experiments", "--all", flag])
    with pytest.raises(UserError, match="set by the rows of --all"):
        experiments.main()


def test_without_data_or_network_the_sample_is_used_and_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MNIST_DIR", str(tmp_path))

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    assert experiments.dataset_flags([]) == ["--dataset", "mnist-sample"]
    assert "NOT the full MNIST" in capsys.readouterr().err
    assert torch.get_num_threads() >= 1
