"""Draw the plots of committed results again, from their CSV files.

python benchmarks/redraw.py results/reference/third-edition
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a file, from any folder

from benchmarks import ablations, alignment, frontier, speed
from benchmarks.rows import Row
from experiment import plots
from experiment.any_signal import any_signal_figure
from experiment.errors import UserError
from experiment.grid import GRIDS, Grid
from experiment.heat_map import draw
from experiment.report import read_curves
from experiment.script import run_script
from experiment.style import STYLE, save
from experiment.tables import read_rows


def draw_any_signal(rows: Sequence[Row], path: Path) -> None:
    with plt.rc_context(STYLE):
        save(any_signal_figure(rows, rows[0]["dataset"]), path.parent, "any_signal")


PLOTS = {
    "any-signal/summary.csv": draw_any_signal,
    "ablations.csv": ablations.plot,
    "alignment.csv": alignment.plot,
    "frontier.csv": frontier.plot,
    "speed.csv": speed.plot,
}


def read_numbers(path: Path) -> list[Row]:
    """Return the rows of a CSV file, numbers as floats."""
    return [{name: number(cell) for name, cell in row.items()} for row in read_rows(path)]


def number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def draw_search(trials: Path) -> list[Path]:
    """Draw the heat map of results/grids/NAME.toml beside NAME.csv."""
    grid = Grid.read(GRIDS / f"{trials.stem}.toml")
    return draw(read_rows(trials), grid, trials.stem, trials.with_suffix(""))


def main() -> None:
    match sys.argv[1:]:
        case [name] if (Path(name) / "summary.csv").exists():
            folder = Path(name)
        case words:
            raise UserError(f"expected a folder that holds a summary.csv, got {' '.join(words)}")
    summaries = [row | {"seed": int(row["seed"])} for row in read_numbers(folder / "summary.csv")]
    for path in plots.draw_all(read_curves(folder, summaries), summaries, folder):
        print(path)
    for path in sorted(folder.glob("search/*.png")):
        for drawn in draw_search(path.with_suffix(".csv")):
            print(drawn)
    for name, plot in PLOTS.items():
        if (folder / name).exists():
            plot(read_numbers(folder / name), folder / name)
            print(f"{folder / name}, plot beside it")


if __name__ == "__main__":
    run_script(main, "redraw.py")
