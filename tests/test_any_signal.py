"""The rows that ./run_experiments.sh --all adds: where they lie, and what is said of them."""

import json

import pytest
import torch

import mnist_backprop
import mnist_eggroll
from lab import any_signal, cli, experiments
from lab.errors import UserError
from lab.runlog import SUMMARY_KEYS


def pretend(method, typed, folder):
    """What a run leaves behind, without the run."""
    folder.mkdir(parents=True)
    accuracy = 0.8 if method == "backprop" else 0.96
    summary = dict.fromkeys(SUMMARY_KEYS, 1) | {"method": method, "population": 100}
    if "--perturbation=full-rank" in typed:
        summary["method"] = "full-rank-es"
    summary |= {"test_accuracy": accuracy, "dataset": "mnist-sample", "status": "finished"}
    (folder / "summary.json").write_text(json.dumps(summary))
    command = [*experiments.COMMANDS[method][1:], *typed, "--out-dir", str(folder)]
    (folder / "config.json").write_text(json.dumps({"command": command}))


@pytest.fixture
def made(monkeypatch):
    """The folders of the runs that were made, one for each."""
    found = []

    def run(method, typed, folder):
        if not (folder / "summary.json").exists():
            pretend(method, typed, folder)
            found.append(folder)

    monkeypatch.setattr(experiments, "run", run)
    return found


def test_every_row_is_run_once_for_each_seed_and_reported_in_a_folder_of_its_own(made, tmp_path):
    flags = {"backprop": ["--train-on-all"]}

    def experiment(other=()):
        experiments.experiment_with_any_signal(
            lambda method: [*flags.get(method, ["--population", "64"]), *other], [0, 1], tmp_path
        )

    experiment()
    assert len(set(made)) == 2 * len(any_signal.rows()) == len(made)
    folder = tmp_path / "any-signal"
    assert [path.name for path in tmp_path.iterdir()] == ["any-signal"]
    assert (folder / "any_signal.png").stat().st_size > 10_000
    drawn = (folder / "any_signal.svg").read_text()
    table = (folder / "summary.md").read_text()
    for row in any_signal.rows():
        assert row.label in drawn and f"| {row.panel} | {row.label} |" in table
    assert "full-rank-es" in table and "backprop | 100 | 1 | 2 | 80.00 ± 0.00 %" in table
    any_signal.publish(tmp_path, tmp_path / "reference")
    copied = [path.name for path in (tmp_path / "reference").rglob("*.*")]
    assert copied.count("summary.json") == len(made) and "any_signal.png" in copied
    experiment()
    assert len(made) == 2 * len(any_signal.rows())  # all are finished already
    experiment(["--bias"])
    assert len(made) == 4 * len(any_signal.rows())
    assert len(list(tmp_path.glob("any-signal_until_*"))) == 1  # never overwritten
    experiment(["--quick"])
    command = (folder / "fitness" / "accuracy" / "eggroll" / "seed0" / "config.json").read_text()
    assert "--sigma=0.05" in command and "--epochs" not in command


def test_nothing_to_report_is_said(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        any_signal.write_report(tmp_path)


def test_every_row_is_a_command_that_its_script_understands():
    cpu = torch.device("cpu")
    for row in any_signal.rows():
        args = [*experiments.COMMANDS[row.base][1:], *row.flags]
        if row.base == "backprop":
            mnist_backprop.resolve(cli.parse(mnist_backprop.Config, "", args))
        else:
            mnist_eggroll.resolve(cli.parse(mnist_eggroll.Config, "", args), cpu)
