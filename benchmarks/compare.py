"""Epiphany beside its peers, one after the other on one card: `python -m benchmarks.compare w|qlora [override ...]`.

Prints what benchmarks.step and benchmarks.peer_step print, each from a process of its own, and one JSON line a peer:
how many times our seconds a step it needs, with the whole card and within the peer's memory with the peer's cache (null
where the memory plan refuses that). Peers that are not installed are left out.
"""

import argparse
import importlib.util
import json
import subprocess
import sys

from benchmarks.common import report

PEERS = {"w": ("trl", "unsloth"), "qlora": ("unsloth",)}


def result(module: str, *arguments: str) -> dict[str, float] | None:
    """The JSON line of `python -m benchmarks.<module>`, which is printed too; None if it fails."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"benchmark"')]
    if not lines:
        print(
            f"{' '.join(command)} gave no result (exit code {done.returncode}):\n{done.stdout[-2000:]}", file=sys.stderr
        )
        return None
    print(lines[-1], flush=True)
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=list(PEERS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--utilization", default="0.12", help="the share of the card that a peer's engine is given")
    parser.add_argument("--peers", nargs="+", choices=["trl", "unsloth"], help="only these")
    arguments, overrides = parser.parse_known_args()
    steps = ("--steps", str(arguments.steps), *overrides)
    ours = result("step", arguments.case, *steps)
    assert ours is not None
    for peer in arguments.peers or PEERS[arguments.case]:
        if importlib.util.find_spec(peer) is None:
            continue
        theirs = result("peer_step", peer, arguments.case, *steps, "--utilization", arguments.utilization)
        if theirs is None:
            continue
        memory, cache = theirs["process_gib_highest"], theirs["kv_cache_gib"]
        within = result(
            "step", arguments.case, *steps, f"hardware.vram_gib={memory:.2f}", f"engine.kv_cache_gib={cache:.2f}"
        )
        report(
            benchmark="compare",
            case=arguments.case,
            peer=peer,
            peer_seconds=theirs["seconds_median"],
            peer_gib=memory,
            kv_cache_gib=cache,
            seconds=ours["seconds_median"],
            gib=ours["process_gib_highest"],
            ratio=theirs["seconds_median"] / ours["seconds_median"],
            seconds_in_peers_memory=within and within["seconds_median"],
            gib_in_peers_memory=within and within["process_gib_highest"],
            ratio_in_peers_memory=within and theirs["seconds_median"] / within["seconds_median"],
            first_step_ratio=theirs["first_step_s"] / ours["first_step_s"],
        )


if __name__ == "__main__":
    main()
