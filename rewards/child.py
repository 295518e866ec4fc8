"""The child process that scores: `python -m rewards.child`, spoken to in lines of JSON by actors/reward.py.

First line in: {"terms": [...], "memory_bytes": n, "parent": pid}; answer {"ready": true} or {"error": "..."}. Then one
line for each sample, {"id": n, "sample": {...}, "evaluate": bool}; its answer carries the same id. JSON, not pickle: what
a reward sends back is never executed. The reward's own output goes nowhere, so it cannot fill a pipe or a disk. Errors
of the start go to stderr, where the parent finds them.
"""

import json
import os
import resource
import signal
import sys
from typing import Any, TextIO

from rewards.process import bind_to_parent
from rewards.registry import RewardError, Term, correctness, full_marks, gold_completion, load_term, score
from rewards.sample import Sample


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


def _answer(terms: list[Term], request: dict[str, Any]) -> dict[str, Any]:
    sample = Sample(**request["sample"])
    error = reward = strict = lenient = None
    values: dict[str, float] = {}
    try:
        reward, values = score(terms, sample)
        if request["evaluate"]:
            strict, lenient = correctness(terms, sample)
    except RewardError as raised:
        error, reward, values = str(raised)[:500], None, {}
    score_of_sample = {"reward": reward, "terms": values, "error": error, "strict": strict, "lenient": lenient}
    return {"id": request["id"], **score_of_sample}


def main() -> None:
    requests, answers = _private_streams()

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    first = json.loads(requests.readline())
    bind_to_parent(first["parent"])
    resource.setrlimit(resource.RLIMIT_DATA, (first["memory_bytes"], first["memory_bytes"]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    try:
        terms = [load_term(t["fn"], name=t["name"], weight=t["weight"], options=t["options"]) for t in first["terms"]]
    except RewardError as error:
        send({"error": str(error)})
        return
    send({"ready": True, "full_marks": full_marks(terms), "gold": gold_completion(terms, "{answer}")})
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
