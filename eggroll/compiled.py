"""C++ loops for the CPU, compiled on first use by the compiler that is there."""

import ctypes
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

OPENMP = () if sys.platform == "darwin" else ("-fopenmp",)  # Apple's compiler has none: one thread
FLAGS = ("-O3", "-march=native", *OPENMP, "-shared", "-fPIC", "-std=c++17")


class Loops:
    """Functions of a C++ file, whose first argument is the number of threads.

    without  what users are told where the file cannot be compiled
    """

    def __init__(self, source: Path, without: str):
        self.source, self.without = source, without

    @cached_property
    def library(self) -> ctypes.CDLL | None:
        """Compile and load the file; warn once and return None where that fails."""
        compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
        try:
            if compiler is None:
                raise OSError("no C++ compiler: apt install g++")
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                file = str(Path(folder) / "loops.so")
                command = [compiler, *FLAGS, str(self.source), "-o", file]
                subprocess.run(command, check=True, capture_output=True, text=True)
                return ctypes.CDLL(file)  # stays loaded without its file
        except (OSError, subprocess.CalledProcessError) as error:
            reason = " ".join(str(getattr(error, "stderr", None) or error).split())[:100]
            name = self.source.name
            warnings.warn(f"{name} was not compiled ({reason}): {self.without}", stacklevel=2)
            return None

    def available(self, x: Tensor) -> bool:
        """Return whether the loops can be used on this tensor, which has no data while traced."""
        traced = torch.compiler.is_compiling()
        return x.device.type == "cpu" and not traced and self.library is not None

    def call(self, name: str, *args: Tensor | int) -> None:  # bools too
        """Call a function with torch's number of threads, and these contiguous tensors."""
        assert all(arg.is_contiguous() for arg in args if isinstance(arg, Tensor))
        addresses = [
            ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, Tensor) else ctypes.c_int64(arg)
            for arg in (torch.get_num_threads(), *args)
        ]
        getattr(self.library, name)(*addresses)
