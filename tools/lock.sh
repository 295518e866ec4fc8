#!/usr/bin/env bash
# Regenerates the lock files from pyproject.toml: exact pins for each Python, for a CPU and for a GPU, each without and
# with what developers need (-dev).
set -euo pipefail
cd "$(dirname "$0")/.."
for python in 3.11 3.12; do
    for kind in cpu gpu; do
        if [ "$kind" = cpu ]; then
            more=(--excludes locks/cpu-excludes.txt --overrides locks/cpu-overrides.txt)
        else
            more=(--excludes locks/gpu-excludes.txt --constraints locks/gpu-constraints.txt)
        fi
        lock=locks/$kind-py${python/./}
        compile() {
            .venv/bin/uv pip compile --quiet pyproject.toml --python-version "$python" \
                --python-platform x86_64-manylinux_2_28 "${more[@]}" --no-header --no-annotate "$@" >/dev/null
        }
        compile --extra "$kind" --extra gguf --extra dev --output-file "$lock-dev.txt"
        # The same versions, less what only developers need.
        compile --extra "$kind" --extra gguf --constraints "$lock-dev.txt" --output-file "$lock.txt"
    done
done
