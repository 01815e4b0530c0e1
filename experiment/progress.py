"""The screen: a bar on a terminal, a line now and then elsewhere, nothing with --quiet."""

import os
import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30
SECONDS_BETWEEN_UPDATES = 0.5


class Progress:
    """Shows steps, mean training fitness of the epoch, accuracy on the batch and time left."""

    def __init__(self, total: int, step: int, quiet: bool):
        self.total, self.first, self.quiet = total, step, quiet
        self.terminal = sys.stderr.isatty() and not quiet
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not self.terminal)
        self.period = SECONDS_BETWEEN_UPDATES if self.terminal else SECONDS_BETWEEN_LINES
        self.began = self.shown = time.monotonic()

    def due(self) -> bool:
        """Return True when it is time to show something, which synchronises the device."""
        return not self.quiet and time.monotonic() - self.shown >= self.period

    def show(self, step: int, fitness: float, accuracy: float) -> None:
        self.shown = time.monotonic()
        text = f"fitness {fitness:.4f}, batch accuracy {accuracy:.1%}"
        if self.terminal:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        left = (self.shown - self.began) / max(step - self.first, 1) * (self.total - step)
        self.line(f"  step {step:,} of {self.total:,}: {text}, about {left:,.0f} s left")

    def line(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.quiet:
            return
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:  # the reader has gone (`| head`): the run's files are still written
            self.quiet = self.bar.disable = True
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - until the process ends

    def close(self, step: int) -> None:
        self.bar.update(step - self.bar.n)
        self.bar.close()
