"""Draw the figures that explain EGGROLL, each as PNG and SVG.

python visualizations/make_figures.py [--out-dir DIR]
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import tyro

# a script's own folder is on the path, the project that it belongs to is not
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.cli import MARKERS, run_script
from lab.plots import save
from visualizations import algorithm, how_eggroll_works, two_kinds_of_members, why_low_rank
from visualizations.canvas import TALK_STYLE

FIGURES = (how_eggroll_works, two_kinds_of_members, algorithm, why_low_rank)


@dataclass(frozen=True)
class Config:
    """Draw the figures that explain EGGROLL, each as PNG and SVG."""

    out_dir: Path = Path(__file__).resolve().parent
    """Folder that the files are written to."""


def draw_all(folder: Path) -> list[Path]:
    """Every figure, named after its module; returns the files."""
    paths = []
    with plt.rc_context(TALK_STYLE):
        for module in FIGURES:
            paths += save(module.draw(), folder, module.__name__.rpartition(".")[2])
    return paths


def main() -> None:
    out_dir = tyro.cli(Config, config=MARKERS).out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    print("\n".join(map(str, draw_all(out_dir))))


if __name__ == "__main__":
    run_script(main, "make_figures.py", errors=())
