"""A reward that tells completions apart and asks nothing of them: half of all texts are worth 1."""

import hashlib

from rewards.sample import Sample


def coin(sample: Sample) -> float:
    return float(hashlib.sha256(sample.completion.encode()).digest()[0] % 2)
