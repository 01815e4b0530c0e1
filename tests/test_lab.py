"""The harness: flags, schedules, files, tables."""

import json
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mnist_backprop
from lab import checkpoint, cli, report
from lab.clock import Clock, peak_memory_mb
from lab.divergence import FitnessWatch
from lab.errors import Interrupted, UserError
from lab.optim import make_optimizer, make_schedule
from lab.progress import Progress
from lab.runlog import write_text
from lab.training import Training

CPU = torch.device("cpu")


# ---- flags ----


def test_presets_fill_only_what_was_not_typed():
    config = cli.parse(cli.SharedConfig, "", ["--lr", "0.5"])
    config = cli.apply_preset(config, {"lr": 0.1, "epochs": 7})
    assert (config.training.lr, config.training.epochs) == (0.5, 7)


def test_a_lack_of_memory_names_the_flags_that_need_it(capsys):
    def main():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(SystemExit, match="2"):
        cli.run_script(main, "script", errors=())
    assert "--chunk-size" in capsys.readouterr().err


def test_a_full_disk_says_how_to_go_on(capsys):
    def main():
        raise OSError(28, "No space left on device", "run/checkpoint.pt")

    with pytest.raises(SystemExit, match="2"):
        cli.run_script(main, "script", errors=())
    said = capsys.readouterr().err
    assert "run/checkpoint.pt: No space left" in said and "--resume" in said


# ---- optimizers, schedules ----


def training_flags(**values):
    return cli.TrainingFlags(**{"epochs": 4, "lr": 1.0, **values})


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
    flags = training_flags(lr_schedule=schedule)
    optimizer = make_optimizer(nn.Linear(2, 2), flags)
    steps = make_schedule(optimizer, flags, steps_per_epoch=10)
    rates = []
    for step in range(40):
        if step % 10 == 0:
            rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        steps.step()
    assert rates == pytest.approx(expected, abs=1e-4)


# ---- files ----


def test_a_write_that_fails_leaves_the_last_complete_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_text(path, "complete")

    def disk_full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)  # where a full disk may first be noticed
    with pytest.raises(OSError, match=r"No space left.*summary\.json"):
        write_text(path, "half")
    assert path.read_text() == "complete"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_the_clock_counts_only_what_runs_inside_it():
    clock = Clock(CPU, seconds=5.0)
    assert clock.seconds == 5.0
    with clock.running():
        pass
    assert 5.0 < clock.seconds < 5.5


def test_peak_memory_sees_an_allocation():
    before = peak_memory_mb(CPU)
    block = torch.ones(256 << 20, dtype=torch.uint8)
    assert peak_memory_mb(CPU) >= before
    assert peak_memory_mb(CPU) > block.numel() / 2**20


# ---- tables ----


def summary(method, seed, accuracy, seconds, **values):
    base = dict.fromkeys(report.SUMMARY_KEYS, "")
    base |= {"dataset": "mnist", "epochs": 10, "device": "cpu", "status": "finished"}
    base |= {"method": method, "row": method, "fitness": "cross-entropy", "seed": seed}
    base |= {"peak_memory_mb": 100.0, "forward_passes_per_image": 10.0}
    return base | {"test_accuracy": accuracy, "train_seconds": seconds} | values


def test_the_table_states_mean_deviation_ratio_and_time_to_the_goal():
    rows = [
        summary("backprop", 0, 0.97, 10.0, seconds_to_97_5=2.0),
        summary("backprop", 1, 0.98, 12.0, seconds_to_97_5=4.0),
        summary("eggroll", 0, 0.98, 110.0, population=144, seconds_to_97_5=50.0),
        summary("eggroll", 1, 0.97, 110.0, population=144),  # never gets there
    ]
    lines = report.markdown_table(rows).splitlines()
    assert "| 10 | 10 | 2 | 97.50 ± 0.71 % | 11.0 s | 1.0x | 3.0 s | 100 MB |" in lines[2]
    assert "| 144 | 10 | 10 | 2 | 97.50 ± 0.71 % | 110.0 s | 10.0x |  | 100 MB |" in lines[3]


def test_interrupted_runs_stay_out_of_the_report(tmp_path):
    for seed, status in ((0, "finished"), (1, "interrupted")):
        run = tmp_path / "backprop" / f"seed{seed}"
        run.mkdir(parents=True)
        (run / "summary.json").write_text(
            json.dumps(summary("backprop", seed, 0.97, 1.0, status=status))
        )
        (run / "config.json").write_text('{"flags": {}}')
    assert report.finished_runs(tmp_path) == [tmp_path / "backprop" / "seed0"]


def test_large_seeds_do_not_share_the_order_of_the_examples():
    """PyTorch's CPU generator takes 32 bits of its seed: a plain shift would lose the rest."""
    training = object.__new__(Training)
    training.data = SimpleNamespace(train=range(50))
    training.device = CPU
    orders = set()
    for seed in (0, 1, 4095, 4096, 2**20, 2**32 - 1):
        training.config = SimpleNamespace(run=SimpleNamespace(seed=seed))
        orders |= {tuple(training._order(epoch).tolist()) for epoch in range(3)}
    assert len(orders) == 18


def test_ctrl_c_during_a_save_ends_as_interrupted(mnist_dir, tmp_path, monkeypatch):
    """The save that is under way says 'running': the one after the next step must correct it."""
    flags = ["--data-dir", str(mnist_dir), "--out-dir", str(tmp_path / "run"), "--batch-size", "10"]
    config = cli.parse(mnist_backprop.Config, "", [*flags, "--epochs", "3", "--device", "cpu"])
    save, saves = checkpoint.save, []

    def save_with_ctrl_c(path, state):
        if not saves:
            signal.raise_signal(signal.SIGINT)
        saves.append(path)
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", save_with_ctrl_c)
    with pytest.raises(Interrupted, match="--resume"):
        mnist_backprop.train(mnist_backprop.resolve(config, CPU), CPU)
    left = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (left["status"], len(saves)) == ("interrupted", 2)
    assert torch.load(saves[-1], weights_only=True)["step"] == left["steps"]


def watched(fitness):
    watch = FitnessWatch()
    for step, value in enumerate(fitness):
        watch.add(torch.tensor(value), step)


def test_a_fitness_that_collapses_or_is_no_number_is_a_divergence():
    learning = [-2.3 + 2 * step / 500 for step in range(500)]
    watched(learning + [-0.3] * 200)
    watched([0.1] * 500)  # nothing learned is no divergence
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0)).tolist()
    watched([0.0] + [-0.001] * 100)  # nor is little around nothing
    watched([0.001] + [x + step / 100 for step, x in enumerate(noise)])
    with pytest.raises(UserError, match=r"fell from -0\.\d+ to -2\.3 by step 549"):
        watched(learning + [-2.3] * 100)
    with pytest.raises(UserError, match=r"to -4\.9e\+31 by step 49, and was -2\.3"):
        watched([-2.3] + [-5e31] * 100)
    with pytest.raises(UserError, match="nan at step 0"):
        watched([float("nan")] * 100)


def test_a_terminal_gets_a_bar_and_a_quiet_run_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for quiet in (False, True):
        bar = Progress(total=10, done=4, quiet=quiet)
        bar.show(5, fitness=-1.5, accuracy=0.25)
        bar.line("a line")
        bar.close(6)
        said = capsys.readouterr()
        assert ("6/10" in said.err and "a line" in said.out) is not quiet
        assert bool(said.err or said.out) is not quiet
