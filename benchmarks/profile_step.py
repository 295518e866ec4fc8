"""Where a step's time goes: `python -m benchmarks.profile_step [case] [override ...]`.

For a case of benchmarks/work.py: seconds of the rollout, the learner and the adapter update beside the floor of each
(benchmarks/floor.py), and how busy the device is in both. Prints the kernels that take longest, the host's functions of the
rollout, and one JSON line.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from actors.types import Request, Sampling
from benchmarks.common import build_workers, report
from benchmarks.floor import learner_flop, matrix_rate, memory_rate, rollout_work, seconds
from benchmarks.work import CASES, PROMPT_TOKENS, prompts_of, random_rollouts, work_settings


def kernels(action: Callable[[], Any], title: str) -> tuple[float, float]:
    """Run `action` and print its longest kernels; (seconds taken, share of them in which the device works)."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as device:
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = time.perf_counter() - start
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(f"{title}: {took:.3f} s")
    print(device.key_averages().table(sort_by=key, row_limit=16, max_name_column_width=70), flush=True)
    spans = sorted(
        (e.time_range.start, e.time_range.end) for e in device.events() or [] if e.device_type == DeviceType.CUDA
    )
    busy, until = 0.0, 0.0
    for start_us, end_us in spans:
        busy += max(0.0, end_us - max(start_us, until))
        until = max(until, end_us)
    return took, busy / 1e6 / took


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", default="w", choices=list(CASES))
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        workers = build_workers(work_settings(arguments.case, Path(folder), *overrides))
    blueprint, engine, learner = workers.blueprint, workers.engine, workers.learner
    settings, shape = blueprint.settings, blueprint.shape
    lora = learner.policy.lora
    lora.flat.detach()[lora.layout.start_of_b :].normal_(0, 1e-4)
    adapter = learner.adapter()
    table = random_rollouts(settings, shape.vocabulary)
    prompts = prompts_of(table)
    rounds = iter(range(1000))

    def sample(tokens: int = settings.sampling.max_tokens) -> None:
        name = next(rounds)
        engine.submit([Request(f"{name}/{i}", p, Sampling(1.0, tokens)) for i, p in enumerate(prompts)])
        while engine.unfinished:
            engine.step()

    rollout = seconds(sample, repeats=4)
    stats = learner.step(table)
    learning = seconds(lambda: learner.step(table))
    update = seconds(lambda: engine.load_adapter(adapter), repeats=20)

    host = cProfile.Profile()
    host.enable()
    sample()
    host.disable()
    pstats.Stats(host).sort_stats("tottime").print_stats(20)
    decode = 64
    decode_seconds, decode_busy = kernels(lambda: sample(decode), f"{len(prompts)} sequences of {decode} tokens")
    learn_seconds, learn_busy = kernels(lambda: learner.step(table), "a learner step")

    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)  # the run's limit is not the card's
    matrix, memory = matrix_rate(learner.policy.dtype), memory_rate()
    moved, flop = rollout_work(settings, shape, PROMPT_TOKENS)
    learned = learner_flop(settings, shape, stats)
    report(
        benchmark="profile_step", case=arguments.case, overrides=overrides, sequences=len(prompts),
        matrix_tflop_per_second=matrix / 1e12, memory_tb_per_second=memory / 1e12,
        rollout={"seconds": rollout, "gb": moved / 1e9, "tflop": flop / 1e12, "floor_of_bytes": moved / memory,
                 "floor_of_flop": flop / matrix, "device_busy": decode_busy,
                 "seconds_per_token": rollout / settings.sampling.max_tokens, "under_the_profiler": decode_seconds},
        learner={"seconds": learning, "tflop": learned / 1e12, "floor_of_flop": learned / matrix,
                 "device_busy": learn_busy, "under_the_profiler": learn_seconds, "stream_tokens": stats.stream_tokens},
        update={"seconds": update, "floor_of_bytes": 2 * 2 * lora.layout.size / memory},
    )  # fmt: skip


if __name__ == "__main__":
    main()
