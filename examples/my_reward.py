"""Reward functions of one's own, in the three forms that a term of the reward may have.

    python launch.py run.name=mine data.source=rows.jsonl sampling.max_tokens=64 \\
        'reward.terms=[{fn: examples/my_reward.py:contains_answer}, {fn: examples/my_reward.py:brief, weight: 0.2}]'

rows.jsonl has a JSON object in each line: {"question": "...", "answer": "...", "keywords": ["...", "..."]}. The reward
is the weighted sum of the terms. A function runs in a process of its own with a deadline and a memory limit: if it
raises or hangs, its sample is left out and counted, and the run goes on. rewards/sample.py lists what a Sample holds.
"""

import re

from rewards.sample import Sample


def contains_answer(sample: Sample) -> float | None:
    """1 if the reference answer is a word of the completion. None: the term does not apply to this sample."""
    if sample.answer is None:
        return None
    return float(re.search(rf"\b{re.escape(sample.answer)}\b", sample.completion) is not None)


def brief(sample: Sample, *, target: int = 32) -> float:
    """1 up to `target` tokens, then less. `target` comes from the settings: {fn: ..., options: {target: 16}}."""
    return min(1.0, target / max(sample.tokens, 1))


def mentions_keywords(sample: Sample) -> float | None:
    """The share of the row's keywords in the completion. `metadata` is the row of the data, by column."""
    keywords = sample.metadata.get("keywords", [])
    if not keywords:
        return None
    return sum(word.lower() in sample.completion.lower() for word in keywords) / len(keywords)


def trl_no_apology(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """TRL's signature works unchanged: lists in, a list out; `columns` are those of the data."""
    return [0.0 if "sorry" in completion.lower() else 1.0 for completion in completions]
