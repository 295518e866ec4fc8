"""What an environment is to its users: a class of their own. Plain Python, for the process that environments live in.

    class Guess:
        def reset(self, number: int, **row) -> str | None: ...     # what the first message says, too
        def step(self, text: str) -> str | Observation | Done: ...  # either this, after each answer,
        def compare(self, guess: int) -> str: ...                   # or public methods, which are tools
        def get_reward(self) -> float | None: ...

Classes that are written for TRL's `environment_factory` work as they are.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Observation:
    """What the environment says to an answer; the episode goes on."""

    text: str


@dataclass(frozen=True)
class Done:
    """The episode ends with this answer. `text` is for whoever reads the run; the model does not see it."""

    text: str = ""
