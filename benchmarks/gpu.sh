#!/usr/bin/env bash
# Measure on a CUDA card: seconds of a step, whole runs, tests. About half an hour.
#
#   benchmarks/gpu.sh           write to results/gpu, or to $OUT
#   benchmarks/gpu.sh --tiny    do the same on the CPU with few members, in about two minutes
#
# Environment: PYTHON (default: python), MNIST_DIR (MNIST in torchvision's layout; default: data).
# Each stage has a time limit, and the others go on when one fails. The same command resumes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python="${PYTHON:-python}"
out="${OUT:-results/gpu}"
export MNIST_DIR="${MNIST_DIR:-data}"
device=cuda seeds="${SEEDS:-0 1 2}" epochs=3 large=39000
data=() rounds=() draws=() few=() some=()
fail() { echo "gpu.sh: error: $1" >&2; exit 2; }
if [[ "${1:-}" == --tiny ]]; then
  device=cpu seeds=0 epochs=1 large=128
  data=(--dataset mnist-sample) rounds=(--rounds 1) draws=(--quick)
  few=(--population 12) some=(--population 66)
else
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "$python sees no CUDA card (try --tiny)"
  for file in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
    [[ -f "$MNIST_DIR/MNIST/raw/$file-ubyte" ]] ||
      fail "no $MNIST_DIR/MNIST/raw/$file-ubyte: set MNIST_DIR to the folder that holds MNIST/raw"
  done
fi
mkdir -p "$out" || exit 1
failed=()

stage() { # name, seconds, command: its output goes to $out/name.log
  local name="$1" limit="$2" start=$SECONDS code=0
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  echo "$name: $((SECONDS - start)) s, exit code $code"
  ((code == 0)) || { failed+=("$name"); tail -n 3 "$out/$name.log"; }
}

speed() { # name, flags
  stage "$1" 300 "$python" benchmarks/speed.py --device "$device" "${rounds[@]}" "${@:2}" \
    --csv "$out/$1.csv" --json "$out/$1.json"
}

run() { # row, script, flags: a run for each seed
  for seed in $seeds; do
    stage "$1-seed$seed" 300 "$python" "${@:2}" --epochs "$epochs" --device "$device" \
      "${data[@]}" --seed "$seed" --out-dir "$out/runs/$1/seed$seed" --resume
  done
}

# What is wanted most comes first
speed "speed-$large" --population "$large"
run "eggroll+$large" mnist_eggroll.py eggroll --population "$large"
speed speed --memory "${some[@]}"
run backprop mnist_backprop.py
run node-perturbation mnist_eggroll.py node-perturbation "${few[@]}"
run node-perturbation-int8 mnist_eggroll_int8.py "${few[@]}"
run eggroll mnist_eggroll.py eggroll "${some[@]}"
run "eggroll-dense+$large+accuracy" mnist_eggroll.py eggroll-dense --population "$large" \
  --fitness accuracy --smoothing 0
[[ $device == cpu ]] || stage tests 300 "$python" -m pytest tests -k cuda -n 0
stage alignment 300 "$python" benchmarks/alignment.py --device "$device" "${data[@]}" \
  "${draws[@]}" --csv "$out/alignment.csv"
stage report 120 "$python" -m experiment.report "$out/runs"
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
