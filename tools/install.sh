#!/usr/bin/env bash
# Makes .venv with what this machine can use, from the lock for its Python and its processor. Run by `make`.
# With the argument `dev` it installs what tests and checks need, too.
set -euo pipefail
cd "$(dirname "$0")/.."

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
for candidate in ${PYTHON:-} python3.12 python3.11 python3; do
    if "$candidate" -c "$supported" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "${python:-}" ]; then
    echo "Epiphany needs Python 3.11 or 3.12; name one with: make PYTHON=/path/to/python3.12" >&2
    exit 1
fi

kind=cpu
if nvidia-smi -L 2>/dev/null | grep -q GPU; then kind=gpu; fi
kind=${EPIPHANY_KIND:-$kind}
base=locks/$kind-py$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
stamp_of() { echo ".venv/installed-$(sha256sum "$1" tools/install.sh | sha256sum | cut -c 1-16)"; }
has_base=$(stamp_of "$base.txt")
has_dev=$(stamp_of "$base-dev.txt")
if [ -e "$has_dev" ] || { [ "${1:-}" != dev ] && [ -e "$has_base" ]; }; then exit 0; fi

uv() { VIRTUAL_ENV=.venv .venv/bin/uv "$@"; }
quiet_pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@" 2> >(grep -v '^WARNING: Location' >&2); }

if [ ! -e "$has_base" ]; then
    echo "installing $base.txt into .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
    quiet_pip install uv==0.13.9
    if [ "$kind" = cpu ]; then
        # The CPU build of torch: from where pip is set up to look first, else from PyTorch's own index, else the
        # general build, which runs on a CPU too but brings gigabytes of CUDA with it.
        torch=$(grep '^torch==' "$base.txt")
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-index "$torch" 2>/dev/null \
            || uv pip install --quiet --no-deps --torch-backend=cpu "$torch" \
            || uv pip install --quiet "$torch"
    fi
    uv pip install --quiet --no-deps -r "$base.txt"
    uv pip install --quiet --no-deps --no-build-isolation --editable .
    touch "$has_base"
fi
if [ "${1:-}" = dev ]; then
    echo "installing $base-dev.txt into .venv"
    uv pip install --quiet --no-deps -r "$base-dev.txt"
    touch "$has_dev"
fi
