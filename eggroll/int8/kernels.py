"""The hot loops of integer training in C++, for a CPU: compiled once in a process, the same bits.

torch's own operations make a pass over memory each, and torch.compile vectorises neither sums over
ten classes nor products of the few units that members move.
"""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17")

_library: ctypes.CDLL | None = None


def compile_kernels() -> str:
    """Compile them and use them from here on; what failed, in a line, or nothing."""
    global _library
    if _library is not None:
        return ""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        return "there is no C++ compiler"
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            file = str(Path(folder) / "kernels.so")
            command = [compiler, *FLAGS, str(SOURCE), "-o", file]
            subprocess.run(command, check=True, capture_output=True, text=True)
            _library = ctypes.CDLL(file)  # stays loaded when its file is gone
    except subprocess.CalledProcessError as error:
        return " ".join(error.stderr.split())[:100] or f"{compiler} failed"
    except OSError as error:
        return str(error)
    _library.follow.restype = _library.squares.restype = ctypes.c_int64
    return ""


def available(*tensors: Tensor) -> bool:
    """Whether they are compiled, and these tensors are where they can be used."""
    return _library is not None and all(tensor.device.type == "cpu" for tensor in tensors)


def call(name: str, *args: Tensor | int) -> int:
    """Call a function of SOURCE: tensors by the address of their contiguous numbers, whole numbers
    as 64 bits. It uses as many threads as torch does."""
    addresses = [
        ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, Tensor) else ctypes.c_int64(arg)
        for arg in (torch.get_num_threads(), *args)
    ]
    assert all(arg.is_contiguous() for arg in args if isinstance(arg, Tensor))
    return getattr(_library, name)(*addresses)
