"""Errors that a user can mend: one line that says what happened and what to type."""

from signal import SIGINT


class UserError(Exception):
    """Printed as one line, without a traceback; the process ends with exit code 2."""


class Interrupted(Exception):
    """Ctrl-C, or another signal to stop; what was done is saved. Exit code 128 + `signal`, so 130
    for Ctrl-C."""

    def __init__(self, message: str, signal: int = SIGINT):
        super().__init__(message)
        self.signal = signal
