"""One population over several processes: the same bits as one, and ends that are clean."""

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
from hypothesis import given
from hypothesis import strategies as st

from eggroll import BatchMembers, ExampleMembers
from eggroll.distributed import share_out
from eggroll.members import make_blocks

SMALL = ("--dataset", "mnist-sample", "--hidden-dim", "32", "--threads", "1")


def launcher(processes, *options):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return [sys.executable, *(torchrun if processes > 1 else []), *options]


def command(processes, out, *flags, script="mnist_eggroll.py", epochs=1, options=()):
    start = [*launcher(processes, *options), ROOT / script, *SMALL]
    return [str(word) for word in (*start, "--epochs", epochs, "--out-dir", out, *flags)]


def run(processes, out, *flags, **options):
    return run_command(*command(processes, out, *flags, **options))


def weights(out):
    return (out / "model.safetensors").read_bytes()


def test_several_processes_train_every_kind_of_members_to_the_bits_of_one(tmp_path):
    for processes in (1, 2, 3):
        (tmp_path / str(processes)).mkdir()
        words = [tmp_path / str(processes), 20]
        start = [*launcher(processes), ROOT / "tests" / "several_processes.py"]
        done = run_command(*start, *words, env={"PYTHONPATH": str(ROOT)})  # compares its processes
        assert done.returncode == 0, done.stderr
    for path in (tmp_path / "1").iterdir():
        if "drawn" not in path.name:
            for processes in "23":
                assert (tmp_path / processes / path.name).read_bytes() == path.read_bytes(), path


def test_the_script_shares_out_its_members_and_has_one_voice(tmp_path):
    done = run(2, tmp_path, "--population", "32+32+10")
    assert done.returncode == 0, done.stderr
    assert "74 members over 2 processes: 32, 42" in done.stdout
    assert done.stdout.count("finished: ") == 1


LONG = {"epochs": 16}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run of one process that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert run(1, out, "--population", "20", **LONG).returncode == 0
    return weights(out)


def start(out, *options):
    """Two processes, once two checkpoints are there."""
    words = command(2, out, "--population", "20", options=options, **LONG)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, cwd=ROOT, **pipes)
    while not (out / "checkpoint.previous.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    return process


def test_another_number_of_processes_goes_on_with_the_same_bits(whole, tmp_path):
    process = start(tmp_path)
    process.terminate()
    process.communicate(timeout=60)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "interrupted"
    done = run(3, tmp_path, "--population", "20", "--resume", **LONG)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout
    assert weights(tmp_path) == whole


def test_torchrun_starts_a_killed_run_again_by_itself(whole, tmp_path):
    process = start(tmp_path, "--max-restarts", "1")
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert b"process 0 of 2: another process has ended" in stderr and b"Traceback" not in stderr
    assert b"going on from step" in stdout
    assert weights(tmp_path) == whole


def test_what_is_wrong_is_said_once(tmp_path):
    done = run(2, tmp_path, "--population", "1")
    assert done.returncode != 0
    assert done.stderr.count("mnist_eggroll.py: error:") == 1


def test_a_disk_that_is_full_for_the_first_process_ends_all_of_them(tmp_path):
    """A limit on file size stands for the disk: the checkpoint no longer fits."""
    words = shlex.join(command(2, tmp_path, "--population", "20"))
    done = run_command("bash", "-c", f"ulimit -f 60; exec {words}", timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("mnist_eggroll.py: error: process 0 of 2: ") == 1
    assert os.strerror(errno.EFBIG) in done.stderr


def test_backprop_is_not_run_several_times(tmp_path):
    done = run(2, tmp_path / "run", script="mnist_backprop.py")
    assert done.returncode != 0 and "runs in one process" in done.stderr
    assert not (tmp_path / "run").exists()


@given(st.integers(1, 400), st.integers(1, 9))
def test_whole_blocks_are_shared_out_as_evenly_as_they_can_be(population, processes):
    members = BatchMembers(2 * population)
    blocks = make_blocks([(None, 2 * population)], 32)
    shares = share_out(blocks, lambda block: members.cost(block, [8, 4]), processes)
    assert [block for share in shares for block in share] == blocks
    counts = [len(share) for share in shares]
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


def test_shares_follow_what_members_cost():
    members = ExampleMembers((96, 128, 16))
    blocks = make_blocks([(0, 96), (1, 128), (2, 16)], 16)
    shares = share_out(blocks, lambda block: members.cost(block, [256, 256, 10]), 2)
    found = [sum(members.cost(block, [256, 256, 10]) for block in share) for share in shares]
    assert max(found) < 0.65 * sum(found)
    assert [sum(map(len, share)) for share in shares] == [64, 176]
