"""What one copy of the weights saves: `python -m benchmarks.sharing [--shapes ...]`.

One JSON line a shape and quantization. Each way is a process of its own, with the same cache and batch, and what the
driver counts once engine and learner stand.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import build_workers, report
from benchmarks.gpu_memory import gib_in_use_by_others
from benchmarks.shapes import SHAPES, random_model
from benchmarks.work import work_settings

SAME = [
    "engine.max_num_seqs=8",
    "engine.kv_cache_gib=1",
    "engine.enforce_eager=true",
    "learner.micro_batch_tokens=2048",
    "learner.gradient_checkpointing=true",
    "learner.logit_chunk_tokens=512",
]


def measure(shape: str, quantization: str, share: str) -> None:
    """Build both, and print the GiB that this process takes."""
    before = gib_in_use_by_others()
    more = [
        f"model.path={random_model(shape)}",
        f"model.quantization={quantization}",
        f"engine.share_weights={share}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        workers = build_workers(work_settings("w", Path(folder), *SAME, *more))
    gib = gib_in_use_by_others() - before
    print(json.dumps({"gib": gib, "parameters": workers.learner.adapter().layout.size}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    default = ["qwen2.5-1.5b", "qwen2.5-3b", "llama-3.1-8b"]
    parser.add_argument("--shapes", nargs="+", default=default, choices=list(SHAPES))
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"])
    parser.add_argument("--measure", nargs=3, help="used by itself: shape, quantization, share_weights")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    for shape in arguments.shapes:
        for quantization in arguments.quantization:
            gib = {}
            for share in ("always", "never"):
                command = [sys.executable, "-m", "benchmarks.sharing", "--measure", shape, quantization, share]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                gib[share] = json.loads(done.stdout.splitlines()[-1])["gib"]
            report(
                benchmark="sharing",
                shape=shape,
                quantization=quantization,
                shared_gib=gib["always"],
                two_copies_gib=gib["never"],
                saved_gib=gib["never"] - gib["always"],
            )


if __name__ == "__main__":
    main()
