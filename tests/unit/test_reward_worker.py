"""RewardWorker: whatever a reward does costs one sample, never the run."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.reward import RewardWorker
from rewards.registry import RewardError
from rewards.sample import Sample
from tests.rollouts import group

HOSTILE = Path(__file__).with_name("hostile_rewards.py")


@contextmanager
def worker(function: str, *, deadline: float = 1.0) -> Iterator[RewardWorker]:
    terms = [{"fn": f"{HOSTILE}:{function}", "weight": 1.0, "options": {}}]
    one = RewardWorker(terms, deadline_seconds=deadline, memory_gib=0.5, max_tokens=16)
    yield one
    one.close()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("hang", "no answer within 1 s"),
        ("exit_process", "exited with code 3"),
        ("segfault", "SIGSEGV"),
        ("eat_memory", "MemoryError"),
        ("nan", "gave nan"),
        ("raises", "ZeroDivisionError"),
        ("spawn_and_hang", "no answer within 1 s"),
    ],
)
def test_a_bad_sample_is_unscorable_and_the_next_one_is_scored(function: str, reason: str):
    with worker(function, deadline=1.0 if "1 s" in reason else 10.0) as one:
        bad = one.score_sample(Sample("", "bad", "1"))
        good = one.score_sample(Sample("", "good", "1"))
    assert bad.reward is None
    assert reason in str(bad.error)
    assert good.reward == 1.0


def test_a_gigabyte_of_output_goes_nowhere():
    with worker("print_a_gigabyte", deadline=20.0) as one:
        assert one.score_sample(Sample("", "bad", "1")).reward == 1.0


def test_the_whole_process_group_dies():
    with worker("spawn_and_hang") as one:
        one.score_sample(Sample("", "bad", "1"))
        time.sleep(0.2)
        assert not subprocess.run(["pgrep", "-f", "sleep 4242"], capture_output=True, check=False).stdout


def test_async_rewards_are_awaited():
    with worker("awaited") as one:
        assert one.score_sample(Sample("", "x", "1")).reward == 1.0


def test_scores_a_group_in_order():
    worker = RewardWorker(
        [{"fn": "numeric", "weight": 2.0, "options": {}}], deadline_seconds=5, memory_gib=1, max_tokens=9
    )
    scored = worker.score(group(0, [None, None]), True)
    assert [s.reward for s in scored.scores] == [0.0, 0.0]
    assert worker.gold("12") == ("12", 2.0)
    worker.close()


def test_a_reward_that_does_not_import_stops_the_start():
    with pytest.raises(RewardError, match="nosuch_module"):
        RewardWorker(
            [{"fn": "nosuch_module:f", "weight": 1, "options": {}}], deadline_seconds=1, memory_gib=1, max_tokens=1
        )
