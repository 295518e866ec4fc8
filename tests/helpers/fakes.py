"""Stand-ins that keep their interfaces' promises: EchoEngine samples without a model."""

import random
from collections.abc import Sequence

from actors.engines.base import SpanLog, check_adapter
from actors.types import Adapter, Completion, Request, VersionSpan

EOS = 1


class EchoEngine:
    """Completions of 1 to 6 tokens, a function of the request's seed alone; one token a step for each sequence."""

    def __init__(self, max_num_seqs: int = 8) -> None:
        self._max = max_num_seqs
        self._waiting: list[Request] = []
        self._running: dict[str, tuple[Request, list[int], list[int]]] = {}
        self._spans = SpanLog()
        self.version = 0

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting += requests

    @property
    def preemptions(self) -> int:
        return 0

    def partial(self) -> dict[str, list[int]]:
        return {name: done for name, (_, done, _) in self._running.items()}

    def load_adapter(self, adapter: Adapter) -> None:
        check_adapter(adapter)
        self._spans.close(self.version, {name: len(done) for name, (_, done, _) in self._running.items()})
        self.version = adapter.version

    def sleep(self) -> None:
        assert not self.unfinished

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def step(self) -> list[Completion]:
        while self._waiting and len(self._running) < self._max:
            request = self._waiting.pop(0)
            draw = random.Random(request.sampling.seed)
            plan = [draw.randrange(2, 60) for _ in range(draw.randrange(0, 6))] + [EOS]
            self._running[request.request_id] = (request, [], plan)
            self._spans.start(request.request_id)
        finished = []
        for name, (request, done, plan) in list(self._running.items()):
            done.append(plan[len(done)])
            if done[-1] == EOS or len(done) == request.sampling.max_tokens:
                del self._running[name]
                spans = self._spans.finish(name, self.version, len(done))
                finished.append(
                    Completion(
                        request_id=name,
                        token_ids=tuple(done),
                        logprobs=(-1.0,) * len(done),
                        text=" ".join(map(str, done)),
                        finish_reason="stop" if done[-1] == EOS else "length",
                        version_spans=tuple(VersionSpan(*span) for span in spans),
                    )
                )
        return finished
