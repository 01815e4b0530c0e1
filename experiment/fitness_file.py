"""A fitness function from the user's file."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiment.errors import UserError


def load_fitness(flag: str) -> Callable[..., Any]:
    """Return the function that `flag` names as FILE.py:FUNCTION.

    It maps outputs (P, B, 10) and labels (B,) to scores (P, B) or (P,); higher is better. Raises
    UserError where the file or the function does not exist; errors in the file are its own.
    """
    file, _, name = flag.rpartition(":")
    path = Path(file).expanduser()
    if not file or not path.is_file():
        what = f"the file {file} does not exist" if file else f"got {flag!r}"
        raise UserError(f"--fitness must be a built-in name or FILE.py:FUNCTION: {what}")
    spec = importlib.util.spec_from_file_location("user_fitness", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--fitness must name a Python file, got {file}")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE.py` does
    spec.loader.exec_module(module)
    function: Any = getattr(module, name, None)
    if not callable(function):
        names = [n for n, f in vars(module).items() if getattr(f, "__module__", "") == spec.name]
        raise UserError(f"{file} has no function {name!r}; it defines {', '.join(names) or 'none'}")
    return function
