"""RewardWorker: whatever a reward does costs one sample, never the run."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from actors.reward import RewardWorker
from conf.schema import TermSettings
from rewards.errors import RewardError
from rewards.log import DROPPED, MAX_LOG_BYTES
from rewards.sample import Sample
from tests.helpers.rollouts import group

HOSTILE = Path(__file__).parents[1] / "helpers" / "hostile_rewards.py"


@contextmanager
def worker(function: str, *, deadline: float = 1.0, log: Path | None = None) -> Iterator[RewardWorker]:
    terms = [TermSettings(f"{HOSTILE}:{function}")]
    scorer = RewardWorker(terms, deadline_seconds=deadline, memory_gib=0.5, max_tokens=16, log=log)
    yield scorer
    scorer.close()


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
    with worker(function, deadline=1.0 if "1 s" in reason else 10.0) as scorer:
        bad = scorer.score_sample(Sample("", "bad", "1"))
        good = scorer.score_sample(Sample("", "good", "1"))
    assert bad.reward is None
    assert reason in str(bad.error)
    assert good.reward == 1.0


def test_a_gigabyte_of_output_goes_nowhere():
    with worker("print_a_gigabyte", deadline=20.0) as scorer:
        assert scorer.score_sample(Sample("", "bad", "1")).reward == 1.0


def test_output_is_appended_to_the_log_up_to_a_limit(tmp_path: Path):
    log = tmp_path / "rewards.log"
    log.write_text("before\n")
    with worker("prints", log=log) as scorer:
        assert [scorer.score_sample(Sample("", text, "1")).reward for text in ("a", "b")] == [1.0, 1.0]
    assert log.read_text() == "before\nimported\nscoring a\nwarned of a\nscoring b\nwarned of b\n"
    with worker("print_a_gigabyte", deadline=20.0, log=log) as scorer:
        assert scorer.score_sample(Sample("", "bad", "1")).reward == 1.0
    text = log.read_text()
    assert len(text) < MAX_LOG_BYTES + 1000 and text.count(DROPPED) == 1


def test_a_log_that_cannot_be_written_stops_the_start(tmp_path: Path):
    with (
        pytest.raises(RewardError, match="cannot be written: No such file"),
        worker("prints", log=tmp_path / "x" / "log"),
    ):
        pass


def test_the_whole_process_group_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    with worker("spawn_and_hang") as scorer:
        scorer.score_sample(Sample("", "bad", "1"))
    process = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10.0
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the process of a reward outlives it"
        time.sleep(0.01)


@pytest.mark.parametrize("function", ["forks", "forks_late"])
def test_every_sample_gets_its_own_reward_from_a_reward_that_forks_and_returns(function: str):
    """Without ids, the second answer of one sample was read as the first answer of the next."""
    with worker(function, deadline=10.0) as scorer:
        scores = [scorer.score_sample(Sample("", f"{i}", None)) for i in range(32)]
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
    with worker(function, deadline=10.0) as scorer:
        scores = [scorer.score_sample(Sample("", text, "1")) for text in ("bad", "good", "good")]
    assert reason in str(scores[0].error)
    assert [s.reward for s in scores] == [None, 1.0, 1.0]


def test_a_second_answer_ends_the_child_and_costs_no_other_sample():
    with worker("answers_twice", deadline=10.0) as scorer:
        first = scorer._child
        assert scorer.score_sample(Sample("", "bad", "1")).error is None
        assert [scorer.score_sample(Sample("", "good", "1")).reward for _ in range(2)] == [1.0, 1.0]
        assert scorer._child is not first


def test_a_folder_of_the_users_does_not_shadow_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("rewards.py", "epiphany.py", "launch.py"):
        (tmp_path / name).write_text("def score(sample):\n    return 3.0\n")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "__init__.py").write_text("raise ImportError('not ours')\n")
    (tmp_path / "mine.py").write_text("def score(sample):\n    return 2.0\n")
    monkeypatch.chdir(tmp_path)
    for fn, reward in (("rewards.py:score", 3.0), ("mine:score", 2.0), ("numeric", 1.0)):
        scorer = RewardWorker([TermSettings(fn)], deadline_seconds=10.0, memory_gib=1.0, max_tokens=16)
        assert scorer.score_sample(Sample("", "1", "1")).reward == reward
        scorer.close()


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
    scorer = RewardWorker(terms, deadline_seconds=10.0, memory_gib=1.0, max_tokens=16)
    score = scorer.score_sample(Sample("", "x", None, tokens=5))
    scorer.close()
    assert (score.reward, score.terms) == (10.5, {"length": 0.5, "length_2": 1.0})


def test_async_rewards_are_awaited():
    with worker("awaited") as scorer:
        assert scorer.score_sample(Sample("", "x", "1")).reward == 1.0


def test_scores_a_group_in_order():
    scorer = RewardWorker([TermSettings("numeric", weight=2.0)], deadline_seconds=5, memory_gib=1, max_tokens=9)
    unscored = group(0, [None, None])
    texts = ("2", "1")
    trajectories = tuple(replace(t, text=x) for t, x in zip(unscored.trajectories, texts, strict=True))
    scored = scorer.score(replace(unscored, trajectories=trajectories), True)
    assert [(s.reward, s.strict, s.lenient) for s in scored.scores] == [(0.0, 0.0, 0.0), (2.0, 1.0, 1.0)]
    both = replace(unscored, trajectories=trajectories, prompt=replace(unscored.prompt, answers=("1", "2")))
    assert [s.reward for s in scorer.score(both).scores] == [2.0, 2.0]
    assert (scorer.reference_completion("12"), scorer.max_score()) == ("12", 2.0)
    scorer.close()


def test_a_users_own_reward_is_neither_right_nor_has_it_a_maximum():
    with worker("nan") as scorer:
        score = scorer.score_sample(Sample("", "good", "1"), True)
        assert (score.reward, score.strict, score.lenient) == (1.0, None, None)
        assert (scorer.reference_completion("12"), scorer.max_score()) == ("12", None)


def test_an_error_says_where():
    with worker("raises") as scorer:
        error = scorer.score_sample(Sample("", "bad", "1")).error
    assert error is not None and re.fullmatch(r"hostile_rewards.py:\d+: ZeroDivisionError: division by zero", error)


def test_a_reward_that_does_not_import_stops_the_start():
    with pytest.raises(RewardError, match="nosuch_module"):
        RewardWorker([TermSettings("nosuch_module:f")], deadline_seconds=1, memory_gib=1, max_tokens=1)
