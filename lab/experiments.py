"""Run all methods over the seeds, then make the table and the plots.

usage: ./run_experiments.sh [--quick] [--all] [any flag of the two scripts]

  --quick       everything in about a minute, to see that it works
  --all         afterwards also networks without a gradient (activations, binary weights), scores
                that are no loss, and members of full rank: a quarter of an hour more on
                a CPU, in the folder any-signal with a table and a figure of its own
  --help        this text

Flags that both scripts have (--epochs, --dataset, --hidden-dim, --device, ...) go to both, the
others to mnist_eggroll.py alone. For what they mean: python mnist_eggroll.py --help
Methods: backprop; eggroll-per-example, EGGROLL with per-example credit; eggroll, the paper's
estimator in the few minutes that it gets on a CPU; eggroll-tools, the same with what makes one
score per member go further; eggroll-per-example-int8 and eggroll-int8, both in integers alone.

Environment:
  SEEDS         which seeds to run (default: "0 1 2" on a GPU, "0" on a CPU)
  METHODS       which methods to run (default: backprop, eggroll-per-example, eggroll)
  MNIST_DIR     folder that holds MNIST/raw (default: data, downloaded if need be)
  RESULTS_DIR   where everything is written (default: results/latest)

Runs that are finished are skipped, and Ctrl-C loses nothing: the same command goes on. Runs made
with other flags are moved aside, never overwritten. The final runs train on all training images.
Without MNIST and without a network, the 5,000 digits of mnist-sample are used, and it says so.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import tyro

from lab import any_signal, data
from lab.cli import MARKERS, SharedConfig, read_saved_config, run_script
from lab.errors import Interrupted, UserError
from lab.report import read_summary, write_report

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "backprop": ["mnist_backprop.py"],
    "eggroll-per-example": ["mnist_eggroll.py", "--estimator", "per-example"],
    "eggroll-per-example-int8": ["mnist_eggroll.py", "--dtype", "int8"],
    "eggroll-tools": ["mnist_eggroll.py", "--estimator", "population", "--preset", "tools"],
    "eggroll": ["mnist_eggroll.py", "--estimator", "population"],
    "eggroll-int8": ["mnist_eggroll.py", "--estimator", "population", "--dtype", "int8"],
}
USUAL = ("backprop", "eggroll-per-example", "eggroll")
INSTEAD = {  # flags that this command sets for each run, and what to type for them
    "--estimator": 'METHODS="backprop eggroll" ./run_experiments.sh',
    "--preset": 'METHODS="backprop eggroll-tools" ./run_experiments.sh',
    "--seed": 'SEEDS="0 1 2" ./run_experiments.sh',
    "--out-dir": "RESULTS_DIR=folder ./run_experiments.sh",
    "--resume": "./run_experiments.sh, which goes on by itself",
    "--overwrite": "RESULTS_DIR=folder ./run_experiments.sh",
    "--print-config": "python mnist_eggroll.py --print-config",
}


def main() -> None:
    args = [arg for arg in sys.argv[1:] if arg != "--all"]
    if {"-h", "--help"} & set(args):
        print(__doc__)
        return
    for flag, instead in INSTEAD.items():
        if given(flag, args):
            raise UserError(f"{flag} is set here for each run (type {instead})")
    folder = Path(os.environ.get("RESULTS_DIR", "results/latest"))
    experiment(args, folder, everything="--all" in sys.argv[1:])


def experiment(args: list[str], folder: Path, everything: bool) -> None:
    """Every run that is not finished yet, then the report."""
    shared, eggroll_only = split_flags(args)
    common = [*dataset_flags(shared, given("--dataset", args)), "--train-on-all"]
    methods = chosen_methods()
    flags = dict.fromkeys(methods, args + common)
    if "backprop" in methods:
        flags["backprop"] = without(args, eggroll_only) + common
    settings = {method: resolved_flags(method, typed) for method, typed in flags.items()}
    seeds = chosen_seeds(on_gpu=settings[methods[0]]["device"] != "cpu")
    move_aside_other_settings(folder, settings)
    for seed in seeds:
        for method in methods:
            run(method, [*flags[method], "--seed", str(seed)], folder / method / f"seed{seed}")
    table, paths = write_report(folder)
    print(f"\n{table}")
    print("\n".join(map(str, paths)))
    if everything:
        typed = {"backprop": without(args, eggroll_only) + common}
        experiment_with_any_signal(lambda method: typed.get(method, args + common), seeds, folder)


def experiment_with_any_signal(
    typed: Callable[[str], list[str]], seeds: Sequence[int], folder: Path
) -> None:
    """The rows of lab.any_signal that are not finished yet, with these flags for each method."""
    todo = []
    for row in any_signal.rows():
        flags = typed(row.base)
        flags = [*flags, *row.flags_for(given("--quick", flags))]
        for seed in seeds:
            todo.append((row.base, [*flags, "--seed", str(seed)], row.folder(folder, seed)))
    if any(made_otherwise(*each) for each in todo):
        move_aside(folder / any_signal.FOLDER)
    for each in todo:
        run(*each)
    table, paths = any_signal.write_report(folder)
    print(f"\n{table}")
    print("\n".join(map(str, paths)))


def made_otherwise(method: str, typed: Sequence[str], folder: Path) -> bool:
    """Whether the folder holds a run that another command made."""
    if not (folder / "config.json").exists():
        return False
    own = [*COMMANDS[method][1:], *typed]
    return read_saved_config(folder)["command"][: len(own)] != own


def given(flag: str, args: Sequence[str]) -> bool:
    return any(arg.split("=")[0].replace("_", "-") == flag for arg in args)


def split_flags(args: Sequence[str]) -> tuple[SharedConfig, list[str]]:
    """The shared flags, and the arguments that only EGGROLL can know."""
    return tyro.cli(SharedConfig, args=args, config=MARKERS, return_unknown_args=True)


def without(args: Sequence[str], left_out: Sequence[str]) -> list[str]:
    """`args` less a subsequence of them."""
    pending, kept = list(left_out), []
    for arg in args:
        if pending and arg == pending[0]:
            pending.pop(0)
        else:
            kept.append(arg)
    return kept


def dataset_flags(shared: SharedConfig, chosen: bool) -> list[str]:
    """Nothing where the dataset is at hand; else, and loudly, the sample that needs no network."""
    try:
        data.load_for(shared.data, torch.device("cpu"))
    except data.DataMissing as missing:
        if chosen:
            raise
        rule = "!" * 78
        print(f"{rule}\n{missing}\n", file=sys.stderr)
        print(
            "GOING ON WITH mnist-sample: 4,000 training and 1,000 test digits, NOT the full MNIST."
            f"\nIts accuracies are lower, for both methods.\n{rule}",
            file=sys.stderr,
        )
        return ["--dataset", data.SAMPLE]
    return []


def command_of(method: str) -> list[str]:
    script, *flags = COMMANDS[method]
    return [sys.executable, str(ROOT / script), *flags]


def resolved_flags(method: str, typed: Sequence[str]) -> dict[str, Any]:
    """Every flag as the script would use it. Ends with the script's own message if one is wrong."""
    command = [*command_of(method), *typed, "--print-config"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def chosen_seeds(on_gpu: bool) -> list[int]:
    text = os.environ.get("SEEDS") or ("0 1 2" if on_gpu else "0")
    try:
        return [int(seed) for seed in text.replace(",", " ").split()]
    except ValueError as error:
        raise UserError(f'SEEDS={text} is no list of whole numbers (type SEEDS="0 1 2")') from error


def chosen_methods() -> list[str]:
    methods = (os.environ.get("METHODS") or " ".join(USUAL)).split()
    for method in methods:
        if method not in COMMANDS:
            raise UserError(f"METHODS names {method} (there are: {', '.join(COMMANDS)})")
    return methods


def move_aside_other_settings(folder: Path, settings: dict[str, dict]) -> None:
    """Runs made with other flags would be compared with these: give them a folder of their own."""
    for method, wanted in settings.items():
        for run_folder in folder.glob(f"{method}/seed*"):
            if not (run_folder / "config.json").exists() or same_settings(run_folder, wanted):
                continue
            move_aside(folder)
            return


def move_aside(folder: Path) -> None:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    aside = folder.with_name(f"{folder.name}_until_{stamp}")
    while aside.exists():  # moved twice within a second
        aside = aside.with_name(f"{aside.name}_")
    folder.rename(aside)
    print(f"{folder} held runs made with other flags; they are in {aside} now")


def same_settings(run_folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether a run was made with these flags, wherever its data lay and whatever its seed."""
    flags = read_saved_config(run_folder)["flags"]
    ignored = ("seed", "data_dir", "chunk_size")
    return all(flags.get(k) == v for k, v in wanted["flags"].items() if k not in ignored)


def run(method: str, typed: Sequence[str], folder: Path) -> None:
    """One run in a process of its own: peak memory is then its own too."""
    command = [*command_of(method), *typed, "--out-dir", str(folder)]
    if (folder / "summary.json").exists() and read_summary(folder)["status"] == "finished":
        print(f"{folder}: finished already")
        return
    command.append("--resume" if (folder / "checkpoint.pt").exists() else "--overwrite")
    print(f"\n--- {folder}", flush=True)
    process = subprocess.Popen(command)
    # Ctrl-C reaches the run itself, which saves what is done; wait for that
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = process.wait()
    signal.signal(signal.SIGINT, earlier)
    if code == 130:
        raise Interrupted("type the same command again to go on")
    if code:
        raise SystemExit(code if code > 0 else 1)


if __name__ == "__main__":
    run_script(main, "run_experiments.sh", errors=())
