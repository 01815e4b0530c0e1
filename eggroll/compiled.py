"""Eager or torch.compile, by one rule.

A function is compiled for the shapes that it is first called with; any other call (the batch that
is cut off at the end of an epoch, a layer's last block) runs eagerly. What changes from step to
step enters as tensors, so nothing is compiled again. On CUDA the compiled function is captured as a
graph on static buffers. A compiler that is there but broken costs one warning, and the run goes on
eagerly.
"""

import gc
import shutil
import warnings
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("eager", "compile")


class BackendError(ValueError):
    """A backend that is not known, or whose tools are not installed."""


class Compiled:
    """`function` of tensors and dictionaries of tensors, on one of BACKENDS.

    Raises BackendError for a backend that is not known, or a compiler that is not there.
    """

    def __init__(self, function: FunctionType, backend: str, device: torch.device):
        if backend not in BACKENDS:
            raise BackendError(f"backend {backend!r} is not known (try {' or '.join(BACKENDS)})")
        self.function, self.backend = function, choose_backend(backend, device, worth=True)
        self.shapes: tuple | None = None
        self.failed = False  # to compile, and runs eagerly
        if backend == "compile":
            # reduce-overhead is torch's name for captured graphs
            mode = "reduce-overhead" if device.type == "cuda" else None
            self.compiled = torch.compile(
                _own_code(function), dynamic=False, fullgraph=True, mode=mode
            )

    def __call__(self, *args: Tensor | dict[str, Tensor]) -> Any:
        if self.backend == "eager":
            return self.function(*args)
        shapes = tuple(_shapes(args))
        if self.shapes is None:
            self.shapes = shapes
            return self._first(*args)
        return (self.compiled if shapes == self.shapes else self.function)(*args)

    def _first(self, *args: Any) -> Any:
        """Compile; where that fails and the function itself does not, go on eagerly."""
        try:
            result = self.compiled(*args)
            gc.collect()  # the compiler's graphs, in cycles: 20 MB that the next one would add to
            return result
        except Exception as error:  # what a broken compiler raises has no end
            result = self.function(*args)
            reason = " ".join(str(error).split())[:100]
            warnings.warn(
                f"torch.compile failed, going on with backend eager ({reason})", stacklevel=2
            )
            self.backend, self.failed = "eager", True
            return result


def _own_code(function: FunctionType) -> FunctionType:
    """The function with a code object of its own: the compiler counts variants by code object, and
    gives up after eight, which the layers of one network can need."""
    copied = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def choose_backend(name: str, device: torch.device, worth: bool) -> str:
    """`name`, where auto is compile if it is `worth` compiling and there is a compiler, else eager.

    Raises BackendError, with what to install, for one that cannot run here.
    """
    missing = missing_compiler(device)
    if name == "auto":
        return "compile" if worth and not missing else "eager"
    if name == "compile" and missing:
        raise BackendError(f"backend compile is not available: {missing} (try eager)")
    return name


def missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks on this device and how to get it; empty where nothing lacks."""
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "torch.compile needs a C++ compiler on a CPU (Debian, Ubuntu: apt install g++)"
    if device.type not in ("cpu", "cuda"):
        return f"it is for cpu and cuda, and the device is {device.type}"
    return ""


def _shapes(args: Any) -> Any:
    for arg in args:
        if isinstance(arg, dict):
            yield from _shapes(arg.values())
        elif isinstance(arg, (list, tuple)):
            yield from _shapes(arg)
        elif isinstance(arg, Tensor):
            yield arg.shape
