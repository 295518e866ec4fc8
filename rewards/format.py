"""Rewards for how a completion is written: its form and its length. Plain Python."""

import re

from rewards.sample import Sample

THINK_ANSWER = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)


def think_answer(sample: Sample) -> float:
    """1 if the whole text is one <think>...</think> and then one non-empty <answer>...</answer>, else 0."""
    match = THINK_ANSWER.fullmatch(sample.completion)
    tags = [sample.completion.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    return float(match is not None and tags == [1, 1, 1, 1] and bool(match["answer"].strip()))


def in_think_answer_tags(answer: str) -> str:
    """A completion with this answer for which `think_answer` is 1."""
    return f"<think>\nThe answer is known.\n</think>\n<answer>{answer}</answer>"


def length(sample: Sample, *, target: int, maximum: int) -> float:
    """1 up to `target` tokens, then falling linearly to 0 at `maximum` tokens."""
    if maximum <= target:
        raise ValueError(f"length: maximum={maximum} must be over target={target}")
    return min(1.0, max(0.0, (maximum - sample.tokens) / (maximum - target)))
