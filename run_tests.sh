#!/usr/bin/env bash
# Build the environment if need be, then run the tests; further arguments go to pytest.
#   ./run_tests.sh --setup-only    builds the environment and stops
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source lab/setup.sh
use_python requirements-dev.txt torch torchvision numpy tyro tqdm matplotlib safetensors mlxtend \
    pytest xdist hypothesis ruff
if [ "${1:-}" = --setup-only ]; then
    exit
fi
exec "$PYTHON" -m pytest "$@"
