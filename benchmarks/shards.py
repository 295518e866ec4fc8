"""A base that is split among learners: `python -m benchmarks.shards [case] [--ranks 2] [override ...]`.

Each rank is a process with a GPU of its own (or on the CPU), which loads its part of the case's base
(benchmarks/work.py), meets the others and takes two steps on the case's rows. A JSON line for each rank: seconds, the
memory of its process, and the relative difference of its gradient from that of one learner with the whole base, if
`--compare` says that a GPU can hold it. The plan of one learner alone is printed, or why it is refused.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing

from benchmarks.common import ON_GPU, randomize_adapter, report
from benchmarks.gpu_memory import GIB, gib_in_use
from benchmarks.work import CASES, random_rollouts, work_settings
from conf.errors import UsageError
from conf.schema import Settings
from epiphany.learner_factory import make_learner_of_plan
from epiphany.run_data import load_model_source
from epiphany.run_plan import RunPlan, apply_limits, plan_run
from learner.learner import Learner
from learner.parallel import data_parallel
from learner.parallel.data_parallel import DataParallel

HOST, SECONDS = "127.0.0.1", 300.0


def make(settings: Settings, rank: int = 0) -> tuple[RunPlan, Learner]:
    """A learner that nothing shares its process with, with a random adapter that is the same for every rank."""
    plan = plan_run(settings, load_model_source(settings)[0], roles=frozenset({"learner"}))
    apply_limits(plan)
    learner, _ = make_learner_of_plan(settings, plan, rank=rank)
    torch.manual_seed(0)
    randomize_adapter(learner)
    return plan, learner


def gradient(learner: Learner) -> torch.Tensor:
    """The gradient of the last step, as the optimizer saw it."""
    assert learner.policy.lora.flat.grad is not None
    return learner.policy.lora.flat.grad.float().cpu()


def run_rank(rank: int, ranks: int, settings: Settings, port: int, whole: torch.Tensor | None) -> None:
    started = time.perf_counter()
    plan, learner = make(settings, rank)
    loaded = time.perf_counter() - started
    this = DataParallel(rank, ranks)
    store = data_parallel.connect_store(HOST, port, seconds=SECONDS)
    data_parallel.join(store, this, host=HOST, device=learner.policy.device, seconds=SECONDS)
    learner.data_parallel = this
    if learner.sharded is not None:
        learner.sharded.connect(this, seconds=SECONDS)
    table = random_rollouts(settings, plan.shape.vocabulary)
    learner.step(table)
    start = time.perf_counter()
    stats = learner.step(table)
    if ON_GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    difference = None if whole is None else float((gradient(learner) - whole).norm() / whole.norm())
    report(
        benchmark="shards",
        rank=rank,
        ranks=ranks,
        shards=settings.runtime.learner_shards,
        model=settings.model.path,
        loading_seconds=loaded,
        step_seconds=seconds,
        stream_tokens=stats.stream_tokens,
        grad_norm=stats.grad_norm,
        difference_of_gradient=difference,
        planned_gib=plan.card.total / GIB if plan.card else None,
        process_gib=gib_in_use() if ON_GPU else None,
        torch_allocated_highest_gib=torch.cuda.max_memory_allocated() / GIB if ON_GPU else None,
    )
    data_parallel.leave()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", default="w", choices=list(CASES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--compare", action="store_true")
    arguments, overrides = parser.parse_known_args()
    ranks = arguments.ranks
    split = [f"runtime.learner_data_parallel_size={ranks}", f"runtime.learner_shards={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        alone = work_settings(arguments.case, Path(folder), "runtime=ray", *overrides)
        settings = work_settings(arguments.case, Path(folder), "runtime=ray", *split, *overrides)
        whole = None
        if arguments.compare:
            plan, learner = make(alone)
            table = random_rollouts(alone, plan.shape.vocabulary)
            for _ in range(2):
                learner.step(table)
            whole = gradient(learner)
            del learner
        else:
            try:
                print("\n".join(plan_run(alone, load_model_source(alone)[0], roles=frozenset({"learner"})).memory))
            except UsageError as refusal:
                print(f"one learner with the whole base: {refusal}")
        store, port = data_parallel.open_store(HOST)
        context = torch.multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=run_rank, args=(rank, ranks, settings, port, whole)) for rank in range(ranks)
        ]
        for rank, process in enumerate(processes):
            os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)  # of the process that starts now
            process.start()
        for process in processes:
            process.join()
        del store
        if any(process.exitcode for process in processes):
            raise SystemExit("a rank failed")


if __name__ == "__main__":
    main()
