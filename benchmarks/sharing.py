"""What one copy of the weights saves: `python -m benchmarks.sharing [--shapes ...]`, one JSON line a shape and quantisation.

Each way is a process of its own, with the same cache and batch, and what the driver counts once engine and learner stand.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import build_workers, report
from benchmarks.shapes import SHAPES, random_model
from benchmarks.step import used_before
from benchmarks.work import work_settings

SAME = ["engine.max_num_seqs=8", "engine.kv_cache_gib=1", "engine.enforce_eager=true", "learner.micro_batch_tokens=2048",
        "learner.gradient_checkpointing=true", "learner.logit_chunk_tokens=512"]  # fmt: skip


def hold(shape: str, quantization: str, share: str) -> None:
    """Build both, and print the GiB that this process holds."""
    before = used_before()
    with tempfile.TemporaryDirectory() as folder:
        more = [
            f"model.path={random_model(shape)}",
            f"model.quantization={quantization}",
            f"engine.share_weights={share}",
        ]
        workers = build_workers(work_settings("w", Path(folder), *SAME, *more))
    assert workers.learner
    print(json.dumps({"gib": used_before() - before}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--shapes", nargs="+", default=["qwen2.5-1.5b", "qwen2.5-3b", "llama-3.1-8b"], choices=list(SHAPES)
    )
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"])
    parser.add_argument("--hold", nargs=3, help="used by itself: shape, quantization, share_weights")
    arguments = parser.parse_args()
    if arguments.hold:
        hold(*arguments.hold)
        return
    for shape in arguments.shapes:
        for quantization in arguments.quantization:
            held = {}
            for share in ("always", "never"):
                command = [sys.executable, "-m", "benchmarks.sharing", "--hold", shape, quantization, share]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                held[share] = json.loads(done.stdout.splitlines()[-1])["gib"]
            report(
                benchmark="sharing", shape=shape, quantization=quantization, shared_gib=held["always"],
                two_copies_gib=held["never"], saved_gib=held["never"] - held["always"],
            )  # fmt: skip


if __name__ == "__main__":
    main()
