"""RewardWorker: whatever a reward does costs one sample, never the run."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.reward import RewardWorker
from conf.schema import TermSettings
from rewards.registry import RewardError
from rewards.sample import Sample
from tests.rollouts import group

HOSTILE = Path(__file__).with_name("hostile_rewards.py")


@contextmanager
def worker(function: str, *, deadline: float = 1.0) -> Iterator[RewardWorker]:
    terms = [TermSettings(f"{HOSTILE}:{function}")]
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


@pytest.mark.parametrize("function", ["forks", "forks_late"])
def test_every_sample_gets_its_own_reward_from_a_reward_that_forks_and_returns(function: str):
    """Without ids, the second answer of one sample was read as the first answer of the next."""
    with worker(function, deadline=10.0) as one:
        scores = [one.score_sample(Sample("", f"{i}", None)) for i in range(32)]
    assert [s.reward for s in scores if s.reward is not None] == [
        float(i) for i, s in enumerate(scores) if s.error is None
    ]
    assert sum(s.error is None for s in scores) >= 16


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("answers_for_another", "an answer to another sample"),
        ("answers_nonsense", "an answer that is no score"),
        ("answers_infinity", "not finite"),
    ],
)
def test_anything_but_one_well_formed_answer_ends_the_child(function: str, reason: str):
    with worker(function, deadline=10.0) as one:
        scores = [one.score_sample(Sample("", text, "1")) for text in ("bad", "good", "good")]
    assert reason in str(scores[0].error)
    assert [s.reward for s in scores] == [None, 1.0, 1.0]


def test_a_second_answer_ends_the_child_and_costs_no_other_sample():
    with worker("answers_twice", deadline=10.0) as one:
        first = one._child
        assert one.score_sample(Sample("", "bad", "1")).error is None
        assert [one.score_sample(Sample("", "good", "1")).reward for _ in range(2)] == [1.0, 1.0]
        assert one._child is not first


def test_a_folder_of_the_users_does_not_shadow_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("rewards.py", "session.py", "report.py"):
        (tmp_path / name).write_text("def score(sample):\n    return 3.0\n")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "__init__.py").write_text("raise ImportError('not ours')\n")
    (tmp_path / "mine.py").write_text("def score(sample):\n    return 2.0\n")
    monkeypatch.chdir(tmp_path)
    for fn, reward in (("rewards.py:score", 3.0), ("mine:score", 2.0), ("numeric", 1.0)):
        one = RewardWorker([TermSettings(fn)], deadline_seconds=10.0, memory_gib=1.0, max_tokens=16)
        assert one.score_sample(Sample("", "1", "1")).reward == reward
        one.close()


def test_a_child_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.exit('no interpreter today')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RewardError, match=r"(?s)does not start: it exited with code 1.*no interpreter today"):
        RewardWorker([TermSettings("numeric")], deadline_seconds=1, memory_gib=1, max_tokens=1)


def test_terms_with_the_same_function_add_up():
    terms = [
        TermSettings("length", weight=1.0, options={"target": 0, "maximum": 10}),
        TermSettings("length", weight=10.0, options={"target": 10, "maximum": 20}),
    ]
    one = RewardWorker(terms, deadline_seconds=10.0, memory_gib=1.0, max_tokens=16)
    score = one.score_sample(Sample("", "x", None, tokens=5))
    one.close()
    assert (score.reward, score.terms) == (10.5, {"length": 0.5, "length_2": 1.0})


def test_async_rewards_are_awaited():
    with worker("awaited") as one:
        assert one.score_sample(Sample("", "x", "1")).reward == 1.0


def test_scores_a_group_in_order():
    worker = RewardWorker([TermSettings("numeric", weight=2.0)], deadline_seconds=5, memory_gib=1, max_tokens=9)
    scored = worker.score(group(0, [None, None]), True)
    assert [s.reward for s in scored.scores] == [0.0, 0.0]
    assert worker.gold("12") == ("12", 2.0)
    worker.close()


def test_a_reward_that_does_not_import_stops_the_start():
    with pytest.raises(RewardError, match="nosuch_module"):
        RewardWorker([TermSettings("nosuch_module:f")], deadline_seconds=1, memory_gib=1, max_tokens=1)
