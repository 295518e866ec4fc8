"""Rewards that misbehave on the completion "bad", and otherwise give 1."""

import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path

from rewards.sample import Sample

print("imported")


def _bad(sample: Sample) -> bool:
    return sample.completion == "bad"


def hang(sample: Sample) -> float:
    while _bad(sample):
        time.sleep(1)
    return 1.0


def exit_process(sample: Sample) -> float:
    if _bad(sample):
        os._exit(3)
    return 1.0


def segfault(sample: Sample) -> float:
    if _bad(sample):
        import ctypes

        ctypes.string_at(0)
    return 1.0


def eat_memory(sample: Sample) -> float:
    if _bad(sample):
        blocks = []
        while True:
            blocks.append(bytearray(64 << 20))
    return 1.0


def prints(sample: Sample) -> float:
    print("scoring", sample.completion)
    print("warned of", sample.completion, file=sys.stderr)
    return 1.0


def print_a_gigabyte(sample: Sample) -> float:
    if _bad(sample):
        for _ in range(1024):
            sys.stdout.write("x" * (1 << 20))
            os.write(1, b"x" * 1024)
    return 1.0


def nan(sample: Sample) -> float:
    return float("nan") if _bad(sample) else 1.0


def raises(sample: Sample) -> float:
    return 1 / 0 if _bad(sample) else 1.0


def spawn_and_hang(sample: Sample) -> float:
    if _bad(sample):
        import subprocess

        with subprocess.Popen(["sleep", "4242"]) as process:
            Path(os.environ["PID_FILE"]).write_text(str(process.pid))
    return 1.0


def forks(sample: Sample) -> float:
    """A copy of the child returns, too."""
    os.fork()
    return float(sample.completion)


def forks_late(sample: Sample) -> float:
    """The copy writes to the parent by itself, and later."""
    if os.fork() == 0:
        time.sleep(0.02)
        _say({"id": 0, "reward": 99.0, "terms": {}, "error": None, "strict": None, "lenient": None})
        os._exit(0)
    return float(sample.completion)


def answers_twice(sample: Sample) -> float:
    if _bad(sample):
        _say({"id": 0, "reward": 5.0, "terms": {}, "error": None, "strict": None, "lenient": None})
    return 1.0


def answers_for_another(sample: Sample) -> float:
    if _bad(sample):
        _say({"id": 7, "reward": 5.0, "terms": {}, "error": None, "strict": None, "lenient": None})
        time.sleep(0.2)
    return 1.0


def answers_nonsense(sample: Sample) -> float:
    if _bad(sample):
        _say({"id": 0, "reward": "high"})
        time.sleep(0.2)
    return 1.0


def answers_infinity(sample: Sample) -> float:
    if _bad(sample):
        _say({"id": 0, "reward": 1e999, "terms": {}, "error": None, "strict": None, "lenient": None})
        time.sleep(0.2)
    return 1.0


def _say(message: object) -> None:
    """Write a line to every pipe that this process holds."""
    line = json.dumps(message).encode() + b"\n"
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(descriptor, line)


async def awaited(sample: Sample) -> float:
    await asyncio.sleep(0.01)
    return 1.0
