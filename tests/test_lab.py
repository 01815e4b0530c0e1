"""The harness: data, flags, files, tables."""

import gzip
import json
import random
import shutil
import signal
import socket
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mnist_backprop
from eggroll import MLP
from lab import checkpoint, cli, data, report
from lab.clock import Clock, peak_memory_mb
from lab.divergence import FitnessWatch
from lab.errors import Interrupted, UserError
from lab.evaluation import measure
from lab.optim import make_optimizer, make_schedule
from lab.progress import Progress
from lab.runlog import write_text
from lab.training import Training

CPU = torch.device("cpu")


def write_idx(path, array_bytes, *shape):
    header = struct.pack(">BBBB", 0, 0, 8, len(shape)) + struct.pack(f">{len(shape)}I", *shape)
    path.write_bytes(header + array_bytes)


@pytest.fixture
def mnist_dir(tmp_path):
    """A folder in torchvision's layout that holds a few images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", 80), ("t10k", 20)):
        pixels = random.Random(prefix).randbytes(n * 784)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", pixels, n, 28, 28)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", bytes(i % 10 for i in range(n)), n)
    return tmp_path


# ---- data ----


def test_files_that_are_there_are_used_without_a_network(mnist_dir):
    digits = data.load("mnist", mnist_dir, CPU)
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (70, 10, 20)
    assert digits.train.images.dtype == torch.uint8
    scaled = digits.scale(digits.train.images)
    assert abs(scaled.mean()) < 1e-4 and abs(scaled.std() - 1) < 1e-3


def test_the_validation_split_is_fixed_and_disjoint(mnist_dir):
    first, second = (data.load("mnist", mnist_dir, CPU) for _ in range(2))
    assert torch.equal(first.validation.images, second.validation.images)
    rows = {bytes(image.numpy()) for image in first.train.images}
    assert not rows & {bytes(image.numpy()) for image in first.validation.images}


def test_train_on_all_holds_nothing_out(mnist_dir):
    digits = data.load("mnist", mnist_dir, CPU, train_on_all=True)
    assert (len(digits.train), len(digits.validation)) == (80, 0)


def test_quantised_images_are_the_scaled_ones_rounded(mnist_dir):
    digits = data.load("mnist", mnist_dir, CPU)
    wanted = (digits.scale(digits.test.images) * 16).round().clamp(-127, 127)
    integers = data.quantised(digits, 16)
    assert integers.test.images.dtype == torch.int8
    assert torch.equal(integers.scale(integers.test.images).float(), wanted)


def test_a_download_is_announced_and_used(mnist_dir, tmp_path, monkeypatch, capsys):
    """Torchvision's own download, here a copy of files that lie elsewhere."""

    def download(self):
        shutil.copytree(mnist_dir / "MNIST", Path(self.root) / "MNIST", dirs_exist_ok=True)

    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    assert len(data.load("mnist", tmp_path / "empty", CPU).train) == 70
    assert "downloading it" in capsys.readouterr().err


def test_accuracy_and_cross_entropy_are_means_over_all_examples(mnist_dir, monkeypatch):
    monkeypatch.setattr("lab.evaluation.BATCH", 7)  # the last batch is cut off
    digits, network = data.load("mnist", mnist_dir, CPU), MLP(hidden_dim=8)
    logits = network(digits.scale(digits.test.images))
    hits = (logits.argmax(-1) == digits.test.labels).float().mean().item()
    nats = nn.functional.cross_entropy(logits, digits.test.labels).item()
    found = measure(network, digits, digits.test)
    assert (found.accuracy, found.cross_entropy) == pytest.approx((hits, nats), abs=1e-5)
    # every digit has as many images
    assert sum(found.by_digit) / 10 == pytest.approx(hits, abs=1e-5)
    assert found.lost == [digit for digit, right in enumerate(found.by_digit) if right == 0]


def test_the_sample_is_stratified_and_fixed():
    digits = data.load("mnist-sample", Path("nowhere"), CPU, train_on_all=True)
    assert (len(digits.train), len(digits.test)) == (4000, 1000)
    assert digits.test.labels.bincount().tolist() == [100] * 10
    again = data.load("mnist-sample", Path("nowhere"), CPU, train_on_all=True)
    assert torch.equal(digits.train.images, again.train.images)


def truncate(path):
    path.write_bytes(path.read_bytes()[:500])


def empty(path):
    path.write_bytes(b"")


def html(path):
    path.write_text("<html>403 Forbidden</html>" * 40)


def wrong_size(path):
    write_idx(path, bytes(80 * 10 * 10), 80, 10, 10)


@pytest.mark.parametrize("damage", [truncate, empty, html, wrong_size])
@pytest.mark.parametrize("prefix", ["train", "t10k"])
def test_a_damaged_image_file_is_named(mnist_dir, damage, prefix):
    bad = mnist_dir / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte"
    damage(bad)
    with pytest.raises(UserError, match=f"{prefix}-images-idx3-ubyte is damaged"):
        data.load("mnist", mnist_dir, CPU)


def test_labels_of_another_dataset_are_named(mnist_dir):
    bad = mnist_dir / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(bad, bytes([11] * 80), 80)
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte is damaged.*beyond 9"):
        data.load("mnist", mnist_dir, CPU)
    write_idx(bad, bytes([1] * 79), 79)
    with pytest.raises(UserError, match="79 labels for 80 images"):
        data.load("mnist", mnist_dir, CPU)


def test_missing_data_names_the_three_ways_out_and_a_dead_mirror_times_out(tmp_path, monkeypatch):
    timeouts = []

    def no_network(*_, **__):
        timeouts.append(socket.getdefaulttimeout())
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(data.DataMissing) as missing:
        data.load("mnist", tmp_path, CPU)
    text = str(missing.value)
    assert all(way in text for way in ("put the four files", "--data-dir", "mnist-sample"))
    assert "\n" not in text
    assert set(timeouts) == {data.DOWNLOAD_TIMEOUT} and socket.getdefaulttimeout() is None


def test_the_data_dir_is_the_flag_then_the_variable_then_data(monkeypatch):
    monkeypatch.setenv("MNIST_DIR", "from-variable")
    assert data.default_data_dir(Path("typed")) == Path("typed")
    assert data.default_data_dir(None) == Path("from-variable")
    monkeypatch.delenv("MNIST_DIR")
    assert data.default_data_dir(None) == Path("data")


def test_fashion_mnist_is_read_from_its_own_folder(mnist_dir):
    shutil.move(mnist_dir / "MNIST", mnist_dir / "FashionMNIST")
    assert len(data.load("fashion-mnist", mnist_dir, CPU).train) == 70


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


def test_gzipped_files_are_unpacked_or_reported(mnist_dir):
    """Only the archives are there, and they are not the published ones: one line, no traceback."""
    raw = mnist_dir / "MNIST" / "raw"
    for path in list(raw.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    with pytest.raises(UserError):
        data.load("mnist", mnist_dir, CPU)


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
