"""Run all methods over the seeds, then make the table and the plots.

usage: ./run_experiments.sh [--quick] [--all] [any flag of the two scripts]

  --quick       everything in about a minute, to see that it works
  --all         also networks without a gradient and scores that are no loss, with a figure of
                their own: about half an hour more for each seed on a CPU
  --help        this text

A flag goes to the methods where it has an effect. What they mean: python mnist_eggroll.py --help
Methods: backprop; eggroll, with example members; eggroll-int8, the same in integers alone;
eggroll-batch, with batch members as in the paper, in the few minutes that they get on a CPU;
eggroll-batch-one-layer, whose batch members perturb one layer each.

Environment:
  SEEDS         which seeds to run (default: "0 1 2" on a GPU, "0" on a CPU)
  METHODS       which methods to run (default: backprop, eggroll, eggroll-batch)
  MNIST_DIR     folder that holds MNIST/raw (default: data, downloaded if need be)
  RESULTS_DIR   where everything is written (default: results/latest)

Runs that are finished are skipped, and Ctrl-C loses nothing: the same command goes on. Runs made
with other flags are moved aside, never overwritten. The final runs train on all training images.
Without MNIST and without a network, the 5,000 digits of mnist-sample are used, and it says so.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import tyro

from lab import data
from lab.cli import MARKERS, DataFlags, read_saved_config, run_script
from lab.errors import Interrupted, UserError
from lab.report import read_summary, write_report

ROOT = Path(__file__).resolve().parent.parent
EGGROLL = "mnist_eggroll.py"
COMMANDS = {
    "backprop": ["mnist_backprop.py"],
    "eggroll": [EGGROLL],
    "eggroll-int8": [EGGROLL, "--dtype", "int8"],
    "eggroll-batch": [EGGROLL, "--members", "batch"],
    "eggroll-batch-one-layer": [EGGROLL, "--members", "batch", "--perturb", "one"],
}
USUAL = ("backprop", "eggroll", "eggroll-batch")

# What --all adds: rows named METHOD+VARIANT
ACTIVATIONS = ("int8-round", "argmax-k", "step", "sign")
FITNESSES = {
    "accuracy": "accuracy",
    "even-digits": "examples/even_digits.py:even_hits",
    "macro-F1": "examples/macro_f1.py:macro_f1",
    "priced-confusions": "examples/costly_confusion.py:minus_cost",
    "external-program": "examples/external_program.py:verdict",
    "sum-of-a-row": "examples/sum_of_a_row.py:sum_is_right",
}
COMMANDS |= {
    f"{method}+{name}": [*COMMANDS[method], "--activation", name]
    for name in ACTIVATIONS
    for method in ("backprop", "eggroll")
}
COMMANDS |= {
    f"eggroll+{name}": [*COMMANDS["eggroll"], "--fitness", fitness]
    for name, fitness in FITNESSES.items()
}
COMMANDS |= {
    f"{method}+accuracy": [*COMMANDS[method], "--fitness", "accuracy"]
    for method in ("eggroll-int8", "eggroll-batch")
}

INSTEAD = {  # flags that this command sets for each run, and what to type for them
    "--members": 'METHODS="eggroll eggroll-batch" ./run_experiments.sh',
    "--perturb": 'METHODS="eggroll-batch-one-layer" ./run_experiments.sh',
    "--dtype": 'METHODS="eggroll-int8" ./run_experiments.sh, or python mnist_eggroll.py',
    "--seed": 'SEEDS="0 1 2" ./run_experiments.sh',
    "--out-dir": "RESULTS_DIR=folder ./run_experiments.sh",
    "--resume": "./run_experiments.sh, which goes on by itself",
    "--overwrite": "RESULTS_DIR=folder ./run_experiments.sh",
    "--print-config": "python mnist_eggroll.py --print-config",
}
NO_EFFECT = re.compile(r"error: --(?:no-)?([a-z-]+)\S*( \S+)? has no effect")
UNKNOWN = re.compile(r"Unrecognized options: +--(?:no-)?([a-z-]+)")


def main() -> None:
    args = [arg for arg in sys.argv[1:] if arg != "--all"]
    if {"-h", "--help"} & set(args):
        print(__doc__)
        return
    for flag, instead in INSTEAD.items():
        if given(flag, args):
            raise UserError(f"{flag} is set here for each run (type {instead})")
    methods = chosen_methods(everything="--all" in sys.argv[1:])
    for flag in ("--activation", "--fitness"):
        if given(flag, args) and any("+" in method for method in methods):
            raise UserError(f"{flag} is set by the rows of --all (leave out one of the two)")
    experiment(args, Path(os.environ.get("RESULTS_DIR", "results/latest")), methods)


def experiment(args: list[str], folder: Path, methods: Sequence[str]) -> None:
    """Every run that is not finished yet, then the report."""
    common = [*args, *dataset_flags(args), "--train-on-all"]
    flags, settings = {}, {}
    for method in methods:
        flags[method], settings[method] = flags_with_effect(method, common)
    check_that_all_are_used(args, flags)
    seeds = chosen_seeds(on_gpu=settings[methods[0]]["device"] != "cpu")
    move_aside_other_settings(folder, settings)
    for seed in seeds:
        for method in methods:
            run(method, [*flags[method], "--seed", str(seed)], folder / method / f"seed{seed}")
    table, paths = write_report(folder)
    print(f"\n{table}")
    print("\n".join(map(str, paths)))


def given(flag: str, args: Sequence[str]) -> bool:
    return any(arg.split("=")[0].replace("_", "-") == flag for arg in args)


def dataset_flags(args: Sequence[str]) -> list[str]:
    """Nothing where the dataset is at hand; else, and loudly, the sample that needs no network."""
    flags, _ = tyro.cli(DataFlags, args=args, config=MARKERS, return_unknown_args=True)
    try:
        data.load_for(flags, torch.device("cpu"))
    except data.DataMissing as missing:
        if given("--dataset", args):
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


def flags_with_effect(method: str, args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """`args` less what has no effect on this method, and every flag as its script would use it.

    Ends with the script's own message for a flag that is wrong.
    """
    while True:
        command = [*command_of(method), *args, "--print-config"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return args, json.loads(done.stdout)
        refused = NO_EFFECT.search(done.stderr) or UNKNOWN.search(done.stdout + done.stderr)
        shorter = without(args, refused[1]) if refused else args
        if shorter == args:
            print(done.stdout + done.stderr, file=sys.stderr, end="")
            raise SystemExit(done.returncode)
        args = shorter


def bare(arg: str) -> str:
    """The name of a flag, however it is typed."""
    return arg.split("=")[0].replace("_", "-").removeprefix("--").removeprefix("no-")


def without(args: Sequence[str], name: str) -> list[str]:
    """`args` less a flag and its values."""
    kept, dropping = [], False
    for arg in args:
        if arg.startswith("--"):
            dropping = bare(arg) == name
        if not dropping:
            kept.append(arg)
    return kept


def check_that_all_are_used(args: Sequence[str], flags: dict[str, list[str]]) -> None:
    """Ends with a script's own message for a flag that none of the methods takes."""
    for arg in args:
        if arg.startswith("--") and not any(arg in taken for taken in flags.values()):
            rest = without(args, bare(arg))
            alone = [word for word in args if word not in rest]
            done = subprocess.run([*command_of(list(flags)[-1]), *alone, "--print-config"])
            raise SystemExit(done.returncode)


def chosen_seeds(on_gpu: bool) -> list[int]:
    text = os.environ.get("SEEDS") or ("0 1 2" if on_gpu else "0")
    try:
        return [int(seed) for seed in text.replace(",", " ").split()]
    except ValueError as error:
        raise UserError(f'SEEDS={text} is no list of whole numbers (type SEEDS="0 1 2")') from error


def chosen_methods(everything: bool) -> list[str]:
    methods = (os.environ.get("METHODS") or " ".join(USUAL)).split()
    for method in methods:
        if method not in COMMANDS:
            raise UserError(f"METHODS names {method} (there are: {', '.join(COMMANDS)})")
    more = [method for method in COMMANDS if "+" in method] if everything else []
    return list(dict.fromkeys([*methods, *more]))


def move_aside_other_settings(folder: Path, settings: dict[str, dict]) -> None:
    """Runs made with other flags would be compared with these: give them a folder of their own."""
    for method, wanted in settings.items():
        for run_folder in folder.glob(f"{method}/seed*"):
            if not (run_folder / "config.json").exists() or same_settings(run_folder, wanted):
                continue
            stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
            aside = folder.with_name(f"{folder.name}_until_{stamp}")
            folder.rename(aside)
            print(f"{folder} held runs made with other flags; they are in {aside} now")
            return


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
    command.append("--resume" if any(folder.glob("checkpoint*.pt")) else "--overwrite")
    print(f"\n--- {folder}", flush=True)
    process = subprocess.Popen(command)
    # Ctrl-C reaches the run itself, which saves what is done; wait for that
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = process.wait()
    signal.signal(signal.SIGINT, earlier)
    if code in (129, 130, 143):
        raise Interrupted("type the same command again to go on", code - 128)
    if code:
        raise SystemExit(code if code > 0 else 1)


if __name__ == "__main__":
    run_script(main, "run_experiments.sh", errors=())
