"""Rewards for how a completion is written: its form and its length. Plain Python."""

import re
from itertools import pairwise

from rewards.sample import Sample

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
THINK_ANSWER = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)


def think_answer(sample: Sample) -> float:
    """1 if the whole text is one <think>...</think> and then one non-empty <answer>...</answer>, else 0."""
    match = THINK_ANSWER.fullmatch(sample.completion)
    counts = [sample.completion.count(tag) for tag in TAGS]
    return float(match is not None and counts == [1, 1, 1, 1] and bool(match["answer"].strip()))


def tags(sample: Sample) -> float:
    """The share of the four tags of `think_answer` that the text has exactly once."""
    return sum(sample.completion.count(tag) == 1 for tag in TAGS) / len(TAGS)


def tag_order(sample: Sample) -> float:
    """The share of the three pairs of neighboring tags of `think_answer` that the text has in order, each once."""
    places = [sample.completion.find(tag) if sample.completion.count(tag) == 1 else -1 for tag in TAGS]
    return sum(0 <= first < second for first, second in pairwise(places)) / (len(TAGS) - 1)


def inside_tags(sample: Sample) -> float:
    """The share of the text's characters, without outer spaces, that `think_answer` has a place for; 0 unless each of
    its tags is there once, and in order."""
    text = sample.completion.strip()
    if tag_order(sample) < 1:
        return 0.0
    think, think_end, answer, answer_end = (text.find(tag) for tag in TAGS)
    outside = text[:think], text[think_end + len(TAGS[1]) : answer], text[answer_end + len(TAGS[3]) :]
    return 1 - sum(len(part.strip()) for part in outside) / len(text)


def in_think_answer_tags(answer: str) -> str:
    """A completion with this answer for which `think_answer` is 1."""
    return f"<think>\nThe answer is known.\n</think>\n<answer>{answer}</answer>"


def soft_overlong(sample: Sample, *, buffer: int, maximum: int | None = None) -> float:
    """0 for a short text, falling linearly to -1 over the last `buffer` tokens before `maximum` (by default the most
    that the completion could have had), and -1 from there on.

    DAPO's soft overlong punishment (https://arxiv.org/abs/2503.14476, equation 13) as a term.
    """
    maximum = sample.max_tokens if maximum is None else maximum
    if not 0 < buffer <= maximum:
        raise ValueError(f"soft_overlong: buffer={buffer} must be over 0 and at most maximum={maximum}")
    return -min(1.0, max(0.0, (sample.tokens - (maximum - buffer)) / buffer))


def length(sample: Sample, *, target: int, maximum: int) -> float:
    """1 up to `target` tokens, then falling linearly to 0 at `maximum` tokens."""
    if maximum <= target:
        raise ValueError(f"length: maximum={maximum} must be over target={target}")
    return min(1.0, max(0.0, (maximum - sample.tokens) / (maximum - target)))
