"""Statistics of an evaluation: pass@k, the majority's answer, and two models on the same problems. Pure functions."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959964  # two-sided 95 % of the standard normal distribution


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share observed in `count` trials."""
    z = Z_95
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, center - half), min(1.0, center + half)


def normal_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of at least two independent values, by the normal approximation."""
    half = Z_95 * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that of `k` samples one at least is right, estimated without bias from `samples` of which `right`
    are (arXiv:2107.03374)."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[str | None], right: Sequence[float]) -> float:
    """How right the most frequent answer is: the mean of `right` over the samples that gave it, over the tied ones if
    several are as frequent. A sample without an answer (None) has no vote; 0.0 if none has one.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    tied = [name for name, count in counts.items() if count == most]
    scores = [statistics.fmean(r for a, r in zip(answers, right, strict=True) if a == name) for name in tied]
    return statistics.fmean(scores)


@dataclass(frozen=True)
class Paired:
    """One model against another on the same problems: the mean difference of their scores with its 95 % interval, the
    problems (by index) on which it does better (`won`) and worse (`lost`), and the two-sided probability `p` of so
    unequal a split if both were as good (the sign test; McNemar's exact test for right and wrong).
    """

    difference: float
    low: float
    high: float
    won: list[int]
    lost: list[int]
    p: float


def paired(scores: Sequence[float], others: Sequence[float]) -> Paired:
    """`scores` of a model against those of another on the same two problems or more."""
    differences = [score - other for score, other in zip(scores, others, strict=True)]
    won = [i for i, difference in enumerate(differences) if difference > 0]
    lost = [i for i, difference in enumerate(differences) if difference < 0]
    low, high = normal_interval(differences)
    return Paired(statistics.fmean(differences), low, high, won, lost, sign_test(len(won), len(lost)))


def sign_test(won: int, lost: int) -> float:
    """The probability of a split at least as unequal as this one in either direction, if both sides are as likely."""
    count, fewer = won + lost, min(won, lost)
    tail = sum(math.comb(count, i) for i in range(fewer + 1)) / 2**count
    return min(1.0, 2 * tail)
