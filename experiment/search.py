"""Run and resume a hyperparameter search with Optuna.

A folder holds journal.log (Optuna's storage), runs/ (of trials that are not finished) and
trials.csv. Any number of processes can work on it at once.
"""

import json
import os
import shutil
import statistics
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
from experiment.config import read_config
from experiment.errors import UserError
from experiment.files import write_csv
from experiment.grid import Grid

COLUMNS = ("number", "state", "seeds", "values", "seconds", "commit")
DEFAULT_TRIALS = 50  # with a range, which never ends by itself
ATTEMPTS = 2  # at a trial whose script fails
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
COUNTED = (*ENDED, TrialState.RUNNING)
RESERVED = ("seed", "train-on-all", "eval-every", "out-dir", "resume", "overwrite")

Row = dict[str, Any]


@dataclass(frozen=True)
class RunningTrial:
    """A trial, and the lock that tells other processes that it is running."""

    trial: Trial
    lock: FileLock


class Search:
    """The trials of a method in a folder. Raises UserError where it holds another search."""

    def __init__(
        self, method: str, grid: Grid, seeds: tuple[int, ...], flags: list[str], folder: Path
    ):
        self.method, self.grid, self.seeds, self.folder = method, grid, seeds, folder
        self.flags = [*grid.flags.split(), *flags]
        self._check_flags()
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / ".lock")
        with self.lock:
            self.study = self._open_study()
            for cell in grid.first:
                self.study.enqueue_trial(cell, skip_if_exists=True)
            for trial in self._trials(*ENDED):  # a kill may have come before this
                shutil.rmtree(self._folder(trial), ignore_errors=True)
            self._write()

    def _check_flags(self) -> None:
        """Raise UserError for flags that the search sets itself."""
        typed = {word.removeprefix("--").partition("=")[0] for word in self.flags}
        for name in self.grid.settings:
            if name in (*RESERVED, *typed):
                raise UserError(f"--{name} cannot be a setting and a flag of all trials")
        for name in RESERVED:
            if name in typed:
                raise UserError(f"the search sets --{name} itself: leave it out")

    def _open_study(self) -> optuna.Study:
        """Return the folder's study, a new one where no trial of the old one has ended or runs."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        path = self.folder / "journal.log"
        backend = JournalFileBackend(str(path), JournalLock(path))  # pyright: ignore
        names = {"storage": JournalStorage(backend), "study_name": "search"}
        options = {"direction": "maximize", "pruner": optuna.pruners.WilcoxonPruner()}
        study = optuna.create_study(**names, **options, load_if_exists=True)
        record = {
            "method": self.method,
            "flags": self.flags,
            "seeds": list(self.seeds),
            "settings": dict(self.grid.settings),
        }
        saved = study.user_attrs.get("search", {})
        if saved == record:
            return study
        if study.get_trials(deepcopy=False, states=COUNTED):
            different = {name: saved[name] for name in record if record[name] != saved[name]}
            raise UserError(
                f"{self.folder} holds a search with other {' and '.join(different)}: "
                f"{json.dumps(different)} (delete it, or give another --out-dir)"
            )
        optuna.delete_study(**names)
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        study = optuna.create_study(**names, **options)
        study.set_user_attr("search", record)
        return study

    def next_trial(self, trials: int | None, seconds: float | None) -> RunningTrial | None:
        """Return a trial to run; None where none is left, or `trials` or `seconds` are used up."""
        if trials is None and self.grid.has_range:
            trials = DEFAULT_TRIALS
        with self.lock:
            self._try_again()
            counted = self._trials(*COUNTED)
            if trials is not None and len(counted) >= trials:
                return None
            if seconds is not None and sum(map(_seconds, counted)) >= seconds:
                return None
            if not self._trials(TrialState.WAITING) and not self.grid.has_range:
                return None
            # a new seed for each trial, so that a resumed search does not repeat suggestions
            self.study.sampler = optuna.samplers.TPESampler(seed=len(self._trials()))
            trial = self.study.ask(distributions(self.grid))
            lock = self._lock_of(trial)
            lock.acquire()
        return RunningTrial(trial, lock)

    def _try_again(self) -> None:
        """Queue failed trials again, and those whose process is gone."""
        for trial in self._trials(TrialState.RUNNING):
            with suppress(Timeout), self._lock_of(trial).acquire(timeout=0):
                self.study.tell(trial.number, state=TrialState.FAIL)
        attempts: dict[int, list[FrozenTrial]] = {}
        for trial in self._trials():
            attempts.setdefault(_first(trial), []).append(trial)
        for first, same in attempts.items():
            failures = sum(trial.user_attrs.get("failed", False) for trial in same)
            settings = same[-1].system_attrs.get("fixed_params", {}) | same[-1].params
            if same[-1].state == TrialState.FAIL and settings and failures < ATTEMPTS:
                self.study.enqueue_trial(settings, user_attrs={"first": first})

    def run(self, running: RunningTrial) -> Row:
        """Train with every seed; return the trial's row of trials.csv.

        Runs that a killed process has left are resumed. Raises UserError where a script fails.
        """
        trial = running.trial
        try:
            state = self._train(trial)
        except UserError:
            self._tell(running, TrialState.FAIL)
            raise
        self._tell(running, state)
        return self.rows()[trial.number]

    def _train(self, trial: Trial) -> TrialState:
        """Train with every seed, until one diverges or the trial is pruned."""
        settings = [word for item in trial.params.items() for word in _as_words(*item)]
        values, seconds = [], 0.0
        for place, seed in enumerate(self.seeds):
            folder = self._folder(trial) / f"seed{seed}"
            own = [*self.flags, *settings, "--seed", str(seed), "--eval-every", "100"]
            summary = finish(COMMANDS[self.method], folder, *own)
            seconds += summary["train_seconds"]
            trial.set_user_attr("seconds", seconds)
            trial.set_user_attr("commit", read_config(folder)["commit"])
            if summary["status"] == "diverged":
                return TrialState.PRUNED
            values.append(summary["validation_accuracy"])
            trial.set_user_attr("values", values)
            trial.report(values[-1], place)
            if place + 1 < len(self.seeds) and trial.should_prune():
                return TrialState.PRUNED
        return TrialState.COMPLETE

    def _tell(self, running: RunningTrial, state: TrialState) -> None:
        trial = running.trial
        with self.lock:
            if state == TrialState.COMPLETE:
                self.study.tell(trial, statistics.mean(trial.user_attrs["values"]))
            else:
                trial.set_user_attr("failed", state == TrialState.FAIL)
                self.study.tell(trial, state=state)
            self._write()
        running.lock.release()
        if state in ENDED:
            shutil.rmtree(self._folder(trial))

    def _write(self) -> None:
        begun = [row for row in self.rows() if row["state"] != "WAITING"]
        write_csv(self.folder / "trials.csv", begun, [*COLUMNS, *self.grid.settings])

    def rows(self) -> list[Row]:
        """Return a row for each trial, in order of their numbers, 0, 1, ..."""
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
            for trial in self._trials()
        ]

    def best(self) -> Row | None:
        """Return the row of the complete trial with the highest mean accuracy."""
        complete = self._trials(TrialState.COMPLETE)
        return self.rows()[self.study.best_trial.number] if complete else None

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _folder(self, trial: Trial | FrozenTrial) -> Path:
        return self.folder / "runs" / f"{_first(trial):04d}"

    def _lock_of(self, trial: Trial | FrozenTrial) -> FileLock:
        self._folder(trial).mkdir(parents=True, exist_ok=True)
        return FileLock(self._folder(trial) / ".lock")


def describe(row: Row) -> str:
    """Return a line with a trial's settings, validation accuracies and seconds."""
    settings = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in COLUMNS
    )
    accuracies = " ".join(f"{float(value):.2%}" for value in row["values"].split())
    state = "" if row["state"] == "COMPLETE" else f" {row['state'].lower()} or diverged"
    return f"trial {row['number']}: {', '.join(settings)}: {accuracies}{state}, {row['seconds']} s"


def distributions(grid: Grid) -> dict[str, BaseDistribution]:
    """Return an Optuna distribution for each setting."""
    return {name: _distribution(values) for name, values in grid.settings.items()}


def _distribution(values: Any) -> BaseDistribution:
    if isinstance(values, list):
        return CategoricalDistribution(values)
    whole = isinstance(values["low"], int) and isinstance(values["high"], int)
    return IntDistribution(**values) if whole else FloatDistribution(**values)


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
    """A lock of the journal, which is released when its process is killed."""

    def __init__(self, path: Path):
        self.path, self.lock = path, FileLock(path.with_suffix(".lock"))

    def acquire(self) -> bool:
        """Lock the journal, and remove a last line that a killed process has left unfinished."""
        self.lock.acquire()
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        return True

    def release(self) -> None:
        self.lock.release()
