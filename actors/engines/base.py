"""What a rollout engine must do, and what it is built from. Knows no engine; loads neither torch nor transformers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.models.adapter import AdapterError as AdapterError  # the errors of an engine, in one place
from actors.models.adapter import check_adapter as check_adapter
from actors.types import Adapter, Completion, Request
from conf.errors import UsageError


class EngineUnavailable(UsageError):
    """An engine that cannot run on this machine; the message says why."""


class Diverged(UsageError):
    """Log-probabilities or gradients are not finite: the run has diverged."""


class Engine(Protocol):
    """Samples completions with continuous batching.

    Requests may be submitted at any time. `load_adapter` may be called between any two steps: unfinished sequences
    continue under the new adapter, which their `version_spans` record.
    """

    @property
    def unfinished(self) -> int:
        """Requests that were submitted and have not been returned."""
        ...

    @property
    def preemptions(self) -> int:
        """How often a running sequence had to wait, because the cache was full, since the engine began."""
        ...

    def submit(self, requests: Sequence[Request]) -> None: ...

    def step(self) -> list[Completion]:
        """Advance every running sequence by about one token; return the completions that finished."""
        ...

    def partial(self) -> Mapping[str, Sequence[int]]:
        """The tokens that each running request has sampled so far, for those who watch."""
        ...

    def load_adapter(self, adapter: Adapter) -> None:
        """Sample from `adapter` from now on. Raises AdapterError and keeps the old one if it does not fit."""
        ...

    def sleep(self) -> None:
        """Free the memory of the key-value cache until `wake`; no request may be unfinished or submitted until then."""
        ...

    def wake(self) -> None:
        """Take the memory of the key-value cache again."""
        ...

    def close(self) -> None:
        """End the engine's other processes; it cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class EngineOptions:
    """What any engine is built from; every value is decided. An engine ignores what it has no use for.

    `revision` is None for the hub's default. `threads` are those of a CPU. `kv_cache_bytes` is the size of the
    key-value cache, and `max_num_batched_tokens` the tokens of one step, of each device. `per_request_seeds` makes the
    samples of a request depend on its seed alone. `keep_16bit` names the linear layers that nf4 leaves alone.
    `share_weights` and `sleep_mode` say whether `base_weights` and `sleep` will be called. `embedding_on_host` moves
    the embedding, which must not be the head, to the host's memory. `quantized_scales`: the scales of nf4 stay a byte
    each, which saves 0.37 bits a weight and costs speed. `tensor_parallel_size` is the number of devices
    that every layer is sharded over, in one process each.
    """

    model_path: str
    revision: str | None
    trust_remote_code: bool
    dtype: str
    quantization: str
    device: str
    threads: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_bytes: int
    enforce_eager: bool
    per_request_seeds: bool
    seed: int
    kv_cache_dtype: str = "auto"
    keep_16bit: tuple[str, ...] = ()
    share_weights: bool = False
    sleep_mode: bool = False
    embedding_on_host: bool = False
    quantized_scales: bool = False
    tensor_parallel_size: int = 1


def check_sampled(logprobs: Sequence[float], version: int) -> None:
    """Raises Diverged if a sampled token's log-probability is not finite."""
    if not all(map(math.isfinite, logprobs)):
        raise Diverged(
            f"adapter version {version} makes the model's probabilities NaN: the run has diverged. Continue from the "
            "last checkpoint with a lower learner.learning_rate"
        )


class SpanLog:
    """Counts, for each running request, the tokens that each adapter version sampled."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[int, int]]] = {}

    def start(self, request_id: str) -> None:
        self._spans[request_id] = []

    def close(self, version: int, sampled: dict[str, int]) -> None:
        """Version `version` ends; `sampled` is the number of tokens that each running request has so far."""
        for request_id, count in sampled.items():
            spans = self._spans[request_id]
            new = count - sum(n for _, n in spans)
            if new > 0:
                spans.append((version, new))

    def finish(self, request_id: str, version: int, count: int) -> list[tuple[int, int]]:
        """The (version, count) pairs of a finished request of `count` tokens."""
        self.close(version, {request_id: count})
        return self._spans.pop(request_id)
