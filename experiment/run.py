"""One run: its folder, clock, checkpoints, metrics and signals. The training loop is the script's:

with Run("backprop", config, data, network, optimizer, schedule) as run:
    run.warm_up(step)
    for epoch in run.epochs():
        for rows in run.batches(epoch):
            run.record(step(rows))
        run.log_epoch()
"""

import math
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from experiment import distributed, files
from experiment.config import Config, as_flags
from experiment.data import SAMPLE, Dataset
from experiment.device import (
    Clock,
    card_memory,
    device_name,
    peak_memory_mb,
    reset_peak_memory,
)
from experiment.errors import Diverged, Interrupted
from experiment.evaluation import evaluate_splits
from experiment.optim import load_optimizer
from experiment.progress import Progress

SECONDS_BETWEEN_CHECKPOINTS = 60
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Run:
    """A context manager that resumes, logs and saves one run.

    evolution  has population, describe_population(), state_dict() and load_state_dict()

    Raises UserError for a folder that is in use or holds another run and for weights of another
    network (--init-from), Diverged where training has diverged, Interrupted after a signal.
    """

    def __init__(
        self,
        method: str,
        config: Config,
        data: Dataset,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        evolution: Any = None,
    ):
        self.method, self.config, self.data, self.network = method, config, data, network
        self.optimizer, self.schedule, self.evolution = optimizer, schedule, evolution
        self.device = data.train.labels.device
        self.steps_per_epoch = data.steps(config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.fitness_sum = torch.zeros((), device=self.device)  # of the epoch so far
        self.clock = Clock(self.device)
        self.compile_seconds = self.peak_mb = self.allocated_mb = 0.0
        self.stop = 0  # number of the signal that asked to stop
        self.writes = distributed.rank() == 0  # the other processes of a run write nothing
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        name = f"{stamp}_{method}_{data.name}_seed{config.seed}"
        self.folder = config.out_dir or Path("results") / "runs" / name

    def __enter__(self) -> "Run":
        config = self.config
        if self.writes:
            resume, overwrite = config.resume, config.overwrite
            self.lock = files.open_folder(self.folder, resume=resume, overwrite=overwrite)
        self._load()
        self.saved_at = time.monotonic()
        self.progress = Progress(self.total_steps, self.step, config.quiet or not self.writes)
        title = f"{self.method} on {self.data.name}: {len(self.data.train):,} training images"
        self._say(f"{title}, {self.total_steps:,} steps")
        if self.data.name == SAMPLE:
            self._say(f"[{SAMPLE}: 5,000 digits, NOT the full MNIST]")
        if self.evolution:
            self._say(self.evolution.describe_population())
        self._say(f"{device_name(self.device)}; files in {self.folder}")
        if self.step:
            self._say(f"resuming at step {self.step:,}")
        self._catch_signals()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        self._restore_signals()
        self.progress.close(self.step)
        try:
            if self.stop and distributed.lost_peer(error):  # rank 0 has saved and ended
                raise Interrupted(signal=self.stop) from None
            if not self.writes:
                return
            if kind is None:
                self._say(self._last_line())
            elif kind and not issubclass(kind, (Interrupted, KeyboardInterrupt, OSError)):
                self._log(f"failed at step {self.step:,}: {error}")
                if self.rows:  # the last good checkpoint is kept
                    diverged = isinstance(error, FloatingPointError)
                    self._write_summary("diverged" if diverged else "failed")
        finally:
            if self.writes:
                self.lock.release()

    # ---- what a script calls ----

    def warm_up(self, step: Any) -> None:
        """Let a step prepare itself, outside of the training time: lazy set-up is no training.

        step  has warm_up(*batches), which leaves the weights as they are, and captured
        """
        full, last = next(self._batches(0)), next(self._batches(0, self.steps_per_epoch - 1))
        clock = Clock(self.device)
        clock.start()
        step.warm_up((full,), (last,))  # the last batch of an epoch is smaller
        clock.stop()
        self.allocated_mb = reset_peak_memory(self.device)
        if step.captured:
            self._say("a step is one CUDA graph")
        self.compile_seconds = self.compile_seconds or clock.seconds

    def epochs(self) -> Iterator[int]:
        """Yield the epochs that are left, from 0; logs the untrained network first."""
        if not self.rows:
            self.log_epoch()
        else:
            self._save_or_stop()  # files written after the checkpoint may be older than it
        while self.step < self.total_steps:
            yield self.step // self.steps_per_epoch

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Yield the rows (B,) of an epoch's batches that are left; saves between them."""
        self.clock.start()
        for rows in self._batches(epoch, self.step - epoch * self.steps_per_epoch):
            self.rows_of_batch = rows
            yield rows
            due = self.stop or time.monotonic() - self.saved_at > SECONDS_BETWEEN_CHECKPOINTS
            if due and self.writes and self.step % self.steps_per_epoch:
                self.clock.stop()
                self._save_or_stop()
                self.clock.start()
        self.clock.stop()

    def record(self, fitness: Tensor) -> None:
        """Count a step, whose batch had this mean fitness, 0-d."""
        self.step += 1
        self.fitness_sum += fitness
        if self.progress.due():
            images, labels = self.data.batch(self.rows_of_batch)
            with torch.no_grad():
                right = (self.network(images).argmax(-1) == labels).float().mean().item()
            self.progress.show(self.step, self._mean_fitness(), right)

    def log_epoch(self) -> None:
        """Evaluate, add a row to metrics.csv, and save; raises Interrupted after a signal."""
        epoch, epochs = self.step // self.steps_per_epoch, self.config.epochs
        members = self.evolution.population if self.evolution else 0
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "forward_passes_per_image": (members + 1) * epoch,
            "train_seconds": round(self.clock.seconds, 3),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_fitness": round(self._mean_fitness(), 6) if self.step else "",
        }
        distributed.check_same(self.network.parameters(), self.step)
        collapsed: list[int] = []
        if self.writes and (epoch % self.config.eval_every == 0 or epoch == epochs):
            columns, collapsed = evaluate_splits(self.network, self.data)
            row |= columns
        self.rows.append(row)
        self.fitness_sum.zero_()
        self._say(_epoch_line(row, epochs, collapsed if self.step else []))
        self._save_or_stop()

    # ---- between batches ----

    def _batches(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        return self.data.batches(epoch, self.config.seed, self.config.batch_size, first)

    def _mean_fitness(self) -> float:
        """Return the mean over the epoch so far. Raises Diverged where it is not finite."""
        steps = (self.step - 1) % self.steps_per_epoch + 1  # of this epoch
        mean = self.fitness_sum.item() / steps
        if not math.isfinite(mean):
            raise Diverged(
                f"training has diverged at step {self.step:,} (mean fitness {mean}): try a smaller "
                "--lr; the last good checkpoint is kept"
            )
        return mean

    def _save_or_stop(self) -> None:
        """Save; raise Interrupted if a signal came before."""
        if not self.writes:
            return
        finished = self.step == self.total_steps
        stop = 0 if finished else self.stop  # read once: a signal during the save waits a step
        self._save("finished" if finished else "interrupted" if stop else "running")
        if stop:
            script, folder = Path(sys.argv[0]).name, shlex.quote(str(self.folder))
            raise Interrupted(
                f"interrupted at step {self.step:,} of {self.total_steps:,}; go on with: "
                f"python {script} --resume --out-dir {folder}",
                stop,
            )

    def _catch_signals(self) -> None:
        """Stop between two batches at the first signal, and at once at the second."""
        self.handlers = {}
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                self.handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        self.stop = number
        if distributed.count() == 1:  # torchrun repeats a Ctrl-C that has been received already
            self._restore_signals()

    def _restore_signals(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    # ---- files ----

    def _load(self) -> None:
        """Load the checkpoint that --resume asks for; else start at step 0."""
        path = self.folder / "checkpoint.pt"
        state = files.load_checkpoint(path, self.device) if self.config.resume else None
        if state is None:
            if self.config.init_from:
                files.load_weights(self.config.init_from, self.network)
            if self.writes and not (self.config.resume and (self.folder / "config.json").exists()):
                self._write_config()
            return
        self.network.load_state_dict(state["network"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.evolution:
            self.evolution.load_state_dict(state["evolution"])
        self.step, self.rows, self.fitness_sum = state["step"], state["rows"], state["fitness_sum"]
        self.clock = Clock(self.device, state["seconds"])
        self.compile_seconds, self.peak_mb = state["compile_seconds"], state["peak_mb"]

    def _save(self, status: str) -> None:
        """Write the checkpoint, then all that follows from it."""
        self._mean_fitness()  # a diverged state must not replace a good one
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "evolution": self.evolution.state_dict() if self.evolution else None,
            "fitness_sum": self.fitness_sum,
            "rows": self.rows,
            "seconds": self.clock.seconds,
            "compile_seconds": self.compile_seconds,
            "peak_mb": self._peak_mb(),
        }
        files.save_checkpoint(self.folder / "checkpoint.pt", state)
        files.save_weights(self.folder / "model.safetensors", self.network)
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        files.write_csv(self.folder / "metrics.csv", self.rows, columns)
        self._write_summary(status)
        self.saved_at = time.monotonic()

    def _write_config(self) -> None:
        record = {
            "method": self.method,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "flags": as_flags(self.config),
            "data": {"name": self.data.name, "sha256": self.data.checksum},
            "device": device_name(self.device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "platform": platform.platform(),
            },
            "commit": files.commit(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        files.write_json(self.folder / "config.json", record)

    def _write_summary(self, status: str) -> None:
        evaluated = [row for row in self.rows if row.get("test_accuracy", "") != ""][-1]
        summary = {
            "method": self.method,
            "dataset": self.data.name,
            "seed": self.config.seed,
            "epochs": self.step // self.steps_per_epoch,
            "steps": self.step,
            "population": self.evolution.population if self.evolution else None,
            "test_accuracy": evaluated["test_accuracy"],
            "validation_accuracy": evaluated["validation_accuracy"] or None,
            "train_seconds": round(self.clock.seconds, 3),
            "compile_seconds": round(self.compile_seconds, 3),
            "peak_memory_mb": round(self._peak_mb(), 1),
            "device": device_name(self.device),
            "status": status,
        }
        files.write_json(self.folder / "summary.json", summary)

    def _last_line(self) -> str:
        memory = card_memory(self.device, self.allocated_mb).items()
        card = "".join(f", {name.removesuffix('_mb')} {mb:,.0f}" for name, mb in memory)
        return (
            f"finished: test accuracy {self.rows[-1]['test_accuracy']:.2%} on {self.data.name}, "
            f"{self.clock.seconds:.1f} s of training, {self._peak_mb():,.0f} MB at the peak{card}, "
            f"files in {self.folder}"
        )

    def _peak_mb(self) -> float:
        return max(self.peak_mb, peak_memory_mb(self.device))

    def _say(self, text: str) -> None:
        self.progress.line(text)
        if self.writes:
            self._log(text)

    def _log(self, text: str) -> None:
        with (self.folder / "train.log").open("a") as file:
            file.write(text + "\n")


def _epoch_line(row: dict[str, Any], epochs: int, collapsed: list[int]) -> str:
    """Return one row of metrics.csv as an aligned line, with the collapsed classes."""
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"]
    fitness = row["train_fitness"]
    parts.append("fitness " + (f"{fitness:8.4f}" if fitness != "" else 8 * " "))
    for name in ("train", "validation", "test"):
        accuracy = row.get(f"{name}_accuracy", "")
        if accuracy != "":
            parts.append(f"{name} {accuracy:7.2%}")
    parts.append(f"{row['train_seconds']:8.1f} s")
    if collapsed:
        parts.append(f"collapsed classes: {', '.join(map(str, collapsed))}")
    return "  ".join(parts)
