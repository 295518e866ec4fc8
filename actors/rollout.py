"""RolloutWorker: keeps an engine full and returns finished groups.

Knows the Engine protocol; knows neither vLLM, Ray nor rewards.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.engine import Engine
from actors.types import Adapter, Completion, Group, Prompt, Request, Sampling


@dataclass
class _Open:
    prompt: Prompt
    attempt: int
    size: int
    done: dict[int, Completion] = field(default_factory=dict)


@dataclass(frozen=True)
class Pumped:
    """What one pump brought: the ordinals of finished groups, and how many tokens were sampled in how many seconds."""

    finished: list[int]
    tokens: int
    seconds: float


class RolloutWorker:
    """Samples completions of the dispatched prompts.

    The seed of a sample is a function of (run seed, ordinal, sample): who samples it, and when, does not matter. An engine
    that is the worker's own ends with it.
    """

    def __init__(self, engine: Engine, *, seed: int, name: str = "rollout-0", is_own: bool = False) -> None:
        self._engine = engine
        self._is_own = is_own
        self._seed = seed
        self._name = name
        self._open: dict[str, _Open] = {}
        self._finished: dict[int, Group] = {}
        self._serial = 0

    @property
    def unfinished(self) -> int:
        """Sequences that the engine still has to finish."""
        return self._engine.unfinished

    def dispatch(self, prompts: Sequence[Prompt], sampling: Sampling, samples: int, attempt: int = 0) -> None:
        """Start a group of `samples` completions of each prompt."""
        for prompt in prompts:
            key = f"{self._serial}"
            self._serial += 1
            self._open[key] = _Open(prompt, attempt, samples)
            self._engine.submit(
                [
                    Request(
                        request_id=f"{key}/{i}",
                        prompt_token_ids=prompt.token_ids,
                        sampling=Sampling(
                            sampling.temperature, sampling.max_tokens, self._sample_seed(prompt.ordinal, i)
                        ),
                    )
                    for i in range(samples)
                ]
            )

    def pump(self, seconds: float = 0.25, groups: int = 1) -> Pumped:
        """Sample until `groups` groups have finished, `seconds` have passed or nothing is left to do. An adapter that comes
        meanwhile lands after it."""
        start, tokens, finished = time.monotonic(), 0, []
        while self._engine.unfinished and len(finished) < groups and time.monotonic() - start < seconds:
            found, count = self._step()
            self._finished |= {group.prompt.ordinal: group for group in found}
            finished += [group.prompt.ordinal for group in found]
            tokens += count
        return Pumped(finished, tokens, time.monotonic() - start)

    def collect(self, ordinal: int) -> Group:
        """Hand over a group that a pump said is finished."""
        return self._finished.pop(ordinal)

    def load_adapter(self, adapter: Adapter) -> None:
        """Sample from `adapter` from now on; unfinished sequences go on under it."""
        self._engine.load_adapter(adapter)

    def release_cache(self) -> None:
        """Lend the engine's cache memory to the learner of the same process; nothing may be unfinished."""
        self._engine.release_cache()

    def restore_cache(self) -> None:
        """Take it back."""
        self._engine.restore_cache()

    def close(self) -> None:
        """End the engine, unless others use it, too."""
        if self._is_own:
            self._engine.close()

    def _step(self) -> tuple[list[Group], int]:
        finished, tokens = [], 0
        for completion in self._engine.step():
            tokens += len(completion.token_ids)
            key, _, sample = completion.request_id.partition("/")
            group = self._open[key]
            group.done[int(sample)] = completion
            if len(group.done) == group.size:
                del self._open[key]
                completions = tuple(group.done[i] for i in range(group.size))
                finished.append(Group(group.prompt, completions, self._name, group.attempt))
        return finished, tokens

    def _sample_seed(self, ordinal: int, sample: int) -> int:
        digest = hashlib.sha256(f"{self._seed}:{ordinal}:{sample}".encode()).digest()
        return int.from_bytes(digest[:7], "little")
