"""Training scripts as processes of their own."""

import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiment.config import read_config
from experiment.errors import UserError
from experiment.files import ROOT

COMMANDS = {
    "backprop": ("mnist_backprop.py",),
    "eggroll": ("mnist_eggroll.py", "eggroll"),
    "eggroll-dense": ("mnist_eggroll.py", "eggroll-dense"),
    "node-perturbation": ("mnist_eggroll.py", "node-perturbation"),
    "node-perturbation-int8": ("mnist_eggroll_int8.py",),
}
OVER = ("finished", "diverged")


def finish(command: Sequence[str], folder: Path, *flags: str) -> Mapping[str, Any]:
    """Run or resume training; return its summary, whose status is finished or diverged.

    command  script and preset: one of COMMANDS

    Raises UserError where the script fails, and where the folder holds a run with other flags.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script, *preset = command
    typed = [*preset, *flags, "--out-dir", str(folder), "--resume"]
    with _held(folder / ".caller") as lock:
        summary = _read_summary(folder)
        if summary.get("status") not in OVER:
            reason = _run([sys.executable, str(ROOT / script), *typed], lock)
            summary = _read_summary(folder)
            if reason and summary.get("status") not in OVER:
                raise UserError(f"{script} {' '.join(typed)}: {reason}")
        saved = read_config(folder)["command"]
    if saved[1:-3] != typed[:-3]:  # all but --out-dir FOLDER --resume
        raise UserError(
            f"{folder} holds a run of {' '.join(saved[1:-3])}, not of {' '.join(typed[:-3])} (give "
            "another --out-dir)"
        )
    return summary


@contextmanager
def _held(path: Path) -> Iterator[int]:
    """Lock a file; yields its descriptor. A process that inherits it keeps the lock."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the run in {path.parent}, which goes on", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _run(command: Sequence[str], lock: int) -> str:
    """Run a command that inherits the lock; return its error message, '' where it succeeds."""
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, pass_fds=[lock]) as process:
        try:
            errors = process.communicate()[1]
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C reaches it too: let it save
            raise
    words = " ".join(re.sub("[─│╭╮╰╯]", " ", errors).split())
    return (words[-1000:] or f"exit code {process.returncode}") if process.returncode else ""


def _read_summary(folder: Path) -> Mapping[str, Any]:
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}
