#!/usr/bin/env bash
# Makes .venv with what this machine can use, from the lock for its Python and its processor. Run by `make`.
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
lock=locks/$kind-py$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])').txt
stamp=.venv/installed-$(sha256sum "$lock" tools/install.sh | sha256sum | cut -c 1-16)
if [ -e "$stamp" ]; then exit 0; fi

echo "installing $lock into .venv with $("$python" --version)"
"$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
uv() { VIRTUAL_ENV=.venv .venv/bin/uv "$@"; }

if [ "$kind" = cpu ]; then
    # The CPU build of torch: from where pip is set up to look first, else from PyTorch's own index, else the
    # general build, which runs on a CPU too but brings gigabytes of CUDA with it.
    torch=$(grep '^torch==' "$lock")
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-index "$torch" 2>/dev/null \
        || uv pip install --quiet --no-deps --torch-backend=cpu "$torch" \
        || uv pip install --quiet "$torch"
fi
uv pip install --quiet --no-deps -r "$lock"
uv pip install --quiet --no-deps --no-build-isolation --editable .
touch "$stamp"
