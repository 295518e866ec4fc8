"""Several ranks learn what one learner does, and share its rows fairly."""

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.runtime.local import LocalRuntime
from conf.errors import UsageError
from learner.metrics import StepStats
from learner.parallel import data_parallel
from learner.parallel.data_parallel import DataParallel
from learner.parallel.group import LearnerGroup
from learner.parallel.sharding import Shard
from tests.helpers.learners import make_learner, make_policy, make_sharded_policy
from tests.helpers.presets import default_algorithm
from tests.helpers.rollouts import group, table
from tests.helpers.tiny import make_tiny_model

HOST, SECONDS, STEPS = "127.0.0.1", 60.0, 3


@given(costs=st.lists(st.integers(1, 50), max_size=40), world_size=st.integers(1, 5))
def test_every_row_has_one_rank_and_none_has_much_more(costs: list[int], world_size: int):
    rows = list(range(len(costs)))
    shards = [DataParallel(rank, world_size).shard(costs) for rank in range(world_size)]
    assert [row for shard in shards for row in rows[shard]] == rows
    assert max(sum(costs[shard]) for shard in shards) <= sum(costs) / world_size + max(costs, default=0)


def some_rows(step: int) -> pa.Table:
    """Groups of different lengths, of which the last teaches nothing."""
    return table(
        [
            group(0, [1.0, 0.0, 0.5], completions=[[40, 41], [50, 51 + step, 52], [60]]),
            group(1, [0.0, 1.0], completions=[[41, 42, 43, 44, 45], [51]]),
            group(2, [1.0, 1.0]),
        ]
    )


CHANGED: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coefficient": 0.1},
    "ppo": {"minibatches": 3, "kl_coefficient": 0.1, "kl_placement": "reward", "kl_target": 1e-3},
    "online_dpo": {},
}


@dataclass(frozen=True)
class Case:
    """What is trained, and among how many ranks the base is split."""

    algorithm: str
    shards: int = 1
    quantization: str = "none"
    targets: Sequence[str] | None = None


def train(folder: Path, rank: DataParallel, case: Case) -> tuple[torch.Tensor, StepStats]:
    algorithm = default_algorithm(case.algorithm, **CHANGED[case.algorithm])
    if case.shards > 1 and rank.world_size > 1:
        shard = Shard(rank.rank % case.shards, case.shards)
        options: dict[str, Any] = {"quantization": case.quantization, "targets": case.targets}
        policy, sharded = make_sharded_policy(folder, shard, **options)
        learner = make_learner(policy, algorithm, micro_batch_tokens=12, sharded=sharded)
        sharded.connect(rank, seconds=SECONDS)
    else:
        policy = make_policy(folder, quantization=case.quantization, targets=case.targets)
        learner = make_learner(policy, algorithm)
    learner.data_parallel = rank
    stats = [learner.step(some_rows(step)) for step in range(STEPS)]
    return learner.adapter().flat, stats[-1]


def run_rank(rank: DataParallel, folder: Path, case: Case, answers: Queue, ports: Queue) -> None:
    torch.set_num_threads(1)
    if rank.rank == 0:
        store, port = data_parallel.open_store(HOST)
        for _ in range(rank.world_size - 1):
            ports.put(port)
    else:
        store = data_parallel.connect_store(HOST, ports.get(timeout=SECONDS), seconds=SECONDS)
    data_parallel.join(store, rank, host=HOST, device="cpu", seconds=SECONDS)
    flat, stats = train(folder, rank, case)
    answers.put((rank.rank, flat.numpy(), stats))
    data_parallel.leave()


@pytest.mark.parametrize(
    ("world_size", "case"),
    [
        (2, Case("grpo")),
        (3, Case("grpo")),
        (2, Case("ppo")),
        (2, Case("online_dpo")),
        # Ranks have more and fewer micro-batches here, and one of five none in some steps.
        (2, Case("grpo", shards=2)),
        (4, Case("ppo", shards=2)),
        (5, Case("grpo", shards=5)),
        (2, Case("online_dpo", shards=2, quantization="nf4")),
        # Layers without an adapter ask for their weight again in backward, when other layers are gathered.
        (2, Case("grpo", shards=2, quantization="nf4", targets=("q_proj",))),
    ],
)
def test_several_ranks_learn_what_one_learner_does(tmp_path: Path, world_size: int, case: Case):
    tiny_model = make_tiny_model(tmp_path, layers=2 if case.targets is None else 5)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.learners"])
    answers, ports = context.Queue(), context.Queue()
    ranks = [DataParallel(rank, world_size) for rank in range(world_size)]
    processes = [context.Process(target=run_rank, args=(rank, tiny_model, case, answers, ports)) for rank in ranks]
    for process in processes:
        process.start()
    results = {rank: (flat, stats) for rank, flat, stats in (answers.get(timeout=120) for _ in processes)}
    for process in processes:
        process.join()
    alone, expected = train(tiny_model, DataParallel(), case)
    for rank in range(world_size):
        flat, stats = results[rank]
        assert (flat == results[0][0]).all(), "ranks drift apart"
        torch.testing.assert_close(torch.from_numpy(flat), alone, atol=1e-6, rtol=1e-6)
        for metric in ("loss", "grad_norm", "logprob_gap", "logprob_gap_max", "entropy", "reference_kl"):
            assert getattr(stats, metric) == pytest.approx(getattr(expected, metric), abs=1e-6, rel=1e-5), metric
        assert (stats.trained_completions, stats.trained_tokens) == (
            expected.trained_completions,
            expected.trained_tokens,
        )


class _Answers:
    """A learner's handle that says which optimizer it has."""

    host, name = HOST, "learner-0"

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def submit(self, *_: object) -> "_Answers":
        return self

    def result(self) -> str:
        return self._kind


def test_learners_with_unlike_optimizers_are_refused():
    handles: Any = [_Answers("adamw"), _Answers("adamw8bit")]
    with pytest.raises(UsageError, match=r"learner\.optimizer=auto: .* would use adamw"):
        LearnerGroup(LocalRuntime(), handles, seconds=1.0)
