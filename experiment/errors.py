"""Exceptions that end a script with one line and without a traceback."""

from signal import SIGINT


class UserError(Exception):
    """An error that the user can fix: one line, exit code 2."""


class Diverged(UserError, FloatingPointError):
    """The mean fitness is no longer finite."""


class Finished(Exception):
    """There is nothing left to do: one line, exit code 0."""


class Interrupted(Exception):
    """A signal stopped the run after it was saved: one line, exit code 128 + `signal`."""

    def __init__(self, message: str = "", signal: int = SIGINT):
        super().__init__(message)
        self.signal = signal
