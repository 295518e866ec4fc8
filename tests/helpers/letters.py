"""Rewards that tell nearly any two texts apart."""

import time

from rewards.sample import Sample


def score(sample: Sample) -> float:
    return sum(letter.isascii() for letter in sample.completion) / 6 + sample.tokens / 100


def slowly(sample: Sample) -> float:
    """A twentieth of a second, or, of one text in twenty, forever."""
    time.sleep(1e6 if sum(map(ord, sample.completion)) % 20 == 0 else 0.05)
    return score(sample)


def roughly(sample: Sample) -> float:
    """0 or 1, so that many groups are flat."""
    return float(sample.completion[:1].isalnum())
