"""RewardWorker: scores groups in a child process that can be killed.

A timeout inside a process cannot stop a hang in C code, so each worker owns one child in a process group of its own;
at the deadline the group is killed and a fresh child takes the next sample. Knows processes; knows neither Ray nor
engines.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.types import Group, Score
from rewards.registry import RewardError
from rewards.sample import Sample

START_SECONDS = 60.0
MAX_ANSWER_BYTES = 1 << 20


class RewardWorker:
    """Scores completions with the weighted sum of `terms` ({fn, weight, options} each), one at a time.

    A sample whose scoring takes over `deadline_seconds`, ends the child or takes more than `memory_gib` becomes
    unscorable (reward None, with the reason); the run goes on. Raises RewardError if the terms do not load.
    """

    def __init__(
        self, terms: Sequence[Mapping[str, Any]], *, deadline_seconds: float, memory_gib: float, max_tokens: int
    ) -> None:
        self._terms = [absolute(dict(term)) for term in terms]
        self._deadline = deadline_seconds
        self._memory_bytes = int(memory_gib * 2**30)
        self._max_tokens = max_tokens
        self._child = self._start()

    def score(self, group: Group, evaluate: bool = False) -> Group:
        """The group with its scores; `evaluate` adds whether each answer is right, strictly and leniently."""
        metadata = json.loads(group.prompt.metadata)
        scores = []
        for completion in group.completions:
            sample = Sample(
                question=group.prompt.question, completion=completion.text, answer=group.prompt.answer,
                task=group.prompt.task, finish_reason=completion.finish_reason, tokens=len(completion.token_ids),
                max_tokens=self._max_tokens, metadata=metadata,
            )  # fmt: skip
            scores.append(self.score_sample(sample, evaluate))
        return replace(group, scores=tuple(scores))

    def score_sample(self, sample: Sample, evaluate: bool = False) -> Score:
        request = json.dumps({"sample": sample.__dict__, "evaluate": evaluate}) + "\n"
        try:
            self._child.send(request)
            answer = self._child.receive(self._deadline)
        except _ChildLost as lost:
            self._child.kill()
            self._child = self._start()
            return Score(None, error=str(lost))
        return Score(**answer)

    def gold(self, answer: str) -> tuple[str, float]:
        """A perfect completion for `answer`, and the marks it must score."""
        return self._ready["gold"].replace("{answer}", answer), self._ready["full_marks"]

    def close(self) -> None:
        self._child.kill()

    def _start(self) -> "_Child":
        child = _Child()
        try:
            child.send(
                json.dumps({"terms": self._terms, "memory_bytes": self._memory_bytes, "parent": os.getpid()}) + "\n"
            )
            self._ready = child.receive(START_SECONDS)
        except _ChildLost as lost:
            child.kill()
            raise RewardError(f"the scoring process does not start: {lost}") from lost
        if "error" in self._ready:
            child.kill()
            raise RewardError(self._ready["error"])
        return child


class _ChildLost(Exception):
    """The child did not answer; the message is the reason."""


class _Child:
    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rewards.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=environment, start_new_session=True, bufsize=0,
        )  # fmt: skip
        self._buffer = b""

    def send(self, text: str) -> None:
        assert self._process.stdin is not None
        try:
            # bufsize=0 makes stdin a raw file: write until all is out.
            view = memoryview(text.encode())
            while view:
                view = view[self._process.stdin.write(view) :]
        except BrokenPipeError as error:
            raise _ChildLost(self._reason()) from error

    def receive(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise _ChildLost(f"no answer within {seconds:g} s")
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            self._buffer += data
            if not data:
                raise _ChildLost(self._reason())
            if len(self._buffer) > MAX_ANSWER_BYTES:
                raise _ChildLost("an answer of over 1 MiB")
        line, self._buffer = self._buffer.split(b"\n", 1)
        try:
            return json.loads(line)
        except ValueError as error:
            raise _ChildLost("an answer that is not JSON") from error

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()

    def _reason(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"it exited with code {code}"


def absolute(term: dict[str, Any]) -> dict[str, Any]:
    """The term with a .py file's path made absolute, so that the child finds it from anywhere; `fn` is its name in the rows."""
    module, colon, function = term["fn"].rpartition(":")
    if colon and module.endswith(".py"):
        return {**term, "fn": f"{Path(module).expanduser().resolve()}:{function}"}
    return term
