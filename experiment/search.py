"""A search for settings: its trials on the disk, and how a stopped search goes on.

Trials are Optuna's. Everything is in one folder: journal.log (Optuna's storage), runs/ (those that
are not finished) and trials.csv. Any number of processes work on it at once.
"""

import json
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from experiment.commands import COMMANDS, finish
from experiment.errors import Diverged, UserError
from experiment.files import write_csv
from experiment.grid import Grid

COLUMNS = ("number", "state", "seeds", "values", "seconds", "commit")
DEFAULT_TRIALS = 50  # of a search with a range, which never ends by itself
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)

Row = dict[str, Any]


def distributions(grid: Grid) -> dict[str, BaseDistribution]:
    """Return Optuna's form of the settings: lists alone are a grid, ranges are TPE's to choose."""
    return {name: _distribution(values) for name, values in grid.settings.items()}


def _distribution(values: Any) -> BaseDistribution:
    if isinstance(values, list):
        return CategoricalDistribution(values)
    whole = isinstance(values["low"], int) and isinstance(values["high"], int)
    return IntDistribution(**values) if whole else FloatDistribution(**values)


class Search:
    """The trials of a method in a folder. Raises UserError where it holds another search."""

    def __init__(
        self, method: str, grid: Grid, seeds: tuple[int, ...], flags: list[str], folder: Path
    ):
        self.method, self.grid, self.seeds, self.folder = method, grid, seeds, folder
        self.flags = [*grid.flags.split(), *flags]
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / ".lock")
        with self.lock:
            self.study = _open_study(folder / "journal.log", method)
            self._check_same()
            for cell in grid.first:
                self.study.enqueue_trial(cell, skip_if_exists=True)
            self._write()  # a kill may have come between a trial's end and this

    def _check_same(self) -> None:
        record = {"settings": self.grid.settings, "flags": self.flags, "seeds": self.seeds}
        text = json.dumps(record, sort_keys=True)
        saved = self.study.user_attrs.setdefault("search", text)
        if saved != text:
            raise UserError(
                f"{self.folder} holds a search with other settings, flags or seeds: {saved} "
                "(give another --out-dir)"
            )
        self.study.set_user_attr("search", text)

    def next_trial(self, trials: int | None, seconds: float | None) -> "Held | None":
        """Return a trial to run; None where none is left, or `trials` or `seconds` are used up."""
        if trials is None and self.grid.has_range:
            trials = DEFAULT_TRIALS
        with self.lock:
            self._try_again()
            known = self.study.get_trials(deepcopy=False)
            if trials is not None and sum(t.state in COUNTED for t in known) >= trials:
                return None
            if seconds is not None and sum(map(_seconds, known)) >= seconds:
                return None
            waiting = any(t.state == TrialState.WAITING for t in known)
            if not waiting and not self.grid.has_range:
                return None
            # keyed by the trial: a process that goes on must not repeat the first suggestions
            self.study.sampler = optuna.samplers.TPESampler(seed=len(known))
            trial = self.study.ask(distributions(self.grid))
            folder = self._folder(trial)
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            lock.acquire()
        return Held(trial, lock)

    def _try_again(self) -> None:
        """Queue failed trials again, and those whose process is gone."""
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            folder = self._folder(trial)
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout), FileLock(folder / ".lock", timeout=0):
                self.study.tell(trial.number, state=TrialState.FAIL)
        known = self.study.get_trials(deepcopy=False)
        latest = {_first(trial): trial for trial in known}  # the last of equal keys is kept
        for first, trial in latest.items():
            settings = trial.params or trial.system_attrs.get("fixed_params")
            if trial.state == TrialState.FAIL and settings:
                self.study.enqueue_trial(settings, user_attrs={"first": first})

    def run(self, held: "Held") -> Row:
        """Train with every seed; return the trial's row of trials.csv.

        Runs that a killed process has left are continued. Raises UserError where a script fails.
        """
        trial, values = held.trial, []
        settings = [word for item in trial.params.items() for word in _as_words(*item)]
        state, seconds, commit = TrialState.COMPLETE, 0.0, ""
        try:
            for place, seed in enumerate(self.seeds):
                folder = self._folder(trial) / f"seed{seed}"
                own = [*self.flags, *settings, "--seed", str(seed), "--eval-every", "100"]
                summary = finish(COMMANDS[self.method], folder, *own)
                commit = json.loads((folder / "config.json").read_text())["commit"]
                values.append(summary["validation_accuracy"])
                seconds += summary["train_seconds"]
                trial.report(values[-1], place)
                if place + 1 < len(self.seeds) and trial.should_prune():
                    state = TrialState.PRUNED
                    break
        except Diverged:
            state = TrialState.PRUNED
        except UserError:
            self._tell(held, TrialState.FAIL, values, seconds, commit)
            raise
        self._tell(held, state, values, seconds, commit)
        return self.rows()[trial.number]

    def _tell(
        self, held: "Held", state: TrialState, values: list, seconds: float, commit: str
    ) -> None:
        trial, complete = held.trial, state == TrialState.COMPLETE
        for name, value in {"values": values, "seconds": seconds, "commit": commit}.items():
            trial.set_user_attr(name, value)
        with self.lock:
            mean = sum(values) / len(values) if complete else None
            self.study.tell(trial, mean, state=state)
            self._write()
        held.lock.release()
        if state != TrialState.FAIL:
            shutil.rmtree(self._folder(trial))

    def _write(self) -> None:
        begun = [row for row in self.rows() if row["state"] != "WAITING"]
        write_csv(self.folder / "trials.csv", begun, [*COLUMNS, *self.grid.settings])

    def rows(self) -> list[Row]:
        """Return a row of trials.csv for each trial, its number is its place."""
        return [
            {
                "number": trial.number,
                "state": trial.state.name,
                "seeds": " ".join(map(str, self.seeds)),
                "values": " ".join(f"{value:.4f}" for value in trial.user_attrs.get("values", ())),
                "seconds": round(_seconds(trial), 1),
                "commit": trial.user_attrs.get("commit", ""),
                **trial.params,
            }
            for trial in self.study.get_trials(deepcopy=False)
        ]

    def best(self) -> Row | None:
        """Return the row of the complete trial with the highest mean accuracy."""
        try:
            return self.rows()[self.study.best_trial.number]
        except ValueError:  # none is complete
            return None

    def _folder(self, trial: Trial | FrozenTrial) -> Path:
        return self.folder / "runs" / f"{_first(trial):04d}"


def describe(row: Row) -> str:
    """Return a line with a trial's settings, validation accuracies and seconds."""
    settings = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in COLUMNS
    )
    accuracies = " ".join(f"{float(value):.2%}" for value in row["values"].split())
    state = "" if row["state"] == "COMPLETE" else f" {row['state'].lower()}"
    return f"trial {row['number']}: {', '.join(settings)}: {accuracies}{state}, {row['seconds']} s"


@dataclass(frozen=True)
class Held:
    """A trial and the lock that shows other processes that this one works on it."""

    trial: Trial
    lock: FileLock


def _first(trial: Trial | FrozenTrial) -> int:
    """Return the number of the trial that this one is another attempt of; its own, if none."""
    return trial.user_attrs.get("first", trial.number)


def _seconds(trial: FrozenTrial) -> float:
    """Return the seconds of training that a trial took."""
    return trial.user_attrs.get("seconds", 0.0)


def _as_words(name: str, value: Any) -> list[str]:
    """Return a setting as it is typed: a string of several numbers is several words."""
    option = f"--{name}"
    if isinstance(value, bool):
        return [option] if value else []
    return [option, *str(value).split()]


class JournalLock:
    """A lock of the journal that the system releases when its process is killed."""

    def __init__(self, path: Path):
        self.lock = FileLock(path.with_suffix(".lock"))

    def acquire(self) -> bool:
        return bool(self.lock.acquire())

    def release(self) -> None:
        self.lock.release()


def _open_study(path: Path, method: str) -> optuna.Study:
    """Return the study in a journal. Without its last line, if that was cut by a kill."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    lock = JournalLock(path)
    with lock.lock:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            path.write_bytes(b"".join(lines[:-1]))
    storage = JournalStorage(JournalFileBackend(str(path), lock))  # pyright: ignore
    return optuna.create_study(
        storage=storage,
        study_name=method,
        direction="maximize",
        pruner=optuna.pruners.WilcoxonPruner(),
        load_if_exists=True,
    )
