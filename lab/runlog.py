"""What a run leaves on disk. Every file is complete at any moment, whenever the run is killed."""

import csv
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save as safetensors_bytes
from torch import nn

from lab.cli import as_json
from lab.clock import device_name
from lab.errors import UserError

SUMMARY_KEYS = (
    "method",
    "dataset",
    "seed",
    "epochs",
    "steps",
    "population",
    "members_per_step",
    "forward_passes_per_image",
    "test_accuracy",
    "validation_accuracy",
    "train_seconds",
    "seconds_to_97_5",
    "compile_seconds",
    "peak_memory_mb",
    "device",
    "status",
)

RUN_FILES = (
    "config.json",
    "metrics.csv",
    "summary.json",
    "train.log",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "model.safetensors",
)


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the file, then rename over it: a reader or a crash never sees half a file.

    Raises OSError that names the file; what was there before is then still there.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # a full disk gets back what the failed attempt took
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Rows under the given columns; what a row lacks is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def default_out_dir(method: str, dataset: str, seed: int) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return Path("results") / "runs" / f"{stamp}_{method}_{dataset}_seed{seed}"


class RunFolder:
    """One run's folder: config.json, metrics.csv, summary.json, train.log and the weights.

    Raises UserError where the folder holds another run that nobody asked to resume or replace,
    or where another process is writing to it.
    """

    def __init__(self, path: Path, *, resume: bool, overwrite: bool):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"another process is writing to {path} (wait for it, or give another --out-dir)"
            ) from error
        if (self.path / "config.json").exists() and not resume:
            if not overwrite:
                raise UserError(
                    f"{path} already holds a run: type --resume to go on with it, --overwrite to "
                    "replace it, or another --out-dir"
                )
            self._clear()

    def _clear(self) -> None:
        for name in RUN_FILES:
            (self.path / name).unlink(missing_ok=True)

    @property
    def has_run(self) -> bool:
        return (self.path / "config.json").exists()

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    def write_config(self, method: str, config: object, device: torch.device) -> None:
        """All flags, resolved, with the versions, device and commit that the run was made with."""
        record = {
            "method": method,
            "command": sys.argv[1:],
            "flags": as_json(config),
            "device": device_name(device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "platform": platform.platform(),
            },
            "commit": commit(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        write_text(self.path / "config.json", json.dumps(record, indent=2) + "\n")

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = dict.fromkeys(key for row in rows for key in row)  # some begin after epoch 0
        write_csv(self.path / "metrics.csv", rows, list(columns))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def write_model(self, network: nn.Module) -> None:
        """The weights alone, by name, readable by safetensors.torch.load_file."""
        weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
        write_atomically(self.path / "model.safetensors", safetensors_bytes(weights))

    def log(self, line: str) -> None:
        with (self.path / "train.log").open("a") as file:
            file.write(line + "\n")


class NoFolder(RunFolder):
    """What the other processes of a run have in its place: they read, and write nothing."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def write_config(self, *_: Any) -> None: ...

    def write_metrics(self, *_: Any) -> None: ...

    def write_summary(self, *_: Any) -> None: ...

    def log(self, *_: Any) -> None: ...


def commit() -> str | None:
    """The commit of the code, '-dirty' where it was changed since; None outside of a checkout."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
