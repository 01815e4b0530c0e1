"""Runs that are killed at random moments, and input that is rubbish.

python benchmarks/endurance.py --json results/endurance.json     # a quarter of an hour or so

kills  a run on mnist-sample is killed (SIGKILL) at a random moment and resumed, again and again,
       until it ends; under torchrun one of its processes is killed. After every kill all files
       are complete, and the weights at the end are those of a run that nobody killed, bit for bit.
fuzz   flags, data files, checkpoints, weights, fitness files and environment variables drawn by
       hypothesis: always a line that says what is wrong, or a right result; never a traceback.

Ends with an error at the first case that is not so. Rows say how many there were of each.
"""

import contextlib
import io
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder

from benchmarks.rows import provenance, write_rows
from eggroll import MLP
from lab import checkpoint, cli, data, user_fitness
from lab.cli import PathFlag
from lab.errors import UserError
from lab.experiments import chosen_methods, chosen_seeds
from lab.network import start_from

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "flags.md"
SMALL = ("--dataset", "mnist-sample", "--hidden-dim", "64", "--threads", "1", "--quiet")
EGGROLL = ("mnist_eggroll.py", "--epochs", "40", "--population", "24")
KINDS = {
    "backprop": ("mnist_backprop.py", "--epochs", "300"),
    "example members": EGGROLL,
    "smoothed": (*EGGROLL, "--fitness", "accuracy"),
    "int8": (*EGGROLL, "--dtype", "int8"),
    "batch members": (*EGGROLL, "--members", "batch", "--backend", "eager"),
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
COLUMNS = ("what", "cases", "wrong", "seconds", "ended_within", "device", "torch", "commit")


@dataclass(frozen=True)
class Config:
    """Kill runs at random moments, and give them rubbish."""

    kills: int = 50
    """Kills in all."""
    cases: int = 2_000
    """Rubbish inputs in all."""
    seed: int = 0
    """Of the moments at which runs are killed."""
    json: PathFlag = None
    """File for the rows."""


# ---- kills ----


def start(command: Sequence[str], out: Path, *flags: str) -> subprocess.Popen:
    words = [sys.executable, *command, *SMALL, "--out-dir", str(out), *flags]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, **quiet)


def ended(process: subprocess.Popen, out: Path) -> bytes:
    """The weights of a run that has come to its end."""
    _, stderr = process.communicate(timeout=300)
    if process.returncode:
        raise AssertionError(f"exit code {process.returncode}: {stderr}")
    return (out / "model.safetensors").read_bytes()


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    )
    return [int(word) for word in found.stdout.split()]


def check_files(out: Path) -> None:
    """Every file that is there is complete."""
    for path in out.glob("*.json"):
        json.loads(path.read_text())
    for path in out.glob("*.safetensors"):
        load_file(path)
    for path in out.glob("*.pt"):
        torch.load(path, weights_only=True)
    for path in out.glob("*.csv"):
        lengths = {line.count(",") for line in path.read_text().splitlines()}
        assert len(lengths) == 1, path


def kill_and_resume(command: Sequence[str], kills: int, luck: random.Random, one: bool) -> float:
    """One kind of run: killed `kills` times in all, in as many runs as that takes. Returns the
    longest time in which a run, with all its processes, was at its end."""
    ended_within = 0.0
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        whole = ended(start(command, Path(folder) / "whole"), Path(folder) / "whole")
        longest = time.monotonic() - started
        out, flags = Path(folder) / "killed", ("--overwrite",)
        while kills:
            process = start((*TORCHRUN, *command) if one else command, out, *flags)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(luck.uniform(0.2, 0.9) * longest)
            if process.poll() is None:
                victims = children(process) if one else [process.pid]
                for pid in luck.sample(victims, min(1, len(victims))):
                    os.kill(pid, signal.SIGKILL)
                killed = time.monotonic()
                process.wait(timeout=60)  # one that is killed ends all of them
                ended_within = max(ended_within, time.monotonic() - killed)
                process.stderr.close()
                kills -= 1
                check_files(out)
                flags = ("--resume",) if (out / "config.json").exists() else ("--overwrite",)
            else:
                assert ended(process, out) == whole, "other bits"
                flags = ("--overwrite",)
        assert ended(start(command, out, *flags), out) == whole, "other bits"
    return ended_within


# ---- rubbish ----


def said_in_a_line(function: Callable[[], Any]) -> None:
    """Returns, or raises UserError; anything else is a fault."""
    with contextlib.suppress(UserError):
        function()


WORDS = st.one_of(
    st.integers(-(10**12), 10**12).map(str),
    st.floats().map(str),
    st.sampled_from(["", "auto", "nan", "1e999", "-0", "48+64+16", "0+0+0", "1+", "all", "cuda:9"]),
    st.text(max_size=12).filter(lambda text: "\0" not in text),
)
# what scripts have as flags, and what a run never does here
LEFT_OUT = ("help", "out-dir", "print-config")
FLAGS = st.sampled_from(
    [flag for flag in re.findall(r"--([a-z][a-z-]+)", PAGE.read_text()) if flag not in LEFT_OUT]
)


def flags_case(script: str, words: list[str]) -> None:
    """A script that only prints its flags: exit code 0, or 2 and a line."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [script, "--print-config", *words]
    threads = torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        json.loads(out.getvalue())
    except SystemExit as end:
        assert end.code in (0, 2), (words, end.code)
        assert end.code == 0 or err.getvalue() or out.getvalue(), words
    finally:
        sys.argv = before
        torch.set_num_threads(threads)


def damaged(content: bytes, cut: int, place: int, other: bytes) -> bytes:
    """Some bytes replaced, the end cut off."""
    place %= len(content)
    return (content[:place] + other + content[place + len(other) :])[: len(content) - cut]


DAMAGE = {
    "cut": st.integers(0, 60),
    "place": st.one_of(st.integers(0, 30), st.integers(0, 10**6)),
    "other": st.binary(max_size=8),
}


def idx_files(folder: Path) -> dict[str, bytes]:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for images, labels in data.FILES:
        head = bytes([0, 0, 8, 3, 0, 0, 0, 9, 0, 0, 0, 28, 0, 0, 0, 28])
        (raw / images).write_bytes(head + bytes(9 * 784))
        (raw / labels).write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(range(9)))
    return {path.name: path.read_bytes() for path in raw.iterdir()}


def fuzz(cases: int) -> dict[str, int]:
    """How many of each were tried."""
    shares = {"flags": 0.5, "data files": 0.2, "checkpoints": 0.1, "weights": 0.1}
    shares |= {"fitness files": 0.05, "environment": 0.05}
    counts = {what: max(1, round(cases * share)) for what, share in shares.items()}

    def drawn(what: str, **strategies: Any) -> Callable:
        unlimited = {"deadline": None, "database": None, "derandomize": True}
        options = settings(
            max_examples=counts[what], suppress_health_check=list(HealthCheck), **unlimited
        )
        return lambda test: options(given(**strategies)(test))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        scripts = st.sampled_from(["mnist_backprop.py", "mnist_eggroll.py"])
        typed = st.lists(st.tuples(FLAGS, WORDS), max_size=4)

        @drawn("flags", script=scripts, pairs=typed)
        def flags(script, pairs):
            flags_case(script, [word for flag, value in pairs for word in (f"--{flag}", value)])

        originals = idx_files(folder)

        @drawn("data files", file=st.sampled_from(sorted(originals)), **DAMAGE)
        def data_files(file, **damage):
            path = folder / "MNIST" / "raw" / file
            path.write_bytes(damaged(originals[file], **damage))
            cpu = torch.device("cpu")
            said_in_a_line(lambda: data.load("mnist", folder, cpu, train_on_all=True))
            path.write_bytes(originals[file])

        saved = folder / "checkpoint.pt"
        checkpoint.save(saved, {"step": 3, "network": MLP(4, 3, 2).state_dict()})
        state = saved.read_bytes()

        @drawn("checkpoints", **DAMAGE)
        def checkpoints(**damage):
            saved.write_bytes(damaged(state, **damage))
            said_in_a_line(lambda: checkpoint.load(saved, torch.device("cpu")))

        weights = folder / "model.safetensors"
        save_file(MLP(4, 3, 2).state_dict(), weights)
        content = weights.read_bytes()

        @drawn("weights", **DAMAGE)
        def safetensors(**damage):
            weights.write_bytes(damaged(content, **damage))
            said_in_a_line(lambda: start_from(weights, MLP(4, 3, 2)))

        body = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=40)

        @drawn("fitness files", body=body, number=st.integers(0, 10**9))
        def fitness_files(body, number):
            file = folder / f"f{number}.py"
            file.write_text(f"def own(outputs, labels):\n    return {body}\n")
            cpu = torch.device("cpu")
            said_in_a_line(lambda: user_fitness.load(f"{file}:own").try_out(8, cpu))

        value = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)

        @drawn("environment", value=value)
        def environment(value):
            before = dict(os.environ)
            os.environ |= {"SEEDS": value, "METHODS": value, "MNIST_DIR": value}
            said_in_a_line(lambda: chosen_seeds(on_gpu=False))
            said_in_a_line(lambda: chosen_methods(everything=False))
            said_in_a_line(lambda: data.default_data_dir(None))
            os.environ.clear()
            os.environ |= before

        for case in (flags, data_files, checkpoints, safetensors, fitness_files, environment):
            case()
    return counts


# ---- both ----


def row(what: str, cases: int, seconds: float, ended_within: float | None = None) -> dict[str, Any]:
    """`ended_within`: seconds from a kill to the end of the last process."""
    print(f"{what}: {cases} cases, none wrong, {seconds:.0f} s", flush=True)
    made = provenance(torch.device("cpu"))
    counts = {"cases": cases, "wrong": 0, "seconds": round(seconds)}
    counts["ended_within"] = "" if ended_within is None else round(ended_within, 1)
    return {"what": what, **counts, **made}


def main() -> None:
    config = tyro.cli(Config, config=cli.MARKERS, description=__doc__.splitlines()[0])
    luck, rows = random.Random(config.seed), []
    plans = [(kind, command, False) for kind, command in KINDS.items()]
    plans.append(("one process of two", KINDS["example members"], True))
    for place, (kind, command, one) in enumerate(plans):
        kills = config.kills // len(plans) + (place < config.kills % len(plans))
        started = time.monotonic()
        if kills:
            ended_within = kill_and_resume(command, kills, luck, one)
            rows.append(row(f"kills: {kind}", kills, time.monotonic() - started, ended_within))
    started = time.monotonic()
    if config.cases:
        tried = fuzz(config.cases)
        seconds = time.monotonic() - started
        rows += [row(f"fuzz: {what}", count, seconds) for what, count in tried.items()]
    write_rows(rows, COLUMNS, None, config.json)


if __name__ == "__main__":
    cli.run_script(main, "endurance.py", errors=())
