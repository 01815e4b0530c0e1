"""The machine: device, threads, clock, peak memory."""

import ctypes
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from experiment import distributed
from experiment.device_check import check_device
from experiment.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device that --device names.

    Raises UserError where it is not available, and for an MPS that computes wrongly.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available[name]:
        raise UserError(f"--device {name} is not available on this machine (try --device cpu)")
    if name == "cuda":
        torch.cuda.set_device(distributed.local_rank())
        return torch.device("cuda", distributed.local_rank())
    device = torch.device(name)
    if name == "cpu":
        keep_freed_memory()
    else:
        check_device(device)
    return device


def keep_freed_memory() -> None:
    """Make glibc keep freed memory: by default a CPU step spends up to half its time on new pages.

    Does nothing where there is no glibc.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in malloc.h
            libc.mallopt(threshold, 1 << 30)


def set_threads(threads: int | None) -> int:
    """Set and return the number of CPU threads; None: as many as torch chooses."""
    if threads is None and distributed.count() > 1:  # torchrun would choose one thread
        threads = max(1, (os.cpu_count() or 1) // distributed.local_count())
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def device_name(device: torch.device) -> str:
    """Return what the timings were taken on: 'cpu: AMD EPYC, 2 threads'."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type == "mps":
        return f"mps: {platform.processor() or platform.machine()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    model = next(models, platform.processor() or platform.machine())
    return f"cpu: {model}, {torch.get_num_threads()} threads"


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory in MB (2^20 bytes): the allocator's on CUDA, else the process's.

    0 on Windows, where it is not available.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would report the peak of a larger parent process
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def card_memory(device: torch.device, warm_up_mb: float) -> dict[str, float]:
    """Return a card's memory in MB: peaks of tensors and of the allocator, and what is used now.

    The peak of tensors includes that of the warm-up, `warm_up_mb`, since a graph allocates where it
    is captured and not where it is repeated. `used` counts everything on the card, CUDA's own and
    other processes' too. Empty elsewhere.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    amounts = {
        "allocated_mb": max(torch.cuda.max_memory_allocated(device) / 2**20, warm_up_mb),
        "reserved_mb": torch.cuda.max_memory_reserved(device) / 2**20,
        "used_mb": (total - free) / 2**20,
    }
    return {name: round(amount, 1) for name, amount in amounts.items()}


def reset_peak_memory(device: torch.device) -> float:
    """Forget the peak of a GPU's memory, since warming up may need more than training does.

    Return the peak of its tensors until then, in MB; 0 elsewhere.
    """
    if device.type != "cuda":
        return 0.0
    allocated = torch.cuda.max_memory_allocated(device) / 2**20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return allocated


class Clock:
    """Counts the seconds between start and stop; the device is synchronised at both."""

    def __init__(self, device: torch.device, seconds: float = 0.0):
        self.device, self.seconds = device, seconds

    def start(self) -> None:
        synchronise(self.device)
        self.started = time.perf_counter()

    def stop(self) -> None:
        synchronise(self.device)
        self.seconds += time.perf_counter() - self.started


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
