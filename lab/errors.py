"""Errors that a user can mend: one line that says what happened and what to type."""


class UserError(Exception):
    """Printed as one line, without a traceback; the process ends with exit code 2."""


class Interrupted(Exception):
    """Ctrl-C was pressed; what was done is saved. Exit code 130."""
