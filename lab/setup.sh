# Sourced by run_experiments.sh and run_tests.sh: sets PYTHON to one that has what is needed.
# The current python3 is taken where it has everything; otherwise .venv is built, once. Where python3
# has torch and torchvision (a notebook service, conda, a GPU container), .venv adds to them instead
# of installing them again.

# use_python REQUIREMENTS MODULE...
use_python() {
    local requirements=$1 stamp=.venv/installed-$1 python
    shift
    for python in .venv/bin/python python3; do
        if _has_modules "$python" "$@" && { [ "$python" = python3 ] || [ "$stamp" -nt "$requirements" ]; }; then
            PYTHON=$python
            return
        fi
    done
    _new_enough python3 || _fail "Python 3.11 or newer is needed (found: $(python3 --version 2>&1))"
    if [ -x .venv/bin/python ]; then
        echo "Bringing .venv up to date with $requirements"
    elif _has_modules python3 torch torchvision; then
        echo "Building .venv on top of the PyTorch that python3 has: about a minute"
        _make_venv --system-site-packages
        _share_packages_of_python3
    else
        echo "Building .venv from $requirements (PyTorch is large: some minutes, about 6 GB)"
        _make_venv
    fi
    # pip's warnings are about the machine's own settings
    .venv/bin/python -m pip install -qq --disable-pip-version-check -r "$requirements" ||
        _fail "pip could not install $requirements; run the same command again to go on"
    touch .venv/installed-requirements.txt "$stamp"  # the developers' list includes the users'
    PYTHON=.venv/bin/python
}

_make_venv() {
    python3 -m venv "$@" .venv || _fail "python3 -m venv failed; on Debian or Ubuntu: apt install python3-venv"
}

# Where python3 is itself of a virtual environment, --system-site-packages shows what lies below that
# one, and not its own packages.
_share_packages_of_python3() {
    local folder
    folder=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    python3 -c 'import site; print(*site.getsitepackages(), sep="\n")' >"$folder/python3.pth"
}

_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

_has_modules() {
    local python=$1
    shift
    _new_enough "$python" && "$python" - "$@" 2>/dev/null <<'END'
import importlib.util, sys
sys.exit(not all(importlib.util.find_spec(name) for name in sys.argv[1:]))
END
}

_fail() {
    echo "$0: error: $1" >&2
    exit 2
}
