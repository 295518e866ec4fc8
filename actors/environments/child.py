"""The child process that environments live in: `python -m actors.environments.child`, in lines of JSON.

First line in: {"environment": "module:Class", "options": {...}, "schemas": [...] or null if they are not known yet,
"memory_bytes": n, "parent": pid, "log": file or null}; answer {"ready": true, "schemas": [...], "has_step": bool,
"has_reward": bool} or {"error": "..."}. Then a line for each request, {"id": n, "episode": m, "do": "reset", "row":
{...}} or "call" with "tool" and "arguments", "step" with "text", "reward", "end", or "ping". Its answer {"id": n,
"value": ...} or {"id": n, "error": "..."} comes whenever it is ready. Requests of different episodes run beside each
other, each in a thread; those of one episode come one after the other.
"""

import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from actors.environments.base import Done, Observation
from actors.environments.errors import EnvironmentRefused
from rewards.errors import RewardError, describe_error
from rewards.log import open_log
from rewards.process import bind_to_parent
from rewards.user_function import import_object

THREADS = 256
MAX_ERROR, MAX_TEXT = 500, 200_000  # characters


class Episodes:
    """The environments of the episodes that are under way. `make` makes one."""

    def __init__(self, make: Callable[[], Any], tools: frozenset[str]) -> None:
        self._make = make
        self._tools = tools
        self._environments: dict[int, Any] = {}

    def carry_out(self, request: Mapping[str, Any]) -> object:
        """The value that answers a request."""
        number, do = request["episode"], request["do"]
        if do == "ping":
            return None
        if do == "reset":
            environment = self._environments[number] = self._make()
            return _messages(environment.reset(**request["row"]))
        if do == "end":
            environment = self._environments.pop(number, None)
            return getattr(environment, "close", lambda: None)()
        environment = self._environments[number]
        if do == "call":
            if request["tool"] not in self._tools:
                raise LookupError(f"no tool {request['tool']}")
            return _text(getattr(environment, request["tool"])(**request["arguments"]))
        if do == "step":
            return _observation(environment.step(request["text"]))
        reward = getattr(environment, "get_reward", None) or environment.reward
        return _reward(reward())


def _messages(value: object) -> object:
    """What `reset` returned: nothing, a text, or messages with a role and a content each."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        return value
    raise TypeError(f"reset returned {type(value).__name__}; return None, a text or a list of messages")


def _text(value: object) -> str:
    """What a tool returned, as the model reads it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:MAX_TEXT]


def _observation(value: object) -> dict[str, object]:
    if isinstance(value, str):
        value = Observation(value)
    if not isinstance(value, (Observation, Done)):
        raise TypeError(f"step returned {type(value).__name__}; return a text, an Observation or Done")
    return {"text": value.text[:MAX_TEXT], "done": isinstance(value, Done)}


def _reward(value: object) -> float | None:
    if value is None:
        return None
    number = float(value)  # type: ignore[arg-type] - what is no number is the user's error, and told as such
    if number != number or abs(number) == float("inf"):
        raise ValueError(f"the reward is {number}")
    return number


def _private_streams() -> tuple[TextIO, TextIO]:
    """Streams to the parent on descriptors that an environment does not know; 0 and 1 become /dev/null."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    os.close(null)
    return requests, answers


def _start(first: Mapping[str, Any]) -> tuple[Episodes, dict[str, object]]:
    bind_to_parent(first["parent"])
    resource.setrlimit(resource.RLIMIT_DATA, (first["memory_bytes"], first["memory_bytes"]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    if first["log"] is not None:
        sys.stdout = sys.stderr = open_log(Path(first["log"]), copy_to=2)
    name, options = first["environment"], first["options"]
    try:
        environment = import_object(name)
    except Exception as error:
        raise EnvironmentRefused(f"environment={name} does not import: {describe_error(error)}") from error
    if not isinstance(environment, type) or not callable(getattr(environment, "reset", None)):
        raise EnvironmentRefused(f"environment={name} is no class with a method reset")
    schemas = first["schemas"]
    if schemas is None:
        from actors.environments.tools import tool_schemas  # which takes seconds

        schemas = tool_schemas(environment)
    has_step = callable(getattr(environment, "step", None))
    if has_step == bool(schemas):
        what = "both a method step and tools" if schemas else "neither a method step nor a public method, as a tool"
        raise EnvironmentRefused(f"environment={name} has {what}; it needs one of them")
    try:
        environment(**options)
    except Exception as error:
        raise EnvironmentRefused(f"environment={name} cannot be made with {options}: {error!r}") from error
    tools = frozenset(schema["function"]["name"] for schema in schemas)
    has_reward = any(callable(getattr(environment, method, None)) for method in ("get_reward", "reward"))
    ready = {"ready": True, "schemas": schemas, "has_step": has_step, "has_reward": has_reward}
    return Episodes(lambda: environment(**options), tools), ready


def main() -> None:
    requests, answers = _private_streams()
    lock = threading.Lock()

    def send(message: Mapping[str, object]) -> None:
        with lock:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    first = json.loads(requests.readline())
    try:
        episodes, ready = _start(first)
    except (EnvironmentRefused, RewardError) as error:
        send({"error": str(error)})
        return
    send(ready)

    def answer(request: Mapping[str, Any]) -> None:
        try:
            send({"id": request["id"], "value": episodes.carry_out(request)})
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's tool, which must not end the others
            send({"id": request["id"], "error": f"{type(error).__name__}: {error}"[:MAX_ERROR]})

    pool = ThreadPoolExecutor(THREADS)
    for line in requests:
        request = json.loads(line)
        if request["do"] == "ping":  # shows that the process is not stuck, whatever its threads do
            answer(request)
        else:
            pool.submit(answer, request)
    os._exit(0)  # the parent has closed the pipe; what still runs is of no use


if __name__ == "__main__":
    main()
