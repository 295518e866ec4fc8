"""The columns of a step's metrics that say what was rewarded. Knows rows of the replay."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rewards.variance import is_zero_variance

CONSTANT_TEXT_LENGTH = 200  # characters
MIN_GROUPS_FOR_CONSTANT = 4
TINY = 1e-9  # what rounding leaves of a variance of 0


def reward_columns(table: pa.Table) -> dict[str, object]:
    """What a step's rewards were, and what they depended on."""
    rewards: list[float] = []
    terms: dict[str, list[float]] = {}
    groups: dict[int, list[tuple[float, str]]] = {}
    columns = [table.column(name).to_pylist() for name in ("ordinal", "reward", "reward_terms", "text")]
    for ordinal, reward, values_of_terms, text in zip(*columns, strict=True):
        if reward is not None:
            rewards.append(reward)
            groups.setdefault(ordinal, []).append((reward, text))
            for name, value in values_of_terms:
                terms.setdefault(name, []).append(value)
    zero_variance = [is_zero_variance([reward for reward, _ in answers]) for answers in groups.values()]
    constant_share, constant_text = _constant_answer(list(groups.values()))
    return {
        "reward": mean(rewards),
        "reward_terms": {name: mean(values) for name, values in terms.items()},
        "constant_terms": {name: values[0] for name, values in terms.items() if min(values) == max(values)},
        "zero_variance_share": mean(zero_variance),
        "constant_share": constant_share,
        "constant_text": constant_text,
        "length_correlation": _length_correlation(table),
    }


def _constant_answer(groups: Sequence[Sequence[tuple[float, str]]]) -> tuple[float | None, str]:
    """The share of prompts for which one and the same text is a best answer, and that text without outer spaces.

    `groups` holds each prompt's rewards and texts, of which CONSTANT_TEXT_LENGTH characters are compared. (None, "")
    for fewer than MIN_GROUPS_FOR_CONSTANT prompts, which say nothing.
    """
    if len(groups) < MIN_GROUPS_FOR_CONSTANT:
        return None, ""
    texts: Counter[str] = Counter()
    for answers in groups:
        best = max(reward for reward, _ in answers)
        texts.update({text.strip()[:CONSTANT_TEXT_LENGTH] for reward, text in answers if reward == best})
    text, count = texts.most_common(1)[0]
    return count / len(groups), text


def _length_correlation(table: pa.Table) -> float | None:
    """Pearson's correlation, within groups, of a completion's reward and its number of sampled tokens: 1 if the reward
    grows in proportion to the length, -1 if it falls so. None where either does not vary.
    """
    is_scored = table.column("reward").is_valid().to_numpy()
    rewards_N = table.column("reward").fill_null(0.0).to_numpy()[is_scored]
    lengths = pc.list_value_length(table.column("behavior_logprobs"))  # type: ignore[attr-defined]
    lengths_N = lengths.to_numpy().astype(np.float64)[is_scored]
    _, groups_N = np.unique(table.column("ordinal").to_numpy()[is_scored], return_inverse=True)
    if not len(groups_N):
        return None
    sizes = np.bincount(groups_N)
    x_N, y_N = (values - (np.bincount(groups_N, values) / sizes)[groups_N] for values in (lengths_N, rewards_N))
    scale = np.sqrt((x_N @ x_N) * (y_N @ y_N))
    return float(x_N @ y_N / scale) if scale > TINY else None


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return sum(values) / len(values) if values else None
