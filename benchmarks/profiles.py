"""Operations of 20 training steps of each method, by the time that they take, as text.

python benchmarks/profiles.py --file profiles.txt
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.profiler import profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a file, from any folder

from benchmarks.rows import DeviceFlags
from benchmarks.steps import METHODS, make
from experiment.config import MARKERS
from experiment.device import choose_device, device_name, set_threads, synchronise
from experiment.script import run_script

STEPS, ROWS = 20, 25


@dataclass(frozen=True, kw_only=True)
class Config(DeviceFlags):
    """Flags of this benchmark."""

    file: Path
    """File to write."""
    methods: tuple[str, ...] = METHODS
    """Methods, or METHOD:POPULATION; without a population, the preset's."""


def profile_of(name: str, device: torch.device) -> str:
    """Return a method's operations as a table under a title, or why there are none."""
    try:
        step, captured = make(name, device).work()
        with profile() as profiler:
            for _ in range(STEPS):
                step()
            synchronise(device)
    except RuntimeError as error:  # one method must not end the others
        return f"{name} failed: {error}"
    kind = "cuda" if device.type == "cuda" else "cpu"
    table = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=ROWS)
    graph = ", each a graph" if captured else ""
    return f"{name}, {STEPS} steps{graph}, {device_name(device)}\n{table}"


def main() -> None:
    config = tyro.cli(Config, config=MARKERS)
    set_threads(config.threads)
    device = choose_device(config.device)
    config.file.parent.mkdir(parents=True, exist_ok=True)
    with config.file.open("w") as file:
        for name in config.methods:
            file.write(f"{profile_of(name, device)}\n\n")
            file.flush()
    print(config.file)


if __name__ == "__main__":
    run_script(main, "profiles.py")
