"""A reward that tells nearly any two texts apart."""

from rewards.sample import Sample


def score(sample: Sample) -> float:
    return sum(letter.isascii() for letter in sample.completion) / 6 + sample.tokens / 100
