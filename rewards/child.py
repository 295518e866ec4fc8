"""The child process that scores: `python -m rewards.child`, spoken to in lines of JSON by actors/reward.py.

First line in: {"terms": [...], "memory_bytes": n, "parent": pid}; answer {"ready": true} or {"error": "..."}. Then a
line per sample, {"sample": {...}, "evaluate": bool}, answered in order. JSON, not pickle: what a reward sends back is
never executed. The reward's own output goes nowhere, so it cannot fill a pipe or a disk.
"""

import json
import os
import resource
import signal
from typing import Any, TextIO

from rewards.process import bind_to_parent
from rewards.registry import RewardError, Term, correctness, full_marks, gold_completion, load_term, score
from rewards.sample import Sample


def _private_streams() -> tuple[TextIO, TextIO]:
    """Streams to the parent on descriptors that a reward does not know; 0, 1 and 2 become /dev/null."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    return requests, answers


def _answer(terms: list[Term], request: dict[str, Any]) -> dict[str, Any]:
    sample = Sample(**request["sample"])
    try:
        reward, values = score(terms, sample)
        strict, lenient = correctness(terms, sample) if request["evaluate"] else (None, None)
    except RewardError as error:
        return {"reward": None, "terms": {}, "error": str(error)[:500], "strict": None, "lenient": None}
    return {"reward": reward, "terms": values, "error": None, "strict": strict, "lenient": lenient}


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
        terms = [load_term(t["fn"], weight=t["weight"], options=t["options"]) for t in first["terms"]]
    except RewardError as error:
        send({"error": str(error)})
        return
    send({"ready": True, "full_marks": full_marks(terms), "gold": gold_completion(terms, "{answer}")})
    for line in requests:
        send(_answer(terms, json.loads(line)))


if __name__ == "__main__":
    main()
