"""How many tokens a micro-batch may have: halved, once, when memory runs out. Knows torch; knows no learner."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from conf.errors import UsageError

R = TypeVar("R")


class OutOfMemory(UsageError):
    """The learner's step does not fit on the card; the message says what to change."""


class MicroBatchLimit:
    """At most `tokens` per micro-batch. Unless they `may_halve`, memory must not run out even once: ranks in lockstep
    cannot repeat a step one by one.
    """

    def __init__(self, tokens: int, *, may_halve: bool = True) -> None:
        self.tokens = tokens
        self._may_halve = may_halve
        self._has_halved = False

    def retry(self, call: Callable[[], R]) -> R:
        """What `call` returns, made again with half the tokens if memory runs out. Raises OutOfMemory the second
        time.
        """
        while True:
            try:
                return call()
            except torch.OutOfMemoryError as error:
                self._halve(error)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        if self._has_halved or not self._may_halve:
            why = "" if self._may_halve else ", and learners in lockstep cannot retry"
            raise OutOfMemory(
                f"out of memory with {self.tokens} tokens per micro-batch{why}; set hardware.vram_gib to what this "
                "process may take, learner.offload_activations=true, or a smaller sampling.max_tokens"
            ) from error
        self._has_halved = True
        self.tokens = max(1, self.tokens // 2)
        warnings.warn(
            f"out of memory: the step is retried, and all later ones run, with {self.tokens} tokens per micro-batch",
            stacklevel=4,
        )
