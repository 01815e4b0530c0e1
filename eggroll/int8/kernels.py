"""C++ loops for the CPU, compiled on first use; bit-identical to the torch code they replace."""

import ctypes
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17")


@cache
def library() -> ctypes.CDLL | None:
    """Compile and load SOURCE; warn once and return None where that fails."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    try:
        if compiler is None:
            raise OSError("no C++ compiler: apt install g++")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            file = str(Path(folder) / "kernels.so")
            command = [compiler, *FLAGS, str(SOURCE), "-o", file]
            subprocess.run(command, check=True, capture_output=True, text=True)
            loaded = ctypes.CDLL(file)  # stays loaded without its file
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join(str(getattr(error, "stderr", None) or error).split())[:100]
        warnings.warn(
            f"kernels.cpp was not compiled ({reason}): int8 runs on torch's operations, about "
            "three times as slowly",
            stacklevel=2,
        )
        return None
    return loaded


def available(x: Tensor) -> bool:
    """Return whether the loops can be used on this tensor."""
    return x.device.type == "cpu" and library() is not None


def call(name: str, *args: Tensor | int) -> None:
    """Call a function of SOURCE with torch's number of threads, and these contiguous tensors."""
    assert all(arg.is_contiguous() for arg in args if isinstance(arg, Tensor))
    addresses = [
        ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, Tensor) else ctypes.c_int64(arg)
        for arg in (torch.get_num_threads(), *args)
    ]
    getattr(library(), name)(*addresses)
