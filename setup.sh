# Sourced by run_experiments.sh and run_tests.sh. use_python REQUIREMENTS sets PYTHON to a Python that
# has them: the one in .venv, which is built first, on top of python3's PyTorch where it has one.
# Not for set -u: in macOS's bash 3.2 an empty array is an unset variable.

use_python() {
    local requirements=$1 stamp=.venv/installed-$1 constraints=(-c requirements.lock)
    PYTHON=.venv/bin/python
    if [ "$stamp" -nt requirements.txt ] && [ "$stamp" -nt "$requirements" ]; then return; fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "expected Python 3.11 or newer, got $(python3 --version 2>&1)"
    if $PYTHON -c 'import torch, torchvision' 2>/dev/null; then
        constraints=()  # they would install another PyTorch
    elif python3 -c 'import torch, torchvision' 2>/dev/null; then
        constraints=()  # they would install another PyTorch
        [ -x $PYTHON ] || echo "Building .venv on top of python3's PyTorch (about a minute)"
        make_venv --system-site-packages
        # --system-site-packages misses the packages of a python3 that is in an environment itself
        python3 -c 'import site; print(*site.getsitepackages(), sep="\n")' \
            >"$($PYTHON -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/python3.pth"
    else
        [ -x $PYTHON ] || echo "Building .venv (PyTorch is large: some minutes, about 6 GB)"
        make_venv
    fi
    install "${constraints[@]}" -r "$requirements" || {
        [ ${#constraints[@]} -gt 0 ] &&
            echo "The tested versions in requirements.lock cannot be installed: trying others" >&2 &&
            install -r "$requirements"
    } || fail "pip could not install $requirements; type the same command again to go on"
    touch .venv/installed-requirements.txt "$stamp"  # requirements-dev.txt includes the other
}

make_venv() {
    [ -x $PYTHON ] || python3 -m venv "$@" .venv ||
        fail "python3 -m venv failed; on Debian or Ubuntu: apt install python3-venv"
}

install() {
    $PYTHON -m pip install -qq --disable-pip-version-check "$@"
}

fail() {
    echo "$0: error: $1" >&2
    exit 2
}
