"""The processes of one run under torchrun: who is first, and what all have to agree on.

Without torchrun there is one process, and everything here returns what it was given.
"""

import os
import zlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lab.errors import UserError

Found = TypeVar("Found")

TIMEOUT = timedelta(minutes=10)  # the first may compile, or ask a slow fitness


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def count() -> int:
    """Of this run; 1 without torchrun, whatever a cluster has set WORLD_SIZE to."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def rank() -> int:
    return int(os.environ["RANK"]) if count() > 1 else 0


def is_first() -> bool:
    return rank() == 0


def name() -> str:
    """Of this process, for a line that it prints; empty where it is the only one."""
    return f"process {rank()} of {count()}: " if count() > 1 else ""


def restarted() -> bool:
    """Whether torchrun has started this run again after a failure."""
    return under_torchrun() and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0


def only_one(script: str) -> None:
    """Raises UserError under torchrun, for a script that would do the same in every process."""
    if count() > 1:
        raise UserError(f"{script} runs in one process (type: python {script})")


def own_threads() -> int:
    """The cores of this machine, shared among its processes."""
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if count() > 1 else 1
    return max(1, (os.cpu_count() or 1) // here)


def join(device: torch.device) -> None:
    """Meet the other processes; once, before anything is shared."""
    if count() > 1 and not joined():
        # what is said between processes goes over the CPU, also where members are on a GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        options = {"rank": rank(), "world_size": count(), "timeout": TIMEOUT}
        dist.init_process_group(backend, store=_store(), **options)


def _store() -> dist.Store | None:
    """Where the processes of this attempt find each other. torchrun's own store still has the
    addresses of those before; over several machines its counts of restarts can differ."""
    if os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        return None
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def recorded(main: Callable[[], None]) -> Callable[[], None]:
    """The same, whose error torchrun repeats in its last words."""
    if not under_torchrun():
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(main)


def lost_another(error: Exception) -> bool:
    """Whether that is what the end of another process does to this one."""
    return joined() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def leave() -> None:
    if joined():
        dist.destroy_process_group()


def from_first(value: Any) -> Any:
    """The first process's value, in all of them."""
    if count() == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found)
    return found[0]


def first_says(number: int) -> int:
    """The same of a number, for every step: without pickling, at a third of the time."""
    if count() == 1:
        return number
    said = torch.tensor([number])
    dist.broadcast(said, 0)
    return int(said)


def first_then_all(work: Callable[[], Found]) -> Found:
    """Of the first process, then of the others: what it downloads they find."""
    if not is_first():
        from_first(None)
    found = work()
    if is_first():
        from_first(None)
    return found


def of_all(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def check_same(weights: Iterable[Tensor], step: int) -> None:
    """Raises UserError where the processes' weights differ in a bit."""
    if count() == 1:
        return
    total = 0
    for weight in weights:
        content = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
        total = zlib.crc32(content, total)
    sums = of_all(total)
    other = next((r for r, found in enumerate(sums) if found != sums[0]), None)
    if other is not None:
        raise UserError(
            f"at step {step:,} the weights of process {other} are no longer those of process 0 "
            "(type the same --threads for all, on machines of one kind)"
        )
