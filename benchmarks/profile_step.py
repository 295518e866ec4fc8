"""Where a step's time goes: host functions of the rollout, device and host time of the learner.

python -m benchmarks.profile_step [override ...] prints two profiles and one JSON line of times.
"""

import cProfile
import dataclasses
import json
import pstats
import sys
import time

import pyarrow as pa
import torch
from torch.profiler import ProfilerActivity, profile

from actors.build import (
    build_prompts,
    build_rows,
)
from actors.rollout import RolloutWorker
from actors.schema import to_batch
from actors.types import Group, Sampling, Score
from benchmarks.common import build_workers, sample_groups, settings_from


def scored(group: Group) -> Group:
    """A reward that gives every group a signal, so that the learner has all rows to do."""
    return dataclasses.replace(group, scores=tuple(Score(float(i % 2)) for i in range(len(group.completions))))


def main() -> None:
    settings = settings_from("experiment=sums", *sys.argv[1:])
    started = time.monotonic()
    workers = build_workers(settings)
    start_seconds = time.monotonic() - started
    settings, machine, engine, learner = workers.settings, workers.machine, workers.engine, workers.learner
    prompts = build_prompts(settings, *build_rows(settings), workers.tokenizer)
    learner.policy.lora.flat.detach()[learner.policy.lora.layout.start_of_b :].normal_(0, 1e-4)
    engine.load_adapter(learner.adapter())
    sampling = Sampling(settings.sampling.temperature, settings.sampling.max_tokens)
    worker = RolloutWorker(engine, seed=0)
    count = settings.algorithm.prompts_per_step
    times: dict[str, list[float]] = {"rollout": [], "learner": [], "update": []}
    table, tokens = None, 0
    cpu = cProfile.Profile()
    for step in range(8):
        batch = [prompts.at(step * count + i) for i in range(count)]
        start = time.monotonic()
        if step >= 5:
            cpu.enable()
        groups = sample_groups(worker, batch, sampling, settings.algorithm.group_size)
        cpu.disable()
        times["rollout"].append(time.monotonic() - start)
        table = pa.Table.from_batches([to_batch(scored(g)) for g in groups])
        start = time.monotonic()
        stats = learner.step(table)
        times["learner"].append(time.monotonic() - start)
        tokens = stats.stream_tokens
        adapter = learner.adapter()
        if machine.device == "cuda":
            torch.cuda.synchronize()
        start = time.monotonic()
        engine.load_adapter(adapter)
        if machine.device == "cuda":
            torch.cuda.synchronize()
        times["update"].append(time.monotonic() - start)
    pstats.Stats(cpu).sort_stats("tottime").print_stats(25)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if machine.device == "cuda" else [])
    assert table is not None
    with profile(activities=activities) as device:
        learner.step(table)
    key = "self_cuda_time_total" if machine.device == "cuda" else "self_cpu_time_total"
    print(device.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60))
    print(device.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=60))
    median = {name: sorted(values[1:5])[2] for name, values in times.items()}
    print(json.dumps({"engine_start_s": start_seconds, "stream_tokens": tokens, **median, "all": times}))


if __name__ == "__main__":
    main()
