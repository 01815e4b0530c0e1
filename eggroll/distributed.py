"""One population over many processes: blocks are shared out, scores gathered, and all update alike.

torchrun starts the processes, and torch.distributed (NCCL on GPUs, gloo on CPUs) joins them. Scores
are all that is sent: every process draws the members' noise from its keys and makes the same
update. Without a process group all of this is what one process does.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from eggroll.members import Block

if dist.is_available():
    # Its functions bind the default group when they are imported, and torch.optim imports them: a
    # group that is there by then lives for ever, and its threads can crash the end of a process
    import torch.distributed.nn.functional  # noqa: F401

Found = TypeVar("Found")


def count() -> int:
    """Processes that share the population."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def share_out(
    blocks: Sequence[Block], cost: Callable[[Block], float], processes: int
) -> list[list[Block]]:
    """Neighbouring blocks for each process, of about equal cost; the first have the larger shares.

    A process may be left without a block where there are too few of them.
    """
    shares: list[list[Block]] = []
    waiting = deque((block, cost(block)) for block in blocks)
    left = sum(own for _, own in waiting)
    for process in range(processes):
        share, taken, target = [], 0.0, left / (processes - process)
        while waiting and taken < target - 1e-9 * left:
            block, own = waiting.popleft()
            share.append(block)
            taken += own
        left -= taken
        shares.append(share)
    return shares


def gather(parts: Tensor) -> None:
    """Fill in what the other processes found: each has zeros where it found nothing. In place."""
    if count() > 1:
        dist.all_reduce(parts)  # a sum with zeros is exact


def from_first(ask: Callable[[], Found]) -> Found:
    """What `ask` gives in the first process, in all of them: the answer of a function that need not
    give the same one twice."""
    if count() == 1:
        return ask()
    found: list[Any] = [ask() if rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]
