"""Environments in processes of their own: what they answer, and what a bad one costs."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.environments.errors import EnvironmentRefused
from actors.environments.host import Answer, EnvironmentHost
from actors.runtime import child_process

GAMES = """
import os, re, time
from actors.environments.base import Done, Observation


class Game:
    def __init__(self, bonus=0.0):
        self.bonus = bonus

    def reset(self, number, **row):
        self.number, self.guesses = number, 0
        return f"Guess a number from 1 to {row['most']}."

    def compare(self, guess: int) -> str:
        \"\"\"Compare a guess with the number.

        Args:
            guess: The guess.
        \"\"\"
        self.guesses += 1
        return "right" if guess == self.number else "higher" if guess < self.number else "lower"

    def wait(self, seconds: float) -> dict:
        \"\"\"Wait.

        Args:
            seconds: How long.
        \"\"\"
        time.sleep(seconds)
        return {"waited": seconds}

    def fail(self) -> None:
        \"\"\"Raise.\"\"\"
        raise ValueError("no such thing")

    def leave(self) -> None:
        \"\"\"End the process.\"\"\"
        os._exit(3)

    def get_stuck(self) -> bool:
        \"\"\"Hold the interpreter for good.\"\"\"
        return bool(re.match("(a+)+$", "a" * 64 + "b"))

    def get_reward(self):
        return 1.0 / self.guesses + self.bonus if self.guesses else None


class Echo:
    def reset(self, **row):
        return [{"role": "user", "content": "Say something."}]

    def step(self, text):
        if text == "odd":
            return 3
        return Done("bye") if text == "stop" else Observation(text) if text == "again" else text.upper()

    def reward(self):
        return float("nan")


class Both(Echo):
    def tool(self) -> str:
        \"\"\"A tool.\"\"\"


class Neither:
    def reset(self): ...


def function(): ...
"""


@pytest.fixture
def games(tmp_path: Path) -> Path:
    file = tmp_path / "games.py"
    file.write_text(GAMES)
    return file


@contextmanager
def host_of(
    games: Path,
    name: str = "Game",
    options: Mapping[str, object] | None = None,
    *,
    children: int = 1,
    deadline: float = 20.0,
) -> Iterator[EnvironmentHost]:
    host = EnvironmentHost(
        f"{games}:{name}", options or {}, children=children, deadline_seconds=deadline, memory_gib=2.0
    )
    try:
        yield host
    finally:
        host.close()


def answers_of(host: EnvironmentHost, count: int, seconds: float = 30.0) -> dict[int, Answer]:
    """The next answer of each of `count` episodes."""
    answers: dict[int, Answer] = {}
    until = time.monotonic() + seconds
    while len(answers) < count:
        assert time.monotonic() < until, answers
        for answer in host.poll(1.0):
            assert answer.episode not in answers
            answers[answer.episode] = answer
    return answers


def only(host: EnvironmentHost) -> Answer:
    (answer,) = answers_of(host, 1).values()
    return answer


def test_an_episode_with_tools(games: Path):
    with host_of(games, options={"bonus": 0.5}) as host:
        names = [schema["function"]["name"] for schema in host.schemas]
        assert names == ["compare", "wait", "fail", "leave", "get_stuck"]
        assert host.has_reward and not host.has_step
        episode = host.begin({"number": 7, "most": 9})
        assert only(host) == Answer(episode, "Guess a number from 1 to 9.")
        for guess, expected in ((5, "higher"), (7, "right")):
            host.call(episode, "compare", {"guess": guess})
            assert only(host).value == expected
        host.reward(episode)
        assert only(host).value == 1.0
        host.call(episode, "fail", {})
        answer = only(host)
        assert (answer.error, answer.is_lost) == ("ValueError: no such thing", False)
        host.call(episode, "get_reward", {})
        assert only(host).error == "LookupError: no tool get_reward"
        host.end(episode)
        assert host.poll(0.05) == []


def test_an_episode_that_is_answered_by_step(games: Path):
    with host_of(games, "Echo") as host:
        assert host.has_step and host.schemas == []
        episode = host.begin({})
        assert only(host).value == [{"role": "user", "content": "Say something."}]
        for text, value in (("hi", {"text": "HI", "done": False}), ("again", {"text": "again", "done": False})):
            host.step(episode, text)
            assert only(host).value == value
        host.step(episode, "odd")
        assert "step returned int; return a text, an Observation or Done" in str(only(host).error)
        host.step(episode, "stop")
        assert only(host).value == {"text": "bye", "done": True}
        host.reward(episode)
        assert only(host).error == "ValueError: the reward is nan"


def test_many_episodes_wait_beside_each_other(games: Path):
    with host_of(games, children=2) as host:
        episodes = [host.begin({"number": 1, "most": 2}) for _ in range(100)]
        answers_of(host, 100)
        started = time.monotonic()
        for episode in episodes:
            host.call(episode, "wait", {"seconds": 1.0})
        assert all(answer.value == '{"waited": 1.0}' for answer in answers_of(host, 100).values())
        assert time.monotonic() - started < 10.0  # one after the other they would take 100 s


def test_one_that_hangs_costs_its_own_episode(games: Path):
    with host_of(games, deadline=1.0) as host:
        hanging, other = (host.begin({"number": 1, "most": 2}) for _ in range(2))
        answers_of(host, 2)
        host.call(hanging, "wait", {"seconds": 1e6})
        lost = only(host)
        assert lost == Answer(hanging, error="no answer within 1 s", is_lost=True)
        host.call(other, "compare", {"guess": 1})
        assert only(host).value == "right"
        # New episodes go to another process, and the old one ends with its last episode.
        new = host.begin({"number": 1, "most": 2})
        assert only(host).episode == new
        assert len(host._children) == 2
        host.end(other)
        assert len(host._children) == 1


def test_one_that_holds_the_interpreter_takes_its_process_with_it(games: Path):
    with host_of(games, deadline=1.0) as host:
        stuck, other = (host.begin({"number": 1, "most": 2}) for _ in range(2))
        answers_of(host, 2)
        host.call(stuck, "get_stuck", {})
        answers = answers_of(host, 2)
        assert (answers[stuck].is_lost, answers[stuck].may_restart) == (True, False)
        assert answers[other] == Answer(other, error="its process was stuck", is_lost=True, may_restart=True)
        assert host.begin({"number": 1, "most": 2}) == only(host).episode
        host.end(stuck)


def test_a_process_that_ends_takes_its_episodes_with_it(games: Path):
    with host_of(games, children=1) as host:
        episodes = [host.begin({"number": 1, "most": 2}) for _ in range(3)]
        answers_of(host, 3)
        (first,) = host._children
        host.call(episodes[1], "leave", {})
        answers = answers_of(host, 3)
        assert {answer.error for answer in answers.values()} == {"it exited with code 3"}
        assert all(answer.is_lost and answer.may_restart for answer in answers.values())
        assert host.begin({"number": 1, "most": 2}) == only(host).episode
        with pytest.raises(ProcessLookupError):
            os.killpg(first.process._process.pid, 0)


def test_a_process_that_reads_nothing_does_not_hold_the_caller(games: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(child_process, "SEND_SECONDS", 1.0)
    with host_of(games, deadline=60.0) as host:
        stuck, other = (host.begin({"number": 1, "most": 2}) for _ in range(2))
        answers_of(host, 2)
        host.call(stuck, "get_stuck", {})
        time.sleep(0.5)
        started = time.monotonic()
        host.call(other, "compare", {"guess": 1, "more": "x" * 10**6})
        assert 1.0 <= time.monotonic() - started < 10.0  # with the start of another process
        answers = answers_of(host, 2)
        assert {answer.error for answer in answers.values()} == {"it read nothing for 1 s"}
        host.call(other, "compare", {"guess": 1})  # of an episode that is lost, nothing is asked
        assert host.poll(0.05) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Missing", {}, "does not import"),
        ("function", {}, "is no class with a method reset"),
        ("Both", {}, "both a method step and tools"),
        ("Neither", {}, "neither a method step nor a public method"),
        ("Game", {"malus": 1}, r"cannot be made with \{'malus': 1\}"),
    ],
)
def test_a_class_that_is_no_environment_is_refused(games: Path, name: str, options: dict[str, object], message: str):
    with pytest.raises(EnvironmentRefused, match=message), host_of(games, name, options):
        pass
