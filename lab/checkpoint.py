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


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """None where there is no checkpoint yet. Raises UserError for one that cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # what rubbish makes the unpickler raise has no end
        raise UserError(
            f"{path} is damaged and cannot be resumed from (start anew with --overwrite)"
        ) from error
