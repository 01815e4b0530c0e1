"""A fitness of the user's own, from a file: loaded, tried out, and blamed by its line.

--fitness path/to/file.py:function names a function of outputs (P, B, 10) and labels (B,) that
returns scores (P, B), or (P,) for the whole batch; higher is better. Whatever goes wrong
with it is a UserError that quotes the function's own line.

Shapes: P members, B examples.
"""

import importlib.util
import linecache
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab import processes
from lab.errors import UserError

MEMBERS, CLASSES = 4, 10  # of the logits that a function is tried out on
DRAWS = 10  # populations that must all tie before a fitness counts as constant
USAGE = "type --fitness path/to/file.py:function"


class UserFitness:
    """The function `name` of the file `path`, checked at every call.

    Raises UserError where the file or the function is not there, or the file does not run.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.function = _function(path, name)
        self.varied = False  # whether it has ever told two members apart

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scores (P, B) or (P,). Raises UserError for what the function does wrong."""
        try:
            scores = self.function(logits, labels)
        except Exception as error:
            raise UserError(f"{_place(error, self.path)}: {_described(error)}") from error
        self._check(scores, logits)
        if len(scores) > 1 and not self.varied:
            self.varied = bool((scores != scores[:1]).any())
        return scores

    def _check(self, scores: Any, logits: Tensor) -> None:
        members, examples = logits.shape[:2]
        wanted = f"({members}, {examples}) or ({members},)"
        if not isinstance(scores, Tensor):
            raise UserError(
                f"{self.where} returned a {type(scores).__name__} for {members} members and "
                f"{examples} examples; return a tensor of shape {wanted}"
            )
        if scores.shape not in ((members, examples), (members,)):
            raise UserError(
                f"{self.where} returned scores of shape {tuple(scores.shape)} for {members} "
                f"members and {examples} examples; return shape {wanted}"
            )
        bad = int((~torch.isfinite(scores)).reshape(members, -1).any(1).sum())
        if bad and torch.isfinite(logits).all():  # else the training has diverged, and is named
            raise UserError(
                f"{self.where} returned scores of {bad} of {members} members that are not finite "
                "(it may divide by zero; where that happens, return a number)"
            )

    @property
    def where(self) -> str:
        """The function and the line where it begins."""
        code = getattr(self.function, "__code__", None)
        return _quoted(self.path, code.co_firstlineno if code else 1, self.name)

    def try_out(self, examples: int, device: torch.device) -> bool:
        """Whether it has one score for the whole batch, and not one for each example.

        Raises UserError, before any training, for a function that cannot be used.
        """
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(MEMBERS, examples, CLASSES, generator=generator)
        labels = torch.randint(0, CLASSES, (examples,), generator=generator)
        scores = self(logits.to(device), labels.to(device))
        self.varied = False  # of random logits it proves little
        return scores.dim() == 1


def warm_up(evolution: Any, images: Tensor, labels: Tensor) -> None:
    """A step without a trace; where the fitness is a user's, until it tells two members apart.

    Raises UserError where the members of DRAWS populations all tie. One such population may be
    chance, where a score takes few values.
    """
    step = evolution.step
    fitness = getattr(evolution.fitness, "fitness", evolution.fitness)  # of a smoothed one
    for draw in range(DRAWS):
        evolution.step = step + draw
        evolution.warm_up(images, labels)
        # of several processes the first alone has asked it
        if processes.from_first(not isinstance(fitness, UserFitness) or fitness.varied):
            break
    else:
        raise UserError(
            f"{fitness.where} is constant: it gave all members of {DRAWS} populations the same "
            "score, so there is nothing to select by (does it use the outputs? try a larger "
            "--sigma or --smoothing)"
        )
    evolution.step = step


@lru_cache  # what is tried out is what trains: a program that it starts is started once
def load(flag: str) -> UserFitness:
    """The function that --fitness names as path/to/file.py:function. Raises UserError."""
    path, colon, name = flag.rpartition(":")
    if not colon:
        named = f"{flag} is a file without a function" if flag.endswith(".py") else flag
        reason = "" if flag.endswith(".py") else " is not known"
        raise UserError(
            f"--fitness {named}{reason} (type cross-entropy, accuracy or path/to/file.py:function)"
        )
    if not path or not name.isidentifier():
        raise UserError(f"--fitness {flag} names no file or no function ({USAGE})")
    return UserFitness(Path(path), name)


def _function(path: Path, name: str) -> Callable[[Tensor, Tensor], Any]:
    if not path.is_file():
        raise UserError(f"--fitness {path}:{name}: there is no file {path} ({USAGE})")
    spec = importlib.util.spec_from_file_location("user_fitness", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_fitness"] = module
    sys.path.insert(0, str(path.resolve().parent))  # as python path/to/file.py has it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{_place(error, path)}: {_described(error)}") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, f in vars(module).items() if getattr(f, "__module__", "") == spec.name]
        there = f"there is {', '.join(own)}" if own else "it defines none"
        raise UserError(f"--fitness {path}:{name}: {path} has no function {name} ({there})")
    return function


def _place(error: BaseException, path: Path) -> str:
    """The last line of the user's file that the error passed through, quoted."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{path}:{error.lineno}: `{(error.text or '').strip()}`"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).resolve() == path.resolve()]
    if not own:
        return str(path)
    return _quoted(path, own[-1].lineno, own[-1].name)


def _quoted(path: Path, line: int, name: str) -> str:
    text = linecache.getline(str(path), line).strip()
    return f"{path}:{line}, in {name}: `{text}`"


def _described(error: BaseException) -> str:
    kind = type(error).__name__
    return f"{kind}: {error}" if str(error) else kind
