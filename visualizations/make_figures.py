"""Draw the figures that explain EGGROLL, each as PNG and SVG.

python -m visualizations.make_figures [--out-dir DIR]
"""

from pathlib import Path

import matplotlib.pyplot as plt
import tyro

from experiment.script import run_script
from visualizations import (
    estimators,
    how_eggroll_works,
    one_direction,
    what_scores_tell,
    why_low_rank,
)
from visualizations.canvas import SHEET_STYLE

FIGURES = (how_eggroll_works, estimators, one_direction, what_scores_tell, why_low_rank)
FOLDER = Path(__file__).resolve().parent


def draw_all(out_dir: Path = FOLDER) -> list[Path]:
    """Draw the figures that explain EGGROLL, each as PNG and SVG; returns the files.

    Args:
        out_dir: Folder for the files.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    with plt.rc_context(SHEET_STYLE):
        for module in FIGURES:
            figure, name = module.draw(), module.__name__.rpartition(".")[2]
            for kind, metadata in (("png", None), ("svg", {"Date": None})):
                paths.append(out_dir / f"{name}.{kind}")
                figure.savefig(paths[-1], metadata=metadata)
            plt.close(figure)
    return paths


if __name__ == "__main__":
    run_script(lambda: print(*tyro.cli(draw_all), sep="\n"), "make_figures.py")
