"""The loop around a training method: batches, clock, evaluation, files, Ctrl-C, resumption.

A script's own loop body is its method and nothing else:

    with Training("backprop", config, data, network, optimizer, device) as training:
        for images, labels in training.batches():
            ...  # fill .grad
            optimizer.step()
            training.record(fitness)
"""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab import checkpoint, processes
from lab.cli import FREE_ON_RESUME, as_json, read_saved_config
from lab.clock import Clock, device_name, peak_memory_mb
from lab.data import Dataset
from lab.divergence import FitnessWatch, check_finite, opposed
from lab.errors import Interrupted, UserError
from lab.evaluation import evaluate
from lab.network import start_from
from lab.optim import make_schedule
from lab.progress import Progress, epoch_line, headline, population_line, shares_line
from lab.runlog import NoFolder, RunFolder, default_out_dir

SECONDS_BETWEEN_CHECKPOINTS = 60
# Ctrl-C, a polite kill, a terminal that is gone; what of them there is on this system
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
GOAL = 0.975  # test accuracy at which methods are compared


class Training:
    """One run of one method. Ctrl-C saves what is done; files are complete at any moment.

    evolution  EGGROLL's trainer: its population is logged, its state saved

    Raises UserError for a folder that cannot be written to or resumed from, and for weights to
    start from (--init-from) that are of another network.
    """

    def __init__(
        self,
        method: str,
        config: Any,
        data: Dataset,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        evolution: Any = None,
    ):
        flags, run = config.training, config.run
        self.method, self.config, self.data, self.device = method, config, data, device
        self.network, self.optimizer, self.evolution = network, optimizer, evolution
        if flags.batch_size > len(data.train):
            raise UserError(
                f"--batch-size {flags.batch_size} is more than the {len(data.train):,} training "
                f"images (try {min(128, len(data.train))})"
            )
        self.steps_per_epoch = -(-len(data.train) // flags.batch_size)
        self.total_steps = flags.epochs * self.steps_per_epoch
        self.schedule = make_schedule(optimizer, flags, self.steps_per_epoch)
        self.folder = self._open_folder()
        self.clock = Clock(device)
        self.peaks: list[float] = []  # of all processes, at the end
        self.step = 0
        self.compile_seconds = self.earlier_peak_mb = 0.0
        self.rows: list[dict[str, Any]] = []
        self.fitness_sum = torch.zeros((), device=device)
        self.present: tuple[Tensor, Tensor] | None = None  # the batch that is being trained on
        self.watch = FitnessWatch()
        self.stop_requested = 0  # or the number of the signal
        self.saved_at = time.monotonic()
        self.progress: Progress | None = None
        resume = run.resume or (processes.restarted() and self.folder.has_run)
        if not (resume and self._resume()):
            start_from(config.network.init_from, network)
        if not resume:
            self.folder.write_config(method, config, device)

    def _open_folder(self) -> RunFolder:
        """The first process's; the others write nothing."""
        run = self.config.run
        out_dir = run.out_dir or default_out_dir(self.method, self.data.name, run.seed)
        if processes.is_first():
            resume = run.resume or processes.restarted()
            folder = RunFolder(out_dir, resume=resume, overwrite=run.overwrite)
        out_dir = processes.from_first(out_dir)  # and nobody reads before the first has cleared it
        return folder if processes.is_first() else NoFolder(out_dir)

    # ---- what a script calls ----

    def __enter__(self) -> "Training":
        self._earlier_handlers = {s: signal.signal(s, self._on_signal) for s in STOPS}
        quiet = self.config.run.quiet or not processes.is_first()
        self.progress = Progress(self.total_steps, self.step, quiet)
        self._say(headline(self.method, self.data, self.total_steps, self.step))
        if self.evolution:
            self._say(population_line(self.evolution, self.config.training.batch_size))
            if processes.count() > 1:
                self._say(shares_line(self.evolution))
        backend, folder = self.config.run.backend, self.folder.path
        self._say(f"{device_name(self.device)}, {backend}; files in {folder}")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        self._restore_handlers()
        self.progress.close(self.step)
        if kind is None:
            self._finish()
        elif not issubclass(kind, (Interrupted, KeyboardInterrupt, OSError)):
            # the weights may be ruined: keep the last good checkpoint, and say how it ended
            self.folder.log(f"failed at step {self.step}: {error}")
            if self.rows:
                self._write_summary("failed")

    @property
    def epoch(self) -> int:
        """Whole passes over the training images done so far."""
        return self.step // self.steps_per_epoch

    @contextmanager
    def warm_up(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The first batch, for one untimed pass: lazy set-up and compilation are no training."""
        clock = Clock(self.device)
        order = self._order(0)
        with clock.running():
            yield self._batch(order, 0)
        self.optimizer.zero_grad()
        self.compile_seconds = self.compile_seconds or clock.seconds

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every batch that is still to be trained on: images (B, 784) and labels (B,).

        The order of an epoch's examples depends on the seed and the epoch alone.
        """
        if not self.rows:
            self._end_of_epoch()  # epoch 0: the untrained network, where every curve begins
        while self.step < self.total_steps:
            order = self._order(self.epoch)
            with self.clock.running():
                for index in range(self.step % self.steps_per_epoch, self.steps_per_epoch):
                    self.present = self._batch(order, index)
                    yield self.present
                    if self._stops_here():
                        break
            self._after_steps()

    def record(self, fitness: Tensor) -> None:
        """After optimizer.step(): the unperturbed network's mean fitness on the batch, 0-d."""
        self.schedule.step()
        self.step += 1
        self.fitness_sum += fitness
        self.watch.add(fitness, self.step)
        if self.progress.due():
            done = (self.step - 1) % self.steps_per_epoch + 1
            mean = check_finite(self.fitness_sum.item() / done, self.step)
            self.progress.show(self.step, mean, self._batch_accuracy())

    # ---- between batches ----

    @torch.no_grad()
    def _batch_accuracy(self) -> float:
        """Of the network as it is, on the batch that it was just trained on."""
        images, labels = self.present
        return (self.network(images).argmax(-1) == labels).float().mean().item()

    def _order(self, epoch: int) -> Tensor:
        """A permutation of the training images, keyed by seed and epoch. Shape (n,)."""
        seed = self.config.run.seed
        # the generator uses 32 bits: what the shift pushes out of them is folded back in
        key = ((seed << 20 | epoch) + 1) ^ ((seed >> 12) * 0x9E3779B1)
        generator = torch.Generator().manual_seed(key & 0xFFFFFFFF)
        return torch.randperm(len(self.data.train), generator=generator).to(self.device)

    def _batch(self, order: Tensor, index: int) -> tuple[Tensor, Tensor]:
        size = self.config.training.batch_size
        batch = self.data.train[order[index * size : (index + 1) * size]]
        return self.data.scale(batch.images), batch.labels

    def _stops_here(self) -> bool:
        """To save, or since a signal came: where there are several processes, the first says so."""
        due = time.monotonic() - self.saved_at > SECONDS_BETWEEN_CHECKPOINTS
        return bool(processes.first_says(bool(self.stop_requested or due)))

    def _after_steps(self) -> None:
        """The clock stands: evaluate at the end of an epoch, save, and stop if Ctrl-C was hit."""
        if self.step % self.steps_per_epoch == 0:
            self._end_of_epoch()
        processes.check_same(self.network.parameters(), self.step)
        # a diverged state must not replace a good one
        check_finite(self.fitness_sum.item(), self.step)
        # read once: a Ctrl-C during the save stops after the next step, and is saved as such
        stop = processes.first_says(self.stop_requested if self.step < self.total_steps else 0)
        self._save("interrupted" if stop else "running")
        if stop:
            script = Path(sys.argv[0]).name
            raise Interrupted(
                f"interrupted at step {self.step:,} of {self.total_steps:,}; go on with: "
                f"python {script} --resume --out-dir {self.folder.path}",
                stop,
            )

    def _end_of_epoch(self) -> None:
        epochs = self.config.training.epochs
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "forward_passes_per_image": round(self._forward_passes_per_image(), 1),
            "train_seconds": round(self.clock.seconds, 3),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_fitness": "",
        }
        if self.step:
            mean = self.fitness_sum.item() / self.steps_per_epoch
            row["train_fitness"] = round(check_finite(mean, self.step), 6)
        self.fitness_sum.zero_()
        if self.step and hasattr(self.optimizer, "statistics"):
            row |= self.optimizer.statistics()
        lost: list[int] = []
        if self.epoch % self.config.run.eval_every == 0 or self.epoch == epochs:
            columns, lost = evaluate(self.network, self.data)
            row |= columns
        self.rows.append(row)
        self._say(epoch_line(row, epochs, lost if self.step else ()))
        if "train_accuracy" in row:
            self._ask_which_way_is_up()
        self.folder.write_metrics(self.rows)

    def _ask_which_way_is_up(self) -> None:
        """At the first evaluation: a loss handed in as a fitness would be raised, not lowered."""
        first, *later = [row for row in self.rows if "train_accuracy" in row]
        if len(later) != 1 or not self.evolution:
            return
        learned = later[0]["train_accuracy"] - first["train_accuracy"]
        if opposed(later[0]["train_fitness"] - self.watch.first, learned):
            self._say(
                "warning: fitness and accuracy go opposite ways; higher fitness is taken for "
                "better: is lower better (a loss)? Then return minus it"
            )

    def _forward_passes_per_image(self) -> float:
        """So far: each epoch all members, and the unperturbed network."""
        members = self.evolution.population if self.evolution else 0
        return (members + 1) * self.step / self.steps_per_epoch

    # ---- files ----

    def _save(self, status: str) -> None:
        """By the first process, which also says when."""
        if not processes.is_first():
            return
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "evolution": self.evolution.state_dict() if self.evolution else None,
            "fitness_sum": self.fitness_sum,
            "watch": self.watch.state(),
            "rows": self.rows,
            "seconds": self.clock.seconds,
            "compile_seconds": self.compile_seconds,
            "peak_mb": self._peak_mb(),
        }
        checkpoint.save(self.folder.checkpoint, state)
        self.folder.write_model(self.network)
        self._write_summary(status)
        self.saved_at = time.monotonic()

    def _write_summary(self, status: str) -> None:
        evaluated = [row for row in self.rows if row.get("test_accuracy", "") != ""][-1]
        self.folder.write_summary(
            {
                "method": self.method,
                "dataset": self.data.name,
                "seed": self.config.run.seed,
                "epochs": self.epoch,
                "steps": self.step,
                "population": self.evolution.population if self.evolution else None,
                "members_per_step": self._members_per_step(),
                "forward_passes_per_image": round(self._forward_passes_per_image(), 1),
                "test_accuracy": evaluated["test_accuracy"],
                "validation_accuracy": evaluated["validation_accuracy"] or None,
                "train_seconds": round(self.clock.seconds, 3),
                "seconds_to_97_5": self._seconds_to_goal(),
                "compile_seconds": round(self.compile_seconds, 3),
                "peak_memory_mb": round(self._peak_mb(), 1),
                "device": device_name(self.device),
                "status": status,
            }
        )

    def _members_per_step(self) -> int | None:
        """A batch member sees all examples of a batch, an example member one."""
        if not self.evolution:
            return None
        each = self.config.training.batch_size if self.evolution.members.by_example else 1
        return self.evolution.population * each

    def _seconds_to_goal(self) -> float | None:
        """Training seconds at the first evaluation at or above GOAL."""
        reached = (r["train_seconds"] for r in self.rows if (r.get("test_accuracy") or 0) >= GOAL)
        return next(reached, None)

    def _peak_mb(self) -> float:
        """Of the process that needs most."""
        return max(self.earlier_peak_mb, *self.peaks, peak_memory_mb(self.device))

    def _resume(self) -> bool:
        """Whether there is a checkpoint to go on from: without one the run starts at step 0."""
        saved = read_saved_config(self.folder.path)
        if saved.get("method") != self.method:
            raise UserError(
                f"{self.folder.path} holds a run of {saved.get('method')}, not of {self.method}"
            )
        differ = []
        for name, value in as_json(self.config).items():
            before = saved["flags"].get(name, value)  # a flag may be younger than the run
            if name not in FREE_ON_RESUME and before != value:
                differ.append(f"--{name.replace('_', '-')} was {before} and is {value} now")
        if differ:
            raise UserError(
                f"{self.folder.path} was started with other flags: {', '.join(differ)}; a resumed "
                "run keeps its flags (leave them out, or start another run)"
            )
        state = checkpoint.load(self.folder.checkpoint, self.device)
        if state is None:
            return False
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.evolution:
            self.evolution.load_state_dict(state["evolution"])
        self.step, self.rows = state["step"], state["rows"]
        self.fitness_sum = state["fitness_sum"]
        self.watch.load_state(state["watch"])
        self.clock = Clock(self.device, state["seconds"])
        self.compile_seconds, self.earlier_peak_mb = state["compile_seconds"], state["peak_mb"]
        return True

    def _finish(self) -> None:
        if processes.count() > 1:
            self.peaks = processes.of_all(peak_memory_mb(self.device))
            self._say(f"memory of all {len(self.peaks)} processes: {sum(self.peaks):,.0f} MB")
        self._save("finished")
        summary = (
            f"finished: test accuracy {self.rows[-1]['test_accuracy']:.2%} on {self.data.name}, "
            f"{self.clock.seconds:.1f} s of training, {self._peak_mb():,.0f} MB at the peak, "
            f"files in {self.folder.path}"
        )
        self._say(summary)

    # ---- the screen, and Ctrl-C ----

    def _say(self, text: str) -> None:
        self.progress.line(text)
        self.folder.log(text)

    def _on_signal(self, number: int, _: Any) -> None:
        """Stop after the present step; a second signal stops at once."""
        self.stop_requested = number
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)
