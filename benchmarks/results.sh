#!/usr/bin/env bash
# Reproduce all results; takes some hours on two idle cores.
#
# usage: benchmarks/results.sh FOLDER
#
# Everything is written under FOLDER; publish a table with
# python -m experiment.report publish FOLDER/table results/reference/NAME.
# Environment: PYTHON (default .venv/bin/python), MNIST_DIR (default data).
# After Ctrl-C the same command goes on; finished runs are skipped.
set -eo pipefail
case ${1:-} in "" | -*) exec sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" ;; esac
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}

# The table of the README
table=$out/table
SEEDS="0 1 2 3 4" RESULTS_DIR=$table ./run_experiments.sh
whole() {
    "$PYTHON" mnist_eggroll.py eggroll --fitness accuracy "${@:2}" --train-on-all --resume \
        --out-dir "$table/$1"
}
for seed in 0 1 2 3 4; do whole eggroll+accuracy/seed$seed --seed $seed; done
for seed in 0 1 2; do whole eggroll+unsmoothed-accuracy/seed$seed --seed $seed --smoothing 0; done
METHODS=eggroll-dense SEEDS="0 1 2" RESULTS_DIR=$table ./run_experiments.sh

# Steps, and their lower bounds
"$PYTHON" benchmarks/speed.py --csv "$out/speed.csv" --json "$out/speed.json"

# The original experiment: a population of 39,000, with accuracy as the signal, for an hour
experiment() {
    local folder=$out/population-39000/$1 code=0
    [ ! -e "$folder/done" ] || return 0
    timeout --foreground --signal INT 3600 "$PYTHON" mnist_eggroll.py "${@:2}" --population 39000 \
        --epochs 10 --fitness accuracy --train-on-all --resume --out-dir "$folder" || code=$?
    [ $code = 0 ] || [ $code = 124 ] || exit $code
    mkdir -p "$folder" && touch "$folder/done"
}
experiment eggroll eggroll
experiment eggroll+unsmoothed eggroll --smoothing 0
experiment eggroll-dense eggroll-dense --smoothing 0
"$PYTHON" benchmarks/population.py "$out/population-39000"

# 784-100-50-10 in integers
for seed in 0 1 2 3 4; do
    "$PYTHON" mnist_eggroll_int8.py --hidden-dim 100 50 --epochs 10 --train-on-all --seed $seed \
        --resume --out-dir "$out/integers/node-perturbation-int8/seed$seed"
done
"$PYTHON" -m experiment.report "$out/integers"

# Other signals, and units without a gradient, in one sitting with the methods themselves
SEEDS="0 1 2" RESULTS_DIR=$out/any-signal ./run_experiments.sh --all

"$PYTHON" benchmarks/ablations.py --out-dir "$out/ablations"
"$PYTHON" benchmarks/frontier.py --out-dir "$out/frontier"
