"""Data: files that exist, are damaged or missing, and mirrors that misbehave."""

import gzip
import hashlib
import http.server
import shutil
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import write_idx
from torch import nn
from torchvision import datasets

from experiment import data, evaluation
from experiment.config import Config
from experiment.errors import UserError
from model import MLP

CPU = torch.device("cpu")


def load(folder=None, dataset="mnist", **flags):
    return data.load(Config(data_dir=folder, dataset=dataset, **flags), CPU)


def test_files_that_exist_are_used_without_a_network(mnist_dir):
    digits = load(mnist_dir)
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (70, 10, 20)
    assert digits.train.images.dtype == torch.uint8


def test_scaled_pixels_have_the_mean_image_subtracted_and_one_common_scale(mnist_dir, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 32)  # the last chunk is cut off
    digits = load(mnist_dir)
    images = digits.train.images.double()
    centred = images - images.mean(0)
    expected = centred / centred.square().mean().sqrt()
    torch.testing.assert_close(digits.scale(digits.train.images), expected.float())


def test_the_validation_split_is_fixed_and_disjoint(mnist_dir):
    first, second = (load(mnist_dir) for _ in range(2))
    assert torch.equal(first.validation.images, second.validation.images)
    rows = {bytes(image.numpy()) for image in first.train.images}
    assert not rows & {bytes(image.numpy()) for image in first.validation.images}


def test_train_on_all_holds_nothing_out(mnist_dir):
    digits = load(mnist_dir, train_on_all=True)
    assert (len(digits.train), len(digits.validation)) == (80, 0)


def test_quantised_images_are_the_scaled_ones_rounded_in_place(mnist_dir):
    digits, memory = load(mnist_dir), load(mnist_dir)
    for part in ("train", "validation", "test"):
        before, integers = getattr(digits, part), getattr(data.quantised(load(mnist_dir), 16), part)
        expected = (digits.scale(before.images) * 16).round().clamp(-127, 127)
        assert integers.images.dtype == torch.int8
        assert torch.equal(integers.images.float(), expected)
        assert torch.equal(integers.labels, before.labels)
    converted = data.quantised(memory, 16)
    assert converted.train.images.data_ptr() == memory.train.images.data_ptr()
    assert converted.scale(converted.test.images) is converted.test.images


def orders(digits, epoch, seed, first=0):
    batches = map(digits.batch, digits.batches(epoch, seed, 16, first))
    return torch.cat([labels for _, labels in batches])


def test_every_epoch_has_an_order_of_its_own_keyed_by_seed_and_epoch(mnist_dir):
    digits = load(mnist_dir)
    whole = orders(digits, 3, 7)
    assert digits.steps(16) == 5 and len(whole) == 70
    assert torch.equal(orders(digits, 3, 7), whole)
    assert torch.equal(orders(digits, 3, 7, first=2), whole[32:])
    for epoch, seed in ((4, 7), (3, 8), (3, 7 + 2**20), (3, 7 + 2**31)):
        assert not torch.equal(orders(digits, epoch, seed), whole)


def test_a_batch_larger_than_the_data_is_refused(mnist_dir):
    with pytest.raises(UserError, match=r"--batch-size must be <= 70.*got 71"):
        load(mnist_dir).steps(71)


def test_a_download_is_announced_and_used(mnist_dir, tmp_path, monkeypatch, capsys):
    """Torchvision's own download is replaced by a copy of files that lie elsewhere."""

    def download(self):
        shutil.copytree(mnist_dir / "MNIST", Path(self.root) / "MNIST", dirs_exist_ok=True)

    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    assert len(load(tmp_path / "empty").train) == 70
    assert "downloading it" in capsys.readouterr().err


def test_accuracy_and_cross_entropy_are_means_over_all_examples(mnist_dir, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 7)  # the last batch is cut off
    digits, network = load(mnist_dir), MLP(hidden_dim=8)
    logits = network(digits.scale(digits.test.images))
    accuracy = (logits.argmax(-1) == digits.test.labels).float().mean().item()
    nats = nn.functional.cross_entropy(logits, digits.test.labels).item()
    result = evaluation.evaluate(network, digits, digits.test)
    assert (result.accuracy, result.cross_entropy) == pytest.approx((accuracy, nats), abs=1e-5)
    # every digit has as many images
    assert sum(result.by_class) / 10 == pytest.approx(accuracy, abs=1e-5)
    collapsed = [digit for digit, right in enumerate(result.by_class) if right == 0]
    assert result.collapsed_classes == collapsed


def test_the_sample_is_stratified_and_its_split_never_changes():
    digits = load(dataset="mnist-sample", train_on_all=True)
    assert (len(digits.train), len(digits.test)) == (4000, 1000)
    assert digits.test.labels.bincount().tolist() == [100] * 10
    digits = load(dataset="mnist-sample")
    assert len(digits.validation) == 500
    assert digits.validation.labels[:8].tolist() == [5, 6, 9, 9, 9, 8, 5, 7]
    assert digits.test.images.int().sum().item() == 26_621_066


def test_the_checksum_is_of_all_files_and_not_of_the_split(mnist_dir):
    usual = load(mnist_dir)
    assert len(usual.checksum) == 64
    assert load(mnist_dir, train_on_all=True).checksum == usual.checksum
    assert data.quantised(load(mnist_dir), 16).checksum == usual.checksum
    labels = mnist_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    write_idx(labels, bytes([1] * 20), 20)
    assert load(mnist_dir).checksum != usual.checksum


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
        load(mnist_dir)


def test_labels_of_another_dataset_are_named(mnist_dir):
    bad = mnist_dir / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(bad, bytes([11] * 80), 80)
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte is damaged.*above 9"):
        load(mnist_dir)
    write_idx(bad, bytes([1] * 79), 79)
    with pytest.raises(UserError, match="79 labels for 80 images"):
        load(mnist_dir)


@pytest.fixture
def no_network(monkeypatch):
    """Cut the network; returns the timeouts of the attempts."""
    timeouts = []

    def urlopen(*_, **__):
        timeouts.append(socket.getdefaulttimeout())
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return timeouts


def test_missing_data_names_three_remedies_and_a_silent_mirror_times_out(tmp_path, no_network):
    with pytest.raises(data.DataMissing) as missing:
        load(tmp_path)
    text = str(missing.value)
    assert all(remedy in text for remedy in ("put the four files", "--data-dir", "mnist-sample"))
    assert "\n" not in text
    assert set(no_network) == {data.DOWNLOAD_TIMEOUT} and socket.getdefaulttimeout() is None


def test_the_experiment_falls_back_to_the_sample_loudly(
    tmp_path, no_network, mnist_dir, monkeypatch, capsys
):
    def fallback(*words):
        monkeypatch.setattr(sys, "argv", ["data", *map(str, words)])
        data.print_fallback_flags()
        return capsys.readouterr()

    said = fallback("--lr", "1", "--data-dir", tmp_path / "empty")
    assert said.out == "--dataset mnist-sample --epochs 30\n" and "NOT the full MNIST" in said.err
    assert fallback("--dataset", "kmnist").out == fallback("--data-dir", mnist_dir).out == ""


def test_the_data_dir_is_the_flag_then_the_variable_then_data(monkeypatch):
    monkeypatch.setenv("MNIST_DIR", "from-variable")
    assert data.default_data_dir(Path("typed")) == Path("typed")
    assert data.default_data_dir(None) == Path("from-variable")
    monkeypatch.delenv("MNIST_DIR")
    assert data.default_data_dir(None) == Path("data")


def test_fashion_mnist_is_read_from_its_own_folder(mnist_dir):
    shutil.move(mnist_dir / "MNIST", mnist_dir / "FashionMNIST")
    assert len(load(mnist_dir, "fashion-mnist").train) == 70


def test_archives_other_than_the_published_ones_are_refused(mnist_dir, no_network):
    raw = mnist_dir / "MNIST" / "raw"
    for path in list(raw.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    with pytest.raises(UserError):
        load(mnist_dir)


# ---- mirrors ----


@pytest.fixture
def mirror(mnist_dir):
    """Return a function that starts a mirror of mnist_dir with a fault, and returns its address."""
    files = {f"/{p.name}.gz": gzip.compress(p.read_bytes()) for p in mnist_dir.rglob("*-ubyte")}
    servers, closing = [], threading.Event()

    def start(fault):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if fault == "403":
                    self.send_error(403)
                    return
                content = b"<html></html>" if fault == "other" else files[self.path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if fault else content)
                if fault == "silent":
                    closing.wait(20)

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    start.sums = [(name[1:], hashlib.md5(content).hexdigest()) for name, content in files.items()]
    yield start
    closing.set()
    for server in servers:
        server.shutdown()
        server.server_close()


FAULTS = ("403", "silent", "half", "other")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_mirror_is_skipped(fault, mirror, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(datasets.MNIST, "resources", mirror.sums)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [mirror(fault), mirror("")])
    found = load(tmp_path / "new", train_on_all=True)
    assert len(found.train) and len(found.test)


def test_faulty_mirrors_alone_end_in_one_line(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(datasets.MNIST, "resources", mirror.sums)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [mirror(fault) for fault in FAULTS])
    with pytest.raises(data.DataMissing, match="--data-dir") as missing:
        load(tmp_path / "new")
    assert "\n" not in str(missing.value)
