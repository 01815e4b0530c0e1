"""One setting of the process's allocator, without which a CPU spends half of its time on pages."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def keep_freed_memory(megabytes: int = 1024) -> bool:
    """Let glibc keep freed tensors for the next one instead of handing them back to the kernel.

    A population's activations are a few MB each, freed and allocated again thousands of times a
    second. By default glibc maps fresh pages for each, and the kernel clears them. Peak memory
    does not grow: what is kept is what the next chunk uses. Process-wide; returns whether it was
    done (only on Linux with glibc: other allocators keep memory of themselves).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    size = megabytes << 20
    return bool(mallopt(_M_TRIM_THRESHOLD, size) and mallopt(_M_MMAP_THRESHOLD, size))
