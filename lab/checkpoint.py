"""Everything that a run needs to go on as if it had never stopped."""

import io
from pathlib import Path
from typing import Any

import torch

from lab.errors import UserError
from lab.runlog import write_atomically


def save(path: Path, state: dict[str, Any]) -> None:
    # through memory: writing itself, torch.save would hide that the disk is full
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(path, content.getvalue())


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Raises UserError where there is no checkpoint, or it cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not there: the run stopped before its first checkpoint "
            "(start it anew with --overwrite)"
        ) from error
    except Exception as error:  # what rubbish makes the unpickler raise has no end
        raise UserError(
            f"{path} is damaged and cannot be resumed from (start anew with --overwrite)"
        ) from error
