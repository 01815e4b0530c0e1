"""Honest time and memory: the device is synchronised at both ends, and pauses are not counted."""

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Clock:
    """Seconds of training alone: what happens inside `running()`, and nothing else."""

    def __init__(self, device: torch.device, seconds: float = 0.0):
        self.device = device
        self.counted = seconds
        self.started: float | None = None

    @property
    def seconds(self) -> float:
        """Counted so far, without synchronising: exact while the clock is stopped."""
        return self.counted + (time.perf_counter() - self.started if self.started else 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        synchronise(self.device)
        self.started = time.perf_counter()
        try:
            yield
        finally:
            synchronise(self.device)
            self.counted, self.started = self.seconds, None


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MB (2^20 bytes): the allocator's on CUDA, else the process's.

    On Linux VmHWM and not getrusage's figure, which a child inherits from a larger parent. 0 where
    it is not known, on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def device_name(device: torch.device) -> str:
    """What the timings were taken on, for tables: 'cpu: AMD EPYC, 2 threads'."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type == "mps":
        return f"mps: {platform.processor() or platform.machine()}"
    return f"cpu: {_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
