"""EGGROLL with one setting changed at a time: validation accuracy, three seeds.

python benchmarks/ablations.py --out-dir results/ablations     # an hour and a half on two cores
python benchmarks/ablations.py --tiny --dataset mnist-sample   # one short run of each

Every run has half of the preset's members over one epoch, unless its row says otherwise; learning
rates follow the preset's rule. Finished runs are kept, and interrupted ones continue.
"""

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a file, from any folder

from benchmarks.rows import Row, provenance_of, show, write_rows
from experiment.commands import COMMANDS, finish
from experiment.config import MARKERS
from experiment.files import write_csv
from experiment.script import run_script
from experiment.style import STYLE, colour, save

USUAL = ("--population", "4096", "4096", "128", "--epochs", "1")
TINY = ("--population", "66", "--epochs", "1")
POPULATIONS = (500, 1_000, 2_000, 4_000, 8_000, 16_000, 40_000)


def changed(flag: str, values: Sequence[float], usual: float = 0) -> dict[str, str]:
    """Return {value: its flag}, without one for the preset's value."""
    return {f"{value:,}": "" if value == usual else f"--{flag} {value}" for value in values}


Setting = Literal[
    "rank", "units", "baseline", "members by layer", "batch size", "sigma", "population"
]
ABLATIONS: dict[Setting, dict[str, str]] = {  # {setting: {value: what is typed for it}}
    "rank": changed("rank", (1, 2, 4), 1),
    "units": changed("units", (4, 8, 16, 64, 256), 8),
    "baseline": {"mean": "", "unperturbed": "unperturbed", "twin": "twins"},
    "members by layer": {
        "6144 2048 128": "--population 6144 2048 128",
        "4096 4096 128": "",
        "2048 6144 128": "--population 2048 6144 128",
        "2784 2784 2752": "--population 2784 2784 2752",
    },
    "batch size": changed("batch-size", (32, 64, 128, 256, 512), 128),
    "sigma": changed("sigma", (0.002, 0.005, 0.01, 0.02, 0.04, 0.08), 0.02),
    "population": changed("population", POPULATIONS),
}
MOSAIC = [
    ["rank", "units", "baseline"],
    ["members by layer", "batch size", "sigma"],
    ["population"] * 3,
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of this benchmark."""

    out_dir: Path = Path("results/ablations")
    """Folder for all runs, the table and the plot."""
    settings: tuple[Setting, ...] = tuple(ABLATIONS)
    """Settings to change."""
    seeds: int = 3
    """Repeat each run with seeds 0 to n - 1."""
    tiny: bool = False
    """Train one epoch with few members and one seed."""
    dataset: Literal["mnist", "mnist-sample"] = "mnist"
    """MNIST is read from $MNIST_DIR, else from data; mnist-sample needs no network."""
    threads: int = 2
    """CPU threads of a run."""


def train(config: Config, typed: str, folder: Path, seed: int) -> Mapping[str, Any]:
    """Return the summary of the run FOLDER/seed<k>."""
    words, command = typed.split(), COMMANDS["eggroll"]
    if words and not words[0].startswith("--"):
        command = ("benchmarks/baselines.py", words.pop(0))
    # of a flag that is typed twice, the last counts
    flags = [*words, *TINY] if config.tiny else [*USUAL, *words]
    flags += ["--dataset", config.dataset, "--threads", str(config.threads), "--seed", str(seed)]
    return finish(command, folder / f"seed{seed}", *flags)


def measure(config: Config) -> Iterator[tuple[Row, Path]]:
    """Yield a row over the seeds that did not diverge, and a run, for each value of a setting."""
    for setting in config.settings:
        for value, typed in ABLATIONS[setting].items():
            name = "_".join(typed.replace("--", "").split()) or "usual"
            folder = config.out_dir / "runs" / name
            seeds = range(1 if config.tiny else config.seeds)
            runs = [train(config, typed, folder, seed) for seed in seeds]
            runs = [run for run in runs if run["status"] == "finished"]
            accuracies = [100 * run["validation_accuracy"] for run in runs]
            row = {
                "setting": setting,
                "value": value,
                "seeds": len(runs),
                "validation_accuracy": round(statistics.mean(accuracies), 3) if runs else "",
                "standard_deviation": round(statistics.stdev(accuracies), 3) if runs[1:] else 0.0,
                "seconds": round(_median(runs, "train_seconds"), 1),
                "memory_mb": round(_median(runs, "peak_memory_mb")),
            }
            yield row, folder / "seed0"


def _median(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs) if runs else 0.0


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each setting, with the same accuracy axis."""
    rows = [row for row in rows if row["validation_accuracy"] != ""]
    accuracies = [float(row["validation_accuracy"]) for row in rows]
    lowest = max(min(accuracies) - 0.5, max(accuracies) - 9)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 10), layout="constrained")
        places = figure.subplot_mosaic(MOSAIC, sharey=True)
        for setting, axes in places.items():
            own = [row for row in rows if row["setting"] == setting]
            draw_panel(axes, setting, own)
            axes.set_ylim(lowest, max(accuracies) + 0.8)
            axes.label_outer()
            axes.tick_params(labelbottom=True)
        places["population"].set_title(f"population: {law(rows)}", fontsize=12)
        figure.supylabel("validation accuracy (%)", fontsize=12)
        figure.suptitle(
            "eggroll, one setting changed at a time; else 8,320 members, one epoch\n"
            f"mean and standard deviation of {rows[0]['seeds']:g} seeds"
        )
        save(figure, path.parent, path.stem)


def draw_panel(axes: Axes, setting: str, rows: Sequence[Row]) -> None:
    """Draw mean and standard deviation in the order of the rows, the mean as a number too."""
    means = [float(row["validation_accuracy"]) for row in rows]
    spread = [float(row["standard_deviation"]) for row in rows]
    axes.errorbar(range(len(rows)), means, spread, fmt="D-", color=colour("eggroll"), capsize=3)
    for place, (mean, above) in enumerate(zip(means, spread, strict=True)):
        text = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "fontsize": 11}
        paper = {"fc": "white", "ec": "none", "pad": 0.5}  # where a line falls steeply
        axes.annotate(f"{mean:.1f}", (place, mean + above), bbox=paper, **text)
    axes.set_title(setting, fontsize=12)
    names = [f"{v:,g}" if isinstance(v, float) else v for v in (row["value"] for row in rows)]
    axes.set_xticks(range(len(rows)), [name.replace(" ", "\n") for name in names], fontsize=10)
    axes.margins(x=0.15)


def law(rows: Sequence[Row]) -> str:
    """Fit error = a x population^b in logarithms; return it as text, "" without two populations."""
    own = [row for row in rows if row["setting"] == "population"]
    members = [float(str(row["value"]).replace(",", "")) for row in own]
    errors = [100 - float(row["validation_accuracy"] or 0) for row in own]
    if len(own) < 2:
        return ""
    slope, height = np.polyfit(np.log(members), np.log(errors), 1)
    return f"error = {np.exp(height):.3g} % x P^{slope:.2f}"


def main() -> None:
    config, rows = tyro.cli(Config, config=MARKERS), []
    config.out_dir.mkdir(parents=True, exist_ok=True)
    for row, run in measure(config):
        show(row, first=not rows)
        rows.append(row | provenance_of(run))
        write_csv(config.out_dir / "ablations.csv", rows, list(rows[0]))
    write_rows(rows, config.out_dir / "ablations.csv", None, plot)
    print(law(rows))


if __name__ == "__main__":
    run_script(main, "ablations.py")
