import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import AlgorithmSettings, LearnerSettings
from learner import ranks
from learner.learner import Learner
from learner.objectives import OBJECTIVES
from learner.ranks import Ranks
from learner.stats import StepStats
from tests.rollouts import group, table
from tests.unit.test_policy import make_policy

HOST, SECONDS, STEPS = "127.0.0.1", 60.0, 3


@given(costs=st.lists(st.integers(1, 50), max_size=40), count=st.integers(1, 5))
def test_every_row_is_one_ranks_and_none_has_much_more(costs: list[int], count: int):
    rows = list(range(len(costs)))
    shares = [Ranks(i, count).share(costs) for i in range(count)]
    assert [row for share in shares for row in rows[share]] == rows
    assert max(sum(costs[share]) for share in shares) <= sum(costs) / count + max(costs, default=0)


def some_rows(step: int) -> Any:
    """Groups of different lengths, of which the last teaches nothing."""
    return table(
        [
            group(0, [1.0, 0.0, 0.5], completions=[[40, 41], [50, 51 + step, 52], [60]]),
            group(1, [0.0, 1.0], completions=[[41, 42, 43, 44, 45], [51]]),
            group(2, [1.0, 1.0]),
        ]
    )


ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coefficient": 0.1},
    "ppo": {"minibatches": 3, "kl_coefficient": 0.1, "kl_in": "reward", "kl_target": 1e-3},
    "online_dpo": {},
}


def train(folder: Path, rank: Ranks, name: str) -> tuple[torch.Tensor, StepStats]:
    settings = LearnerSettings(learning_rate=1e-3, micro_batch_tokens=8192)
    objective = OBJECTIVES[name](AlgorithmSettings(name, **ALGORITHMS[name]), max_tokens=16, term_weights={})
    learner = Learner(make_policy(folder), objective, settings)
    learner.ranks = rank
    for step in range(STEPS):
        stats = learner.step(some_rows(step))
    return learner.adapter().flat, stats


def one_of(rank: Ranks, folder: Path, name: str, answers: Any, ports: Any) -> None:
    torch.set_num_threads(1)
    if rank.index == 0:
        store, port = ranks.open_store(HOST)
        for _ in range(rank.count - 1):
            ports.put(port)
    else:
        store = ranks.find_store(HOST, ports.get(timeout=SECONDS), seconds=SECONDS)
    ranks.join(store, rank, host=HOST, device="cpu", seconds=SECONDS)
    flat, stats = train(folder, rank, name)
    answers.put((rank.index, flat.numpy(), stats))
    ranks.leave()


@pytest.mark.parametrize(("count", "name"), [(2, "grpo"), (3, "grpo"), (2, "ppo"), (2, "online_dpo")])
def test_several_ranks_learn_what_one_does(tiny_model: Path, count: int, name: str):
    context = multiprocessing.get_context("spawn")
    answers, ports = context.Queue(), context.Queue()
    processes = [
        context.Process(target=one_of, args=(Ranks(i, count), tiny_model, name, answers, ports)) for i in range(count)
    ]
    for process in processes:
        process.start()
    found = {index: (flat, stats) for index, flat, stats in (answers.get(timeout=120) for _ in processes)}
    for process in processes:
        process.join()
    alone, expected = train(tiny_model, Ranks(), name)
    for index in range(count):
        flat, stats = found[index]
        assert (flat == found[0][0]).all(), "ranks drift apart"
        torch.testing.assert_close(torch.from_numpy(flat), alone, atol=1e-6, rtol=1e-6)
        for name in ("loss", "grad_norm", "mismatch", "mismatch_max", "entropy", "reference_kl"):
            assert getattr(stats, name) == pytest.approx(getattr(expected, name), abs=1e-6, rel=1e-5), name
        assert (stats.trained_completions, stats.trained_tokens) == (
            expected.trained_completions,
            expected.trained_tokens,
        )
