"""What the screen shows: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from lab.data import SAMPLE, Dataset

SECONDS_BETWEEN_LINES = 30
SECONDS_BETWEEN_UPDATES = 0.5


class Progress:
    """Steps, mean training fitness of the epoch, accuracy on the batch, and the time left."""

    def __init__(self, total: int, done: int, quiet: bool):
        self.total, self.first, self.quiet = total, done, quiet
        self.terminal = sys.stderr.isatty() and not quiet
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not self.terminal)
        self.period = SECONDS_BETWEEN_UPDATES if self.terminal else SECONDS_BETWEEN_LINES
        self.began = self.shown = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to show something; asking for it synchronises the device."""
        return not self.quiet and time.monotonic() - self.shown >= self.period

    def show(self, step: int, fitness: float, accuracy: float) -> None:
        self.shown = time.monotonic()
        facts = {"fitness": f"{fitness:.4f}", "batch accuracy": f"{accuracy:.1%}"}
        if self.terminal:
            self.bar.set_postfix(facts, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        left = (self.shown - self.began) / max(step - self.first, 1) * (self.total - step)
        text = ", ".join(f"{name} {value}" for name, value in facts.items())
        self.line(f"  step {step:,} of {self.total:,}: {text}, about {left:,.0f} s left")

    def line(self, text: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self.quiet:
            return
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:  # nobody reads any more (`| head`, a terminal that is gone): files do
            self.quiet = True
            self.bar.disable = True
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - until the process ends

    def close(self, step: int) -> None:
        self.bar.update(step - self.bar.n)  # the bar ends where the run does
        self.bar.close()


def headline(method: str, data: Dataset, steps: int, done: int) -> str:
    """What is about to run; a run on the sample can never be taken for one on the full MNIST."""
    title = f"{method} on {data.name}: {len(data.train):,} training images, {steps:,} steps"
    if data.name == SAMPLE:
        title += "  [mnist-sample: 5,000 digits, NOT the full MNIST]"
    return f"{title}, going on from step {done:,}" if done else title


def population_line(evolution: Any, batch_size: int) -> str:
    """The population that is really used, and what it counts."""
    counts, total = [count for _, count in evolution.counts], evolution.population
    layers = f" ({' + '.join(map(str, counts))} by layer)" if len(counts) > 1 else ""
    if not evolution.members.by_example:
        return f"population {total:,}{layers}: members that each see the whole batch"
    return (
        f"population {total:,}{layers}: members that see each image, {total * batch_size:,} of one "
        "image each in a step"
    )


def shares_line(evolution: Any) -> str:
    """How many members each process evaluates."""
    shares = [sum(map(len, blocks)) for blocks in evolution.shares]
    return (
        f"{evolution.population:,} members over {len(shares)} processes: "
        f"{', '.join(f'{share:,}' for share in shares)}"
    )


def epoch_line(row: dict[str, Any], epochs: int, lost: Sequence[int] = ()) -> str:
    """One row of metrics.csv as an aligned line, with the digits that the network has lost."""
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"]
    fitness = row["train_fitness"]
    parts.append(f"fitness {fitness:8.4f}" if fitness != "" else "fitness " + 8 * " ")
    for name in ("train", "validation", "test"):
        accuracy = row.get(f"{name}_accuracy", "")
        if accuracy != "":
            parts.append(f"{name} {accuracy:7.2%}")
    parts.append(f"{row['train_seconds']:8.1f} s")
    if lost:
        parts.append(f"never right: {', '.join(map(str, lost))}")
    return "  ".join(parts)
