#!/usr/bin/env bash
# Run the tests; arguments go to pytest. --setup-only builds the environment and stops.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup.sh
use_python requirements-dev.txt
[ "$1" = --setup-only ] || exec "$PYTHON" -m pytest "$@"
