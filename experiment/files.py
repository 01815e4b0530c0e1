"""Files of a run, written atomically: a reader or a crash never sees half a file."""

import csv
import io
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

from experiment.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RUN_FILES = (
    "config.json",
    "metrics.csv",
    "summary.json",
    "train.log",
    "checkpoint.pt",
    "model.safetensors",
)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write beside the file, then rename over it.

    Raises OSError that names the file; its earlier content is then still there.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # give a full disk its space back
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows under the given columns; missing cells are left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def open_folder(path: Path, *, resume: bool, overwrite: bool) -> FileLock:
    """Create and lock a run's folder; release the lock that it returns at the end.

    Raises UserError where another process writes to it, or where it holds a run and neither
    `resume` nor `overwrite` is set.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"another process is writing to {path} (wait for it, or give another --out-dir)"
        ) from error
    if overwrite:
        for name in RUN_FILES:
            (path / name).unlink(missing_ok=True)
    elif not resume and (path / "config.json").exists():
        raise UserError(
            f"{path} already holds a run: type --resume to continue it, --overwrite to replace it, "
            "or another --out-dir"
        )
    return lock


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    content = io.BytesIO()  # torch.save to a file would not report a full disk
    torch.save(state, content)
    write_atomically(path, content.getvalue())


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """Return the saved state, None without a file. Raises UserError where it is damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # the unpickler raises anything on a damaged file
        raise UserError(f"{path} is damaged: start again with --overwrite") from error


def save_weights(path: Path, network: nn.Module) -> None:
    """Write the weights alone, without metadata: equal weights give equal bytes."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomically(path, safetensors_bytes(weights))


def load_weights(path: Path, network: nn.Module) -> None:
    """Load a model.safetensors into the network.

    Raises UserError for a file that cannot be read or that holds another network.
    """
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    expected = {name: _describe(tensor) for name, tensor in network.state_dict().items()}
    found = {name: _describe(tensor) for name, tensor in saved.items()}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} holds another network: expected {name} {expected.get(name, 'missing')}, "
                f"got {found.get(name, 'missing')} (type the flags that it was trained with)"
            )
    network.load_state_dict(saved)


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def commit() -> str | None:
    """Return the commit of the code, '-dirty' if it was changed since; None outside a checkout."""
    here = str(Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
