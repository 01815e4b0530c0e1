#!/usr/bin/env bash
# Everything that wants a CUDA card, in at most nine minutes: tests, steps, whole runs.
#
#   benchmarks/gpu.sh           results in results/gpu, or in $OUT
#   benchmarks/gpu.sh --tiny    the same on the CPU with a few members, to see that it works
#
# MNIST is read from MNIST_DIR. Finished runs are skipped: the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python}"
out="${OUT:-results/gpu}"
device=cuda
seeds="0 1 2 3 4"
lengths=(--device cuda)
populations=(4000 39000)
speed=(--backend fused)
if [[ "${1:-}" == --tiny ]]; then
  device=cpu
  seeds="0"
  lengths=(--device cpu --dataset mnist-sample --epochs 1)
  populations=(32)
  speed=(--example-population 4 4 4 --batch-population 32 --rounds 2)
fi

runs() { # folder, methods, flags
  local folder="$1" methods="$2"
  shift 2
  RESULTS_DIR="$out/$folder" METHODS="$methods" SEEDS="$seeds" \
    "$python" -m lab.experiments "${lengths[@]}" "$@"
}

mkdir -p "$out"
"$python" benchmarks/speed.py --device "$device" --csv "$out/speed.csv" --json "$out/speed.json" \
  "${speed[@]}"
if [[ $device == cuda ]]; then
  "$python" -m pytest tests/test_fused.py  # the kernel, on the card itself
  runs main "backprop eggroll eggroll-int8"
  runs eager "backprop" --backend eager
else
  runs main "eggroll" --population 12
fi
for population in "${populations[@]}"; do
  runs "population-$population" "eggroll-batch eggroll-batch+accuracy" \
    --population "$population" --smoothing 0  # raw hits, as in the experiment that is reproduced
done
