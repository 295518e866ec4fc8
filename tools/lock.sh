#!/usr/bin/env bash
# Makes the locks anew from pyproject.toml: exact pins for each Python, for the CPU and for a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
for python in 3.11 3.12; do
    for kind in cpu gpu; do
        if [ "$kind" = cpu ]; then
            more=(--excludes locks/cpu-excludes.txt --overrides locks/cpu-overrides.txt)
        else
            more=(--excludes locks/gpu-excludes.txt --constraints locks/gpu-constraints.txt)
        fi
        .venv/bin/uv pip compile --quiet pyproject.toml --extra "$kind" --extra dev --python-version "$python" \
            --python-platform x86_64-manylinux_2_28 "${more[@]}" --no-header --no-annotate \
            --output-file "locks/$kind-py${python/./}.txt" >/dev/null
    done
done
