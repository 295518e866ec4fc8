"""Rewards that misbehave on the completion "bad" and give 1 otherwise."""

import asyncio
import os
import sys
import time

from rewards.sample import Sample


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

        subprocess.run(["sleep", "4242"], check=False)
    return 1.0


async def awaited(sample: Sample) -> float:
    await asyncio.sleep(0.01)
    return 1.0
