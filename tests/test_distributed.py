"""One population over several processes: bit-identical to one process, and clean ends."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_command
from runs import weights

SMALL = ("--dataset", "mnist-sample", "--hidden-dim", "32", "--threads", "1")


def launcher(processes):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def command(processes, out, *flags, script="mnist_eggroll.py", epochs=1):
    preset = ["node-perturbation", "--population", "24"] if script == "mnist_eggroll.py" else []
    start = [*launcher(processes), ROOT / script, *preset, *SMALL]
    return [str(word) for word in (*start, "--epochs", epochs, "--out-dir", out, *flags)]


def run(processes, out, *flags, **options):
    return run_command(*command(processes, out, *flags, **options))


def test_several_processes_are_bit_identical_to_one_with_every_estimator(tmp_path):
    for processes in (1, 2, 3):
        (tmp_path / str(processes)).mkdir()
        words = [ROOT / "tests" / "several_processes.py", tmp_path / str(processes), 20]
        done = run_command(*launcher(processes), *words, env={"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr  # it compares its processes
    names = [path.name for path in (tmp_path / "1").iterdir()]
    assert len(names) == 8
    for name in names:
        for processes in "23":
            other = (tmp_path / processes / name).read_bytes()
            assert other == (tmp_path / "1" / name).read_bytes(), name


LONG = {"epochs": 16}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run of one process that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert run(1, out, **LONG).returncode == 0
    return weights(out)


def start(out):
    """Start two processes, and return when two epochs are saved."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command(2, out, **LONG), cwd=ROOT, **pipes)
    while True:
        assert process.poll() is None, process.communicate()
        summary = out / "summary.json"
        if summary.exists() and json.loads(summary.read_text())["epochs"] >= 2:
            return process
        time.sleep(0.05)


def test_an_interrupted_run_goes_on_in_another_number_of_processes(whole, tmp_path):
    process = start(tmp_path)
    process.terminate()
    process.communicate(timeout=60)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "interrupted"
    done = run(3, tmp_path, "--resume", **LONG)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout and done.stdout.count("finished: ") == 1
    assert weights(tmp_path) == whole


def test_the_loss_of_a_process_ends_the_others_and_nothing_is_lost(whole, tmp_path):
    process = start(tmp_path)
    children = ["pgrep", "-P", str(process.pid)]
    workers = subprocess.run(children, capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and b"another process has ended" in stderr
    assert run(1, tmp_path, "--resume", **LONG).returncode == 0
    assert weights(tmp_path) == whole


def test_what_is_wrong_is_said_once(tmp_path):
    done = run(2, tmp_path, "--sigma", "0")
    assert done.returncode != 0
    assert done.stderr.count("mnist_eggroll.py: error:") == 1


def test_a_disk_that_is_full_for_rank_0_ends_all_processes(tmp_path):
    """A limit on file size stands for the disk: the checkpoint does not fit."""
    words = shlex.join(command(2, tmp_path))
    done = run_command("bash", "-c", f"ulimit -f 60; exec {words}", timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("mnist_eggroll.py: error: ") == 1
    assert os.strerror(errno.EFBIG) in done.stderr


def test_backprop_refuses_several_processes(tmp_path):
    done = run(2, tmp_path / "run", script="mnist_backprop.py")
    assert done.returncode != 0 and "runs in one process" in done.stderr
    assert not (tmp_path / "run").exists()
