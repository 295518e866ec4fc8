"""RewardWorker: scores groups in a child process that can be killed.

A timeout inside a process cannot stop a hang in C code, so each worker owns one child in a process group of its own. At
the deadline the group is killed and a fresh child takes the next sample. An answer counts only if it is exactly one
well-formed line with the id of its sample; anything else ends the child, too. Knows processes; knows neither Ray nor
engines.
"""

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from actors.runtime.child_process import ChildLost, ChildProcess
from actors.types import Group, Score
from conf.schema import TermSettings
from conf.validate import named_terms
from rewards.errors import RewardError
from rewards.sample import Sample
from rewards.user_function import absolute_name

START_SECONDS = 60.0


class RewardWorker:
    """Scores trajectories with the weighted sum of `terms`, one at a time.

    A sample whose scoring takes over `deadline_seconds`, ends the child or takes more than `memory_gib` becomes
    unscorable (reward None, with the reason); the run goes on. `sources` are those of the data. What rewards print goes
    to the file `log`, up to 1 MiB of each child. Raises RewardError if terms do not load or the log cannot be written.
    """

    def __init__(
        self,
        terms: Sequence[TermSettings],
        *,
        deadline_seconds: float,
        memory_gib: float,
        max_tokens: int,
        sources: Sequence[str] = ("",),
        log: Path | None = None,
    ) -> None:
        self._start_message = {
            "terms": [{**asdict(term), "fn": absolute_name(term.fn)} for term in named_terms(terms)],
            "sources": list(sources),
            "memory_bytes": int(memory_gib * 2**30),
            "parent": os.getpid(),
            "log": None if log is None else str(log.resolve()),
        }
        self._ids = itertools.count()
        self._deadline = deadline_seconds
        self._max_tokens = max_tokens
        self._child = self._start()

    def score(self, group: Group, evaluate: bool = False) -> Group:
        """The group with its scores; `evaluate` adds whether each answer is right, strictly and leniently."""
        prompt = group.prompt
        metadata = json.loads(prompt.metadata)
        scores = []
        for trajectory in group.trajectories:
            sample = Sample(
                question=prompt.question,
                completion=trajectory.text,
                answer=prompt.answer,
                task=prompt.task,
                finish_reason=trajectory.finish_reason,
                tokens=len(trajectory.token_ids),
                max_tokens=self._max_tokens,
                metadata=metadata,
                answers=prompt.answers,
            )
            scores.append(self.score_sample(sample, evaluate))
        return replace(group, scores=tuple(scores))

    def score_sample(self, sample: Sample, evaluate: bool = False) -> Score:
        """The score of one sample; its reward is None, with the reason in `error`, if it could not be scored."""
        try:
            try:
                return self._ask(sample, evaluate)
            except _LateAnswer:  # not this sample's fault
                self._restart()
                return self._ask(sample, evaluate)
        except ChildLost as lost:
            self._restart()
            return Score(None, error=str(lost))

    def _ask(self, sample: Sample, evaluate: bool) -> Score:
        number = next(self._ids)
        self._child.send({"id": number, "sample": sample.__dict__, "evaluate": evaluate})
        return _score_of(self._child.receive(self._deadline), number)

    def _restart(self) -> None:
        self._child.kill()
        self._child = self._start()

    def reference_completion(self, answer: str, source: str = "") -> str:
        """A completion with this reference answer to a question of the source, in the form that terms ask for."""
        return self._sources[source]["reference_completion"].replace("{answer}", answer)

    def expected(self, source: str = "") -> dict[str, float]:
        """What terms should give to that completion, by name, where that is known."""
        return self._sources[source]["expected"]

    def max_score(self, source: str = "") -> float | None:
        """The largest score of a sample of the source; None if a term does not say its own."""
        return self._sources[source]["max_score"]

    def close(self) -> None:
        self._child.kill()

    def _start(self) -> ChildProcess:
        child = ChildProcess("rewards.child")
        try:
            child.send(self._start_message)
            ready = cast(dict[str, Any], child.receive(START_SECONDS))
        except ChildLost as lost:
            child.kill()
            stderr = child.stderr()
            reason = f"{lost}; it said:\n{stderr}" if stderr else f"{lost}"
            raise RewardError(f"the scoring process does not start: {reason}") from lost
        if "error" in ready:
            child.kill()
            raise RewardError(ready["error"])
        self._sources = ready["sources"]
        return child


class _LateAnswer(ChildLost):
    """A second answer to an earlier sample."""


NUMBER_OR_NONE = (int, float, type(None))
ANSWER_FIELDS = {
    "id": int,
    "reward": NUMBER_OR_NONE,
    "terms": dict,
    "error": (str, type(None)),
    "strict": NUMBER_OR_NONE,
    "lenient": NUMBER_OR_NONE,
}


def _score_of(answer: object, number: int) -> Score:
    """The answer to sample `number`. Raises ChildLost if it is anything else."""
    if not isinstance(answer, dict) or answer.keys() != ANSWER_FIELDS.keys():
        raise ChildLost("an answer that is no score")
    well_formed = all(isinstance(answer[key], kind) for key, kind in ANSWER_FIELDS.items())
    if not well_formed or not all(isinstance(x, (int, float)) for x in answer["terms"].values()):
        raise ChildLost("an answer that is no score")
    answered = answer.pop("id")
    if answered < number:
        raise _LateAnswer("a second answer to an earlier sample")
    if answered > number:
        raise ChildLost("an answer to another sample")
    numbers = [answer["reward"], answer["strict"], answer["lenient"], *answer["terms"].values()]
    if not all(math.isfinite(x) for x in numbers if x is not None):
        raise ChildLost("an answer with a number that is not finite")
    return Score(**answer)
