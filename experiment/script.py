"""Ends of a script: one line and an exit code."""

import errno
import logging
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from experiment import distributed
from experiment.errors import Finished, Interrupted, UserError


def run_script(
    main: Callable[[], None], name: str, errors: tuple[type[Exception], ...] = ()
) -> None:
    """Run a script's main.

    User errors and `errors`, those of a library, end it with one line and exit code 2; signals end
    it with 128 + their number (Ctrl-C: 130).
    """
    logging.getLogger("torch").setLevel(logging.ERROR)  # "No CUDA runtime is found" and the like
    _show_own_warnings_once(name)
    try:
        main()
        distributed.leave()
    except Finished as done:
        _print(str(done), sys.stdout)
    except (Interrupted, KeyboardInterrupt) as stop:
        _print(str(stop), sys.stderr)
        raise SystemExit(128 + getattr(stop, "signal", signal.SIGINT)) from None
    except (UserError, *errors) as error:
        _fail(name, str(error))
    except OSError as error:
        full = error.errno == errno.ENOSPC
        advice = " (free some space; --resume continues the run)" if full else ""
        where = f"{error.filename}: " if error.filename else ""
        _fail(name, f"{where}{error.strerror or error}{advice}")
    except (MemoryError, RuntimeError) as error:
        if distributed.lost_peer(error):
            _fail(name, "another process has ended (--resume continues from the last checkpoint)")
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        _fail(name, "out of memory: try a smaller --population, --batch-size or --hidden-dim")


def _show_own_warnings_once(name: str) -> None:
    """Print each warning of this repository as one line, and none of other libraries."""
    shown = set()  # Python forgets what it has shown whenever a library changes its filters

    def show(message: Warning | str, *_: Any) -> None:
        if str(message) not in shown:
            _print(f"{name}: {message}", sys.stderr)
        shown.add(str(message))

    warnings.showwarning = show
    warnings.filterwarnings("ignore", module=r"(?!eggroll|experiment)")


def _print(text: str, stream: Any) -> None:
    if text and distributed.rank() == 0:
        print(text, file=stream)


def _fail(name: str, message: str) -> NoReturn:
    _print(f"{name}: error: {' '.join(message.split())}", sys.stderr)
    raise SystemExit(2) from None
