"""Watches the training fitness, so that a run that is lost stops and says so."""

import math

from torch import Tensor

from lab.errors import UserError

STEPS = 50  # per look: reading a number waits for the device
LOST = 0.9  # of what was gained since the start
GAINED = 0.25  # of the fitness at the start: less could be chance
BY_CHANCE = 0.05  # accuracy that an untrained network gains or loses without a reason
FAR = 100  # units below the start are no noise


class FitnessWatch:
    """Raises UserError where the fitness is no number, falls back to where it began, or far below.

    The start is the first step's fitness: a mean over the first steps would take for a start what
    a rate that is far too high has made of them.
    """

    def __init__(self):
        self.total: Tensor | float = 0.0
        self.count = 0
        self.first: float | None = None
        self.unit: float | None = None  # the fitness at the start, or its noise where that is more
        self.best = -math.inf
        self.squares: Tensor | float = 0.0  # of the first look

    def add(self, fitness: Tensor, step: int) -> None:
        """The 0-d fitness of step number `step`."""
        if self.first is None:
            self.first = self.best = check_finite(float(fitness), step)
        self.total, self.count = self.total + fitness, self.count + 1
        if self.unit is None:
            self.squares = self.squares + (fitness - self.first) ** 2
        if self.count < STEPS:
            return
        mean = check_finite(float(self.total) / self.count, step)
        if self.unit is None:
            noise, start = math.sqrt(float(self.squares) / STEPS), abs(self.first)
            self.unit = max(start, min(noise, FAR * start)) if start else noise
        self.total, self.count = 0.0, 0
        self.best = max(self.best, mean)
        if self._collapsed(mean):
            raise UserError(
                f"training diverged: the fitness fell from {self.best:.4g} to {mean:.4g} by step "
                f"{step:,}, and was {self.first:.4g} at the start ({_REMEDY})"
            )

    def _collapsed(self, mean: float) -> bool:
        gained = self.best - self.first
        if gained > GAINED * self.unit and mean < self.best - LOST * gained:
            return True
        return mean < self.first - FAR * max(self.unit, gained)

    def state(self) -> dict[str, float | None]:
        return {"first": self.first, "unit": self.unit, "best": self.best}

    def load_state(self, state: dict[str, float | None]) -> None:
        self.first, self.unit, self.best = state["first"], state["unit"], state["best"]


def check_finite(fitness: float, step: int) -> float:
    """`fitness` as it is. Raises UserError where it is no number."""
    if not math.isfinite(fitness):
        raise UserError(f"training diverged: the fitness is {fitness} at step {step:,} ({_REMEDY})")
    return fitness


def opposed(fitness: float, accuracy: float) -> bool:
    """Whether one has risen and the other fallen, by more of the accuracy than chance."""
    return abs(accuracy) > BY_CHANCE and fitness * accuracy < 0


_REMEDY = "try a smaller --lr, or more members; the last good checkpoint is kept"
