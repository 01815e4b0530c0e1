"""Calls of the training scripts as processes of their own."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from experiment.errors import Diverged, UserError

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "backprop": ("mnist_backprop.py",),
    "eggroll": ("mnist_eggroll.py", "eggroll"),
    "eggroll-dense": ("mnist_eggroll.py", "eggroll-dense"),
    "node-perturbation": ("mnist_eggroll.py", "node-perturbation"),
    "node-perturbation-int8": ("mnist_eggroll_int8.py",),
}


def finish(command: Sequence[str], folder: Path, *flags: str) -> Mapping[str, Any]:
    """Return the summary of the run in a folder, which is made or continued if need be.

    command  script and preset: one of COMMANDS

    Raises Diverged, and UserError with the script's last words where it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        pass  # the run of a process that was killed may still be going on: wait for its end
    status = _read(folder).get("status")
    if status not in ("finished", "diverged"):
        script, *preset = command
        words = [str(ROOT / script), *preset, *flags, "--out-dir", str(folder), "--resume"]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        status = _read(folder).get("status")
        if done.returncode and status != "diverged":
            reason = done.stderr[-2000:] or f"ended with code {done.returncode}"
            raise UserError(f"{' '.join(words)}: {reason}")
    if status == "diverged":
        raise Diverged(f"{folder}: training has diverged")
    return _read(folder)


def _read(folder: Path) -> Mapping[str, Any]:
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}
