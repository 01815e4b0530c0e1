"""Everything that a run needs to go on as if it had never stopped."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch

from lab.errors import UserError
from lab.runlog import write_atomically


def save(path: Path, state: dict[str, Any]) -> None:
    """The checkpoint that was there before is kept beside it."""
    # through memory: writing itself, torch.save would hide that the disk is full
    content = io.BytesIO()
    torch.save(state, content)
    if path.exists():
        path.replace(before(path))
    write_atomically(path, content.getvalue())


def before(path: Path) -> Path:
    """Where the checkpoint before the last one is."""
    return path.with_suffix(f".previous{path.suffix}")


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The last checkpoint that can be read, with a warning where that is the one before; None
    where there is none yet. Raises UserError where all there are cannot be read."""
    damaged = None
    for candidate in (path, before(path)):
        try:
            state = torch.load(candidate, map_location=device, weights_only=True)
        except FileNotFoundError:
            continue
        except Exception as error:  # what rubbish makes the unpickler raise has no end
            damaged = error
            continue
        if damaged:
            warnings.warn(f"{path} is damaged, going on from {candidate.name}", stacklevel=2)
        return state
    if damaged:
        raise UserError(
            f"{path} is damaged and cannot be resumed from (start anew with --overwrite)"
        ) from damaged
    return None
