#!/usr/bin/env bash
# Train by backprop and by EGGROLL, then write the table and the plots: see --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source lab/setup.sh
use_python requirements.txt torch torchvision numpy tyro tqdm matplotlib safetensors mlxtend
exec "$PYTHON" -m lab.experiments "$@"
