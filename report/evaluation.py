"""What held-out completions say: accuracy with its confidence interval, beside the best constant answer."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actors.types import Group


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers, `strict` in the demanded form and `lenient` anywhere in the text.

    `low` and `high` bound `lenient` at 95 % (Wilson's interval with one observation a prompt, which is cautious where
    a prompt has several samples). Unscorable completions count as wrong and are counted in `unscorable`.
    """

    strict: float
    lenient: float
    low: float
    high: float
    reward: float | None
    prompts: int
    samples: int
    truncated: float
    mean_tokens: float
    unscorable: int


def accuracy(groups: Sequence[Group]) -> Accuracy:
    """Accuracy over groups of equal size."""
    scores = [score for group in groups for score in group.scores]
    completions = [completion for group in groups for completion in group.completions]
    lenient = sum(score.lenient or 0.0 for score in scores) / len(scores)
    rewards = [score.reward for score in scores if score.reward is not None]
    low, high = wilson(lenient, len(groups))
    return Accuracy(
        strict=sum(score.strict or 0.0 for score in scores) / len(scores),
        lenient=lenient, low=low, high=high,
        reward=sum(rewards) / len(rewards) if rewards else None,
        prompts=len(groups), samples=len(groups[0].scores),
        truncated=sum(c.finish_reason == "length" for c in completions) / len(completions),
        mean_tokens=sum(len(c.token_ids) for c in completions) / len(completions),
        unscorable=len(scores) - len(rewards),
    )  # fmt: skip


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share observed in `count` trials."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def best_constant(answers: Sequence[str | None]) -> tuple[str, float]:
    """The one answer that would be right most often, and how often."""
    known = [answer for answer in answers if answer is not None]
    if not known:
        return "", 0.0
    answer, count = Counter(known).most_common(1)[0]
    return answer, count / len(answers)


def record(
    step: int, greedy: Accuracy, sampled: Accuracy | None, constant: tuple[str, float], seconds: float
) -> dict[str, Any]:
    """One line of evaluations.jsonl."""
    return {
        "step": step, "greedy": asdict(greedy), "sampled": asdict(sampled) if sampled else None,
        "best_constant": {"answer": constant[0], "share": constant[1]}, "seconds": round(seconds, 3),
    }  # fmt: skip
