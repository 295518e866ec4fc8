"""RolloutWorker: keeps an engine full and returns finished groups.

Knows the Engine protocol; knows neither vLLM, Ray nor rewards.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from actors.engines.base import Engine
from actors.types import Adapter, Completion, Group, Prompt, Purpose, Request, Sampling, Trajectory


@dataclass
class _InFlight:
    prompt: Prompt
    attempt: int
    size: int
    done: dict[int, Completion] = field(default_factory=dict)


@dataclass(frozen=True)
class RunProgress:
    """What a run of the engine brought: the keys of finished groups, how many tokens it sampled in how many seconds,
    and how often a sequence had to wait for room in the cache.
    """

    finished: list[tuple[Purpose, int]]
    tokens: int
    seconds: float
    preemptions: int


class RolloutWorker:
    """Samples completions of the dispatched prompts.

    The seed of a sample is a function of (run seed, prompt, sample): it does not matter which worker samples it, and
    when. `close` ends the engine if `owns_engine`.
    """

    def __init__(self, engine: Engine, *, seed: int, name: str = "rollout-0", owns_engine: bool = False) -> None:
        self._engine = engine
        self._owns_engine = owns_engine
        self._seed = seed
        self._name = name
        self._in_flight: dict[str, _InFlight] = {}
        self._finished: dict[tuple[Purpose, int], Group] = {}
        self._dispatched = 0

    @property
    def unfinished(self) -> int:
        """Sequences that the engine still has to finish."""
        return self._engine.unfinished

    def dispatch(self, prompts: Sequence[Prompt], sampling: Sampling, samples: int, attempt: int = 0) -> None:
        """Start a group of `samples` completions of each prompt."""
        for prompt in prompts:
            group_id = f"{self._dispatched}"
            self._dispatched += 1
            self._in_flight[group_id] = _InFlight(prompt, attempt, samples)
            seeds = [self._sample_seed(prompt, i) for i in range(samples)]
            settings = [replace(sampling, seed=seed) for seed in seeds]
            self._engine.submit([Request(f"{group_id}/{i}", prompt.token_ids, s) for i, s in enumerate(settings)])

    def run_engine(self, seconds: float = 0.25, groups: int = 1) -> RunProgress:
        """Sample until `groups` groups have finished, `seconds` have passed or nothing is left to do.

        Adapters are loaded between two runs.
        """
        start, tokens, preemptions = time.monotonic(), 0, self._engine.preemptions
        finished: list[tuple[Purpose, int]] = []
        while self._engine.unfinished and len(finished) < groups and time.monotonic() - start < seconds:
            completed, sampled = self._step()
            self._finished |= {group.prompt.key: group for group in completed}
            finished += [group.prompt.key for group in completed]
            tokens += sampled
        waited = self._engine.preemptions - preemptions
        return RunProgress(finished, tokens, time.monotonic() - start, waited)

    def pop_group(self, key: tuple[Purpose, int]) -> Group:
        """Return, once, a group that a run has reported as finished."""
        return self._finished.pop(key)

    def load_adapter(self, adapter: Adapter) -> int:
        """Sample from `adapter` from now on; unfinished sequences go on under it. Returns its version."""
        self._engine.load_adapter(adapter)
        return adapter.version

    def sleep(self) -> None:
        """Give the memory of the engine's cache to the learner of the same process; nothing may be unfinished."""
        self._engine.sleep()

    def wake(self) -> None:
        """Take that memory again."""
        self._engine.wake()

    def close(self) -> None:
        if self._owns_engine:
            self._engine.close()

    def _step(self) -> tuple[list[Group], int]:
        """One step of the engine: the groups that it completed, and the tokens of the completions that it finished."""
        groups, tokens = [], 0
        for completion in self._engine.step():
            tokens += len(completion.token_ids)
            group_id, _, sample = completion.request_id.partition("/")
            entry = self._in_flight[group_id]
            entry.done[int(sample)] = completion
            if len(entry.done) == entry.size:
                del self._in_flight[group_id]
                trajectories = tuple(
                    Trajectory.single_turn(entry.done[i], prefill=entry.prompt.prefill) for i in range(entry.size)
                )
                groups.append(Group(entry.prompt, trajectories, self._name, entry.attempt))
        return groups, tokens

    def _sample_seed(self, prompt: Prompt, sample: int) -> int:
        # Held-out prompts draw from negative numbers, apart from those of training.
        number = prompt.ordinal if prompt.purpose == "train" else -1 - prompt.ordinal
        digest = hashlib.sha256(f"{self._seed}:{number}:{sample}".encode()).digest()
        return int.from_bytes(digest[:7], "little")
