"""The processes of one run under torchrun; without torchrun there is one process."""

import os
import zlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from experiment.errors import UserError

Result = TypeVar("Result")

TIMEOUT = timedelta(minutes=10)  # rank 0 may compile, download or evaluate in the meantime


def _variable(name: str, alone: int) -> int:
    """Return a variable of torchrun, and `alone` without torchrun (clusters set them as well)."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


def count() -> int:
    return _variable("WORLD_SIZE", 1)


def rank() -> int:
    return _variable("RANK", 0)


def local_rank() -> int:
    return _variable("LOCAL_RANK", 0)


def local_count() -> int:
    return _variable("LOCAL_WORLD_SIZE", 1)


def refuse(script: str) -> None:
    """Raise UserError under torchrun, for a script whose processes would all do the same."""
    if count() > 1:
        raise UserError(f"{script} runs in one process (type: python {script})")


def join(device: torch.device) -> None:
    """Connect to the other processes."""
    if count() == 1 or dist.is_initialized():
        return
    # torch.optim imports this module later, and what it binds then would outlive the group's
    # destruction and abort the process at its exit
    import torch.distributed.nn.functional  # noqa: F401

    cuda = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if cuda else None)


def leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def lost_peer(error: BaseException | None) -> bool:
    """Return True if a collective failed because another process has ended."""
    joined = dist.is_available() and dist.is_initialized()
    return joined and (isinstance(error, dist.DistError) or "gloo" in str(error))


def rank0_first(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0, then on the others: they find what rank 0 downloads."""
    if count() == 1:
        return work()
    if rank() > 0:
        dist.barrier()
    result = work()
    if rank() == 0:
        dist.barrier()
    return result


def check_same(weights: Iterable[Tensor], step: int) -> None:
    """Raise UserError where the weights of two processes differ in a bit."""
    if count() == 1:
        return
    total = 0
    for weight in weights:
        content = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
        total = zlib.crc32(content.tobytes(), total)
    totals: list[Any] = [None] * count()
    dist.all_gather_object(totals, total)
    other = next((r for r, found in enumerate(totals) if found != totals[0]), None)
    if other is not None:
        raise UserError(
            f"at step {step:,} the weights of rank {other} differ from those of rank 0: use the "
            "same --threads and kind of machine for all, and a fitness that is deterministic"
        )
