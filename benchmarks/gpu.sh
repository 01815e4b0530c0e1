#!/usr/bin/env bash
# Measure on a CUDA card, in at most 560 seconds: ceilings, tests, steps, profiles, whole runs, memory.
#
#   benchmarks/gpu.sh           write to results/gpu, or to $OUT
#   benchmarks/gpu.sh --tiny    do the same on the CPU with few members, in about two minutes
#
# Environment: PYTHON (default: python), MNIST_DIR (MNIST in torchvision's layout; default: data), and SEEDS,
# which run side by side after seed 0 has run alone (default: "1 2 3 4"; with --tiny 1).
# What is wanted most comes first. Each stage has a time limit and writes its files at once; the others go on
# when one fails. $OUT/results.tar.gz holds what is there after each stage. The same command resumes: what has been
# measured, and runs that are finished, are not made again.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python="${PYTHON:-python}" out="${OUT:-results/gpu}" end=560
export MNIST_DIR="${MNIST_DIR:-data}"
device=cuda seeds="${SEEDS-1 2 3 4}" rounds=10 few=99
steps=(backprop node-perturbation:528 eggroll eggroll:6272 eggroll:39000)
others_steps=(backprop eggroll-dense:4000 eggroll-dense:39000 node-perturbation-int8)
node=() eggroll=() integers=() dense=(--population 39000) every=(--epochs 10)
fail() { echo "gpu.sh: error: $1" >&2; exit 2; }
if [[ "${1:-}" == --tiny ]]; then
  device=cpu seeds="${SEEDS-1}" rounds=1 few=2
  steps=(backprop node-perturbation:33 eggroll:66)
  others_steps=(backprop eggroll-dense:32 node-perturbation-int8:33)
  node=(--population 33) integers=(--population 33) eggroll=(--population 66) dense=(--population 32)
  every=(--epochs 1 --dataset mnist-sample)
else
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "$python sees no CUDA card (try --tiny)"
  for file in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
    [[ -f "$MNIST_DIR/MNIST/raw/$file-ubyte" ]] ||
      fail "no $MNIST_DIR/MNIST/raw/$file-ubyte: set MNIST_DIR to the folder that holds MNIST/raw"
  done
fi
mkdir -p "$out" || exit 1
rm -f "$out/failed"

stage() { # name, seconds, command: its output goes to $out/name.log
  local name="$1" limit="$2" start=$SECONDS code=0
  shift 2
  ((limit < end - SECONDS)) || limit=$((end - SECONDS))
  ((limit > 3)) || { echo "$name: no time left" | tee -a "$out/failed"; return; }
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  echo "$name: $((SECONDS - start)) s, exit code $code"
  ((code == 0)) || { echo "$name" >>"$out/failed"; tail -n 3 "$out/$name.log"; }
  tar --exclude='*.tar.gz*' --exclude=checkpoint.pt -czf "$out/results.tar.gz.$BASHPID" -C "$out" . 2>/dev/null
  mv "$out/results.tar.gz.$BASHPID" "$out/results.tar.gz"
}

measure() { # name, seconds, benchmark, flags
  [[ ! -s "$out/$1.json" ]] || return 0
  stage "$1" "$2" "$python" "benchmarks/$3" --device "$device" "${@:4}" --csv "$out/$1.csv" --json "$out/$1.json"
}

run() { # seed, row, script, flags
  stage "$2-seed$1" 120 "$python" "${@:3}" "${every[@]}" --device "$device" --train-on-all --seed "$1" \
    --out-dir "$out/runs/$2/seed$1" --resume
}

runs() { # seeds, row, script, flags: all seeds at once
  local seed
  for seed in $1; do run "$seed" "${@:2}" & done
  wait
}

methods() { # seeds: alone on the card, one seed has honest seconds; several are for their accuracies
  runs "$1" backprop mnist_backprop.py
  runs "$1" node-perturbation mnist_eggroll.py node-perturbation-gpu "${node[@]}"
  runs "$1" eggroll+accuracy mnist_eggroll.py eggroll-gpu --fitness accuracy "${eggroll[@]}"
  runs "$1" eggroll mnist_eggroll.py eggroll-gpu "${eggroll[@]}"
  runs "$1" node-perturbation-int8 mnist_eggroll_int8.py "${integers[@]}"
}

stage versions 30 "$python" -m torch.utils.collect_env
measure ceilings 40 ceilings.py
stage tests 120 "$python" -m pytest tests/test_cuda.py -n 0
measure steps 60 speed.py --methods "${steps[@]}" --rounds "$rounds"
measure more-steps 60 speed.py --methods "${others_steps[@]}" --rounds "$rounds"
stage profiles 60 "$python" benchmarks/profiles.py --device "$device" \
  --methods "${steps[@]::few}" "${others_steps[@]:1:few}" --file "$out/profiles.txt"
methods 0
raw=(--fitness accuracy --smoothing 0) # as in the original experiment
runs 0 eggroll+unsmoothed-accuracy mnist_eggroll.py eggroll-gpu "${eggroll[@]}" "${raw[@]}"
runs 0 eggroll-dense+unsmoothed-accuracy mnist_eggroll.py eggroll-dense "${dense[@]}" "${raw[@]}"
stage report 30 "$python" -m experiment.report "$out/runs"
measure memory 100 speed.py --methods "${steps[@]::few}" --rounds 1 --memory
measure more-memory 100 speed.py --methods "${others_steps[@]::few}" --rounds 1 --memory
methods "$seeds"
runs 0 eggroll-dense mnist_eggroll.py eggroll-dense "${dense[@]}"
stage report 30 "$python" -m experiment.report "$out/runs"
[[ ! -f "$out/failed" ]] || { echo "failed: $(paste -sd ' ' "$out/failed")"; exit 1; }
