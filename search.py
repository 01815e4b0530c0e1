"""Search the settings of a method on the validation split: all cells of a grid, or ranges by TPE.

python search.py eggroll                                        # results/grids/eggroll.toml
python search.py eggroll --grid results/grids/eggroll-tpe.toml --trials 20
python search.py backprop --seconds 1800 --threads 1            # other flags go to every trial

The same command continues a search that was stopped; in two terminals it uses two processes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiment.config import PathFlag
from experiment.errors import Interrupted, UserError
from experiment.grid import GRIDS, Grid
from experiment.heat_map import draw
from experiment.script import run_script

Method = Literal["backprop", "eggroll", "node-perturbation", "node-perturbation-int8"]


@dataclass(frozen=True)
class Config:
    """Flags of the search; others are passed to the training script."""

    method: Annotated[Method, tyro.conf.Positional]
    """Method whose settings are searched."""
    grid: PathFlag = None
    """TOML file with the settings (None: results/grids/METHOD.toml)."""
    trials: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Trials in all, those of earlier calls included (None: the whole grid; 50 with a range)."""
    seconds: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Start no new trial once total training time reaches this."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of a trial, whose value is their mean accuracy; from 4 on, bad trials are pruned."""
    out_dir: PathFlag = None
    """Folder of the search (None: results/search/ and the grid's name)."""


def main() -> None:
    config, flags = tyro.cli(
        Config, description=__doc__, config=(tyro.conf.OmitArgPrefixes,), return_unknown_args=True
    )
    check(config)
    try:
        from experiment.search import Search, describe
    except ModuleNotFoundError as missing:
        raise UserError(f"{missing}: pip install -r requirements-dev.txt") from missing
    path = config.grid or GRIDS / f"{config.method}.toml"
    folder = config.out_dir or Path("results") / "search" / path.stem
    grid = Grid.read(path)
    search = Search(config.method, grid, config.seeds, flags, folder)
    try:
        while held := search.next_trial(config.trials, config.seconds):
            print(describe(search.run(held)), flush=True)
    except KeyboardInterrupt:
        raise Interrupted("interrupted: type the same command to go on") from None
    if best := search.best():
        print(f"best: {describe(best)}")
    plots = draw(search.rows(), grid, config.method, folder / "heat_map")
    print(*(folder / "trials.csv", *plots), sep="\n")


def check(config: Config) -> None:
    """Raise UserError for the first invalid value."""
    for name in ("trials", "seconds"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be > 0, got {value}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"--seeds must be different numbers, got {config.seeds or 'none'}")


if __name__ == "__main__":
    run_script(main, "search.py")
