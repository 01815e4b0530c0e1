"""Data: files that are there, damaged, missing, and mirrors that misbehave."""

import gzip
import hashlib
import http.server
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch
from conftest import write_idx
from torch import nn
from torchvision import datasets

from eggroll import MLP
from lab import data
from lab.errors import UserError
from lab.evaluation import measure

CPU = torch.device("cpu")


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


def test_gzipped_files_are_unpacked_or_reported(mnist_dir):
    """Only the archives are there, and they are not the published ones: one line, no traceback."""
    raw = mnist_dir / "MNIST" / "raw"
    for path in list(raw.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    with pytest.raises(UserError):
        data.load("mnist", mnist_dir, CPU)


# ---- mirrors ----


@pytest.fixture
def mirror(mnist_dir):
    """A function that starts a mirror with a fault ("403", "silent", "half", "other", or none) and
    gives its address. The files are those of mnist_dir, gzipped."""
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
def test_a_mirror_at_fault_is_left_for_the_next(fault, mirror, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(datasets.MNIST, "resources", mirror.sums)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [mirror(fault), mirror("")])
    found = data.load("mnist", tmp_path / "new", CPU, train_on_all=True)
    assert len(found.train) and len(found.test)


def test_mirrors_that_are_all_at_fault_end_in_the_three_ways_out(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(datasets.MNIST, "resources", mirror.sums)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [mirror(fault) for fault in FAULTS])
    with pytest.raises(data.DataMissing, match="--data-dir") as missing:
        data.load("mnist", tmp_path / "new", CPU)
    assert "\n" not in str(missing.value)
