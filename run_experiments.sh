#!/usr/bin/env bash
# Train MNIST by backprop and by EGGROLL; write the table and the plots to results/latest.
#
# usage: ./run_experiments.sh [--quick] [--all] [flags of the training scripts]
#
#   --quick   everything in a minute or two, to see that it works; in results/quick
#   --all     also activations without a gradient and fitnesses that are no loss
#
# Flags go to every script; python mnist_eggroll.py --help explains them. Environment:
#   SEEDS="0 1 2"             default 0
#   METHODS="backprop ..."    default backprop eggroll node-perturbation node-perturbation-int8;
#                             there is also eggroll-dense
#   RESULTS_DIR, MNIST_DIR    default results/latest, data (downloaded if need be)
#   BACKPROP_ARGS, EGGROLL_ARGS   flags for one side alone
#
# After Ctrl-C the same command goes on; finished runs are skipped.
set -eo pipefail
case " $* " in *" --help "* | *" -h "*) exec sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh
use_python requirements.txt

known="backprop eggroll eggroll-dense node-perturbation node-perturbation-int8"
methods=${METHODS:-backprop eggroll node-perturbation node-perturbation-int8}
all= quick= flags=()
for word; do
    case $word in --all) all=1 ;; --quick) quick=1 ;; *) flags+=("$word") ;; esac
done
out=${RESULTS_DIR:-results/${quick:+quick}}
[ "$out" != results/ ] || out=results/latest
for method in $methods; do
    [[ " $known " == *" $method "* ]] || fail "METHODS must name some of $known, got $method"
done
export MPLBACKEND=agg  # Jupyter names a backend that .venv need not have
sample=$("$PYTHON" -m experiment.data "${flags[@]}")  # flags for the sample where MNIST is missing
train=($sample --train-on-all)

# run ROW SCRIPT [FLAGS]: one run; a row is a method or METHOD+VARIANT
run() {
    local row=$1 method=${1%%+*} side=${EGGROLL_ARGS:-}
    [[ " $methods " == *" $method "* ]] || return 0
    [ "$method" = backprop ] && side=${BACKPROP_ARGS:-}
    echo "--- $out/$row/seed$seed"
    "$PYTHON" "${@:2}" "${train[@]}" $side "${flags[@]}" \
        --seed "$seed" --resume --out-dir "$out/$row/seed$seed"
}

for seed in ${SEEDS:-0}; do
    if [ $quick ]; then
        run backprop               mnist_backprop.py --epochs 2
        run eggroll                mnist_eggroll.py eggroll --population 256 256 32 --epochs 1
        run eggroll-dense          mnist_eggroll.py eggroll-dense --population 128 --epochs 1
        run node-perturbation      mnist_eggroll.py node-perturbation --population 32 32 16 --epochs 2
        run node-perturbation-int8 mnist_eggroll_int8.py --population 32 32 16 --epochs 2
        continue
    fi
    run backprop               mnist_backprop.py
    run eggroll                mnist_eggroll.py eggroll
    run eggroll-dense          mnist_eggroll.py eggroll-dense
    run node-perturbation      mnist_eggroll.py node-perturbation
    run node-perturbation-int8 mnist_eggroll_int8.py
    [ $all ] || continue
    for name in int8-round argmax-k step sign; do
        run backprop+$name          mnist_backprop.py --activation $name
        run node-perturbation+$name mnist_eggroll.py $name
    done
    whole="mnist_eggroll.py eggroll --fitness"
    run eggroll+accuracy                    $whole accuracy
    run eggroll+unsmoothed-accuracy         $whole accuracy --smoothing 0
    run eggroll+macro-F1                    $whole examples/macro_f1.py:macro_f1 --smoothing-samples 1024
    run eggroll+sum-of-a-row                $whole examples/sum_of_a_row.py:sum_is_right
    run eggroll+sign                        mnist_eggroll.py eggroll --activation sign --sigma 0.045
    run node-perturbation-int8+accuracy     mnist_eggroll_int8.py --fitness accuracy --lr 0.027
    node="mnist_eggroll.py node-perturbation --fitness"
    run node-perturbation+accuracy          $node accuracy
    run node-perturbation+even-digits       $node examples/even_digits.py:even_hits
    run node-perturbation+macro-F1          $node examples/macro_f1.py:macro_f1 --smoothing-samples 1024
    run node-perturbation+priced-confusions $node examples/costly_confusion.py:minus_cost
    run node-perturbation+external-program  $node examples/external_program.py:verdict --smoothing-samples 1024
    run node-perturbation+sum-of-a-row      $node examples/sum_of_a_row.py:sum_is_right
done
"$PYTHON" -m experiment.report "$out"
