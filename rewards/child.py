"""The child process that scores: `python -m rewards.child`, which exchanges lines of JSON with actors/reward.py.

First line in: {"terms": [...], "sources": [...], "memory_bytes": n, "parent": pid, "log": file or null}; answer
{"ready": true, ...} or {"error": "..."}. Then one line for each sample, {"id": n, "sample": {...}, "evaluate": bool};
its answer carries the same id. JSON, not pickle: what a reward sends back is never executed. What a reward prints goes
to the log; descriptors 1 and 2 are /dev/null, so that it can fill neither a pipe nor a disk. Errors of the start go to
stderr, where the parent reads them.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rewards.composition import Term, correctness, expected_scores, max_score, reference_completion, score
from rewards.errors import RewardError
from rewards.log import open_log
from rewards.process import bind_to_parent
from rewards.registry import load_term
from rewards.sample import Sample

MAX_ERROR = 500  # characters


def _private_streams() -> tuple[TextIO, TextIO]:
    """Streams to the parent on descriptors that a reward does not know; 0 and 1 become /dev/null."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    _silence(0, 1)
    return requests, answers


def _silence(*descriptors: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    os.close(null)


def _start(first: Mapping[str, Any]) -> list[Term]:
    """The terms, with this process set up as the first line says. Raises RewardError."""
    bind_to_parent(first["parent"])
    resource.setrlimit(resource.RLIMIT_DATA, (first["memory_bytes"], first["memory_bytes"]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    if first["log"] is not None:
        sys.stdout = sys.stderr = open_log(Path(first["log"]), copy_to=2)
    return [_load_term(term) for term in first["terms"]]


def _load_term(asked: Mapping[str, Any]) -> Term:
    term = load_term(asked["fn"], name=asked["name"], weight=asked["weight"], options=asked["options"])
    known = term.max_score if asked["max_score"] is None else asked["max_score"]
    return replace(term, sources=asked["sources"], max_score=known)


def _describe(terms: Sequence[Term], source: str) -> dict[str, object]:
    """The largest score of the source's samples, the reference completion of the answer "{answer}", and the scores that
    are expected of it.
    """
    terms = [term for term in terms if term.scores(source)]
    return {
        "max_score": max_score(terms),
        "reference_completion": reference_completion(terms, "{answer}"),
        "expected": expected_scores(terms),
    }


def _answer(terms: Sequence[Term], request: Mapping[str, Any]) -> dict[str, object]:
    sample = Sample(**request["sample"])
    error = reward = strict = lenient = None
    values: dict[str, float] = {}
    try:
        reward, values = score(terms, sample)
        if request["evaluate"]:
            strict, lenient = correctness(terms, sample)
    except RewardError as raised:
        error, reward, values = str(raised)[:MAX_ERROR], None, {}
    score_of_sample = {"reward": reward, "terms": values, "error": error, "strict": strict, "lenient": lenient}
    return {"id": request["id"], **score_of_sample}


def main() -> None:
    requests, answers = _private_streams()

    def send(message: Mapping[str, object]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    first = json.loads(requests.readline())
    try:
        terms = _start(first)
    except RewardError as error:
        send({"error": str(error)})
        return
    send({"ready": True, "sources": {source: _describe(terms, source) for source in first["sources"]}})
    sys.stderr.flush()
    _silence(2)
    process = os.getpid()
    for line in requests:
        answer = _answer(terms, json.loads(line))
        if os.getpid() != process:
            os._exit(0)  # a copy of this process that the reward forked and let return
        send(answer)


if __name__ == "__main__":
    main()
