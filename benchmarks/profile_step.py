"""Where a step's time goes: `python -m benchmarks.profile_step [case] [override ...]`.

For a case of benchmarks/work.py: seconds of the rollout, the learner and the adapter update beside the floor of each
(benchmarks/floor.py), and how busy the device is in both. Prints the kernels that take longest, the host's functions of
the rollout, and one JSON line.
"""

import argparse
import cProfile
import pstats
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from actors.types import Sampling
from benchmarks.common import ON_GPU, build_workers, randomize_adapter, report, sample_all, seconds
from benchmarks.floor import learner_flop, matrix_rate, memory_rate, rollout_work
from benchmarks.trace import Trace, trace
from benchmarks.work import CASES, PROMPT_TOKENS, prompts_of, random_rollouts, work_settings

TRACED_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", default="w", choices=list(CASES))
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = work_settings(arguments.case, Path(folder), *overrides)
        workers = build_workers(settings)
    plan, engine, learner = workers.plan, workers.engine, workers.learner
    randomize_adapter(learner)
    adapter, table = learner.adapter(), random_rollouts(settings, plan.shape.vocabulary)
    prompts, max_tokens = prompts_of(table), settings.sampling.max_tokens

    def sample(tokens: int = max_tokens) -> None:
        sample_all(engine, prompts, Sampling(1.0, tokens))

    rollout_seconds = seconds(sample, repeats=4)
    stats = learner.step(table)
    learner_seconds = seconds(lambda: learner.step(table))
    update_seconds = seconds(lambda: engine.load_adapter(adapter), repeats=20)

    host = cProfile.Profile()
    host.runcall(sample)
    pstats.Stats(host).sort_stats("tottime").print_stats(20)
    decoding = shown_trace(f"{len(prompts)} sequences of {TRACED_TOKENS} tokens", lambda: sample(TRACED_TOKENS))
    learning = shown_trace("a learner step", lambda: learner.step(table))

    if ON_GPU:
        torch.cuda.set_per_process_memory_fraction(1.0)  # the run's limit is not the card's
    matrix, memory = matrix_rate(learner.policy.dtype), memory_rate()
    rollout_bytes, rollout_flop = rollout_work(settings, plan, prompt_tokens=PROMPT_TOKENS)
    step_flop = learner_flop(plan, stats, settings, prompt_tokens=PROMPT_TOKENS)
    report(
        benchmark="profile_step",
        case=arguments.case,
        overrides=overrides,
        sequences=len(prompts),
        matrix_tflop_per_second=matrix / 1e12,
        memory_tb_per_second=memory / 1e12,
        rollout={
            "seconds": rollout_seconds,
            "gb": rollout_bytes / 1e9,
            "tflop": rollout_flop / 1e12,
            "floor_of_bytes": rollout_bytes / memory,
            "floor_of_flop": rollout_flop / matrix,
            "device_busy": decoding.busy_share,
            "seconds_per_token": rollout_seconds / max_tokens,
            "under_the_profiler": decoding.seconds,
        },
        learner={
            "seconds": learner_seconds,
            "tflop": step_flop / 1e12,
            "floor_of_flop": step_flop / matrix,
            "device_busy": learning.busy_share,
            "under_the_profiler": learning.seconds,
            "stream_tokens": stats.stream_tokens,
        },
        update={"seconds": update_seconds, "floor_of_bytes": 2 * 2 * adapter.layout.size / memory},
    )


def shown_trace(title: str, action: Callable[[], object]) -> Trace:
    """The trace of `action`, whose longest kernels are printed."""
    traced = trace(action, with_host=True)
    print(f"{title}: {traced.seconds:.3f} s\n{traced.table()}", flush=True)
    return traced


if __name__ == "__main__":
    main()
