"""Rewards for the wording of a completion: spelling, language, repetition, and how near it is to the reference.

Plain Python. The libraries are imported by the terms that need them.
"""

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from rewards.correctness import folded, marked_answer
from rewards.sample import Sample

if TYPE_CHECKING:
    from spellchecker import SpellChecker

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
NO_WORDS = re.compile(r"<[^<>]*>|\\[a-zA-Z]+|`[^`]*`|https?://\S+")  # tags, TeX's commands, code, addresses
MIN_LETTERS = 20  # for a guess of the language
METHODS = ("ratio", "partial_ratio", "token_sort_ratio", "token_set_ratio")


def _prose(text: str) -> str:
    return NO_WORDS.sub(" ", text)


def spelling(sample: Sample, *, language: str = "en", penalty: float = 0.1) -> float:
    """1 less `penalty` for each different misspelt word, at least 0.

    By pyspellchecker's word list of `language`. Words with a capital letter do not count, since names are in no list;
    nor do tags, code and TeX's commands. Raises ValueError for a language without a list.
    """
    words = {word.replace("’", "'") for word in WORD.findall(_prose(sample.completion)) if word.islower()}
    return max(0.0, 1 - penalty * len(_speller(language).unknown(words)))


@functools.cache
def _speller(language: str) -> "SpellChecker":
    from spellchecker import SpellChecker

    try:
        return SpellChecker(language=language)
    except ValueError as error:
        raise ValueError(f"spelling: there is no word list of language={language!r}") from error


def language(sample: Sample, *, language: str) -> float | None:
    """1 if the completion is written in `language` (a code such as "en" or "zh", by py3langid), else 0.

    None for fewer than MIN_LETTERS letters, which tell too little. Raises ValueError for a language that is not known.
    """
    text = _prose(sample.completion)
    if sum(map(str.isalpha, text)) < MIN_LETTERS:
        return None
    from py3langid import classify

    if language not in _languages():
        raise ValueError(f"language: {language!r} is none of {', '.join(sorted(_languages()))}")
    return float(classify(text)[0] == language)


@functools.cache
def _languages() -> frozenset[str]:
    from py3langid import rank

    return frozenset(code for code, _ in rank(""))


def repetition(sample: Sample, *, words: int = 3) -> float:
    """The share of the completion's runs of `words` words that are different from each other; 1 for a shorter text.

    Of "a b a b a", runs of two words are "a b", "b a", "a b", "b a": 2 of 4 are different, which gives 0.5.
    """
    if words < 1:
        raise ValueError(f"repetition: words={words} must be at least 1")
    said = sample.completion.casefold().split()
    runs = [tuple(said[i : i + words]) for i in range(len(said) - words + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def similarity(sample: Sample, *, method: str = "ratio") -> float | None:
    """How near the marked answer, else the whole text, is to the nearest reference answer: 0 to 1, by rapidfuzz.

    `ratio` is 2 * (characters in common, in order) / (characters of both); the other METHODS are described in
    rapidfuzz.fuzz. Case and spacing do not count. None without a reference.
    """
    if method not in METHODS:
        raise ValueError(f"similarity: method={method!r} is none of {', '.join(METHODS)}")
    from rapidfuzz import fuzz

    compare: Callable[[str, str], float] = getattr(fuzz, method)
    marked = marked_answer(sample.completion)
    text = folded(sample.completion if marked is None else marked)
    return max((compare(text, folded(answer)) / 100 for answer in sample.answers), default=None)
