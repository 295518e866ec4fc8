"""What the benchmarks share: the parts of a run in one process, the time of an action, and the line that each prints.

Knows how a run is assembled; knows no benchmark.
"""

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

import torch
from transformers import PreTrainedTokenizerBase

from actors.engines.base import Engine
from actors.rollout import RolloutWorker
from actors.types import Adapter, Completion, Group, Prompt, Request, Sampling
from conf.schema import Settings
from epiphany.learner_factory import make_learner_of_plan
from epiphany.run_data import load_model_source
from epiphany.run_plan import RunPlan, apply_limits, plan_run
from epiphany.sampling_workers import make_engine
from learner.learner import Learner

ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Workers:
    """The engine and the learner of a run in one process, with its plan."""

    plan: RunPlan
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    learner: Learner


def build_workers(settings: Settings) -> Workers:
    """An engine and a learner as a run would build them, the engine with the learner's first adapter."""
    source, tokenizer = load_model_source(settings)
    plan = plan_run(settings, source)
    apply_limits(plan)
    engine = make_engine(plan, source, tokenizer)
    learner, _ = make_learner_of_plan(settings, plan, engine=engine)
    engine.load_adapter(learner.adapter())
    gc.freeze()  # as a run does
    return Workers(plan, tokenizer, engine, learner)


def build_learner(settings: Settings) -> tuple[RunPlan, Learner]:
    """A learner without an engine, with its own base weights, in the plan of a process that has both.

    Its adapter is random: with B at zero, half of the gradient would be zero.
    """
    plan = plan_run(settings, load_model_source(settings)[0])
    apply_limits(plan)
    learner, _ = make_learner_of_plan(settings, plan)
    randomize_adapter(learner)
    return plan, learner


def plan_engine(settings: Settings) -> RunPlan:
    """The plan of a process that only samples, whose limits apply from now on."""
    plan = plan_run(settings, load_model_source(settings)[0], roles=frozenset({"rollout"}))
    apply_limits(plan)
    return plan


def build_engine(settings: Settings) -> tuple[RunPlan, Engine]:
    """An engine without a learner, and its plan."""
    plan, (source, tokenizer) = plan_engine(settings), load_model_source(settings)
    return plan, make_engine(plan, source, tokenizer)


def randomize_adapter(learner: Learner) -> None:
    """Fill B of the learner's adapter with small random numbers."""
    lora = learner.policy.lora
    lora.flat.detach()[lora.layout.start_of_b :].normal_(0, 1e-4)


def random_adapter(plan: RunPlan, *, b_std: float) -> Adapter:
    """An adapter of version 1 as the plan describes it; with a `b_std` (standard deviation) of 0, the identity."""
    layout = plan.layout
    flat = torch.randn(layout.size, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    flat[layout.start_of_b :].mul_(b_std / 0.02)
    return Adapter(1, layout, flat.to(plan.device.kind))


def sample_groups(worker: RolloutWorker, prompts: Sequence[Prompt], sampling: Sampling, samples: int) -> list[Group]:
    """A group of each prompt, in the order in which they finish."""
    worker.dispatch(prompts, sampling, samples)
    groups = []
    while worker.unfinished:
        groups += [worker.pop_group(key) for key in worker.run_engine().finished]
    return groups


def new_requests(prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> list[Request]:
    """A request for each prompt (token ids), under names that no other request has."""
    started = time.monotonic_ns()
    return [Request(f"{started}/{i}", prompt, sampling) for i, prompt in enumerate(prompts)]


def sample_all(engine: Engine, prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> list[Completion]:
    """A completion of each prompt (token ids), in the order in which they finish."""
    engine.submit(new_requests(prompts, sampling))
    completions = []
    while engine.unfinished:
        completions += engine.step()
    return completions


def seconds(action: Callable[[], object], *, warm: int = 2, repeats: int = 6) -> float:
    """Median seconds of `action`, the device's work included, after `warm` that do not count."""
    times = []
    for i in range(warm + repeats):
        start = time.perf_counter()
        action()
        if ON_GPU:
            torch.cuda.synchronize()
        if i >= warm:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(**result: object) -> None:
    """Print one result as a JSON line, with the machine, the versions and the day."""
    machine = torch.cuda.get_device_name() if ON_GPU else f"{platform.machine()} CPU"
    threads = None if ON_GPU else torch.get_num_threads()
    described = {"machine": machine, "threads": threads, "torch": torch.__version__, "day": str(date.today())}
    print(json.dumps({**result, **described}), flush=True)
