"""Stop texts: found where they end, also across tokens and within characters of several bytes."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from actors.engines.stop_strings import StopStrings
from conf.errors import UsageError


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        ("</a>", "x</a>y", "x</a>"),
        ("\n\n", "one\ntwo\n\nthree", "one\ntwo\n\n"),
        ("é", "caféx", "café"),
        ("So ", "So So", "So "),
        ("no", "never", "never"),
    ],
)
def test_a_completion_ends_with_the_token_that_completes_the_text(tokenizer: Any, stop: str, text: str, expected: str):
    stops = StopStrings((stop,), tokenizer)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = next((n for n in range(1, len(tokens) + 1) if stops.ends(tokens[:n])), len(tokens))
    assert tokenizer.decode(tokens[:count]).startswith(expected)
    assert tokenizer.decode(tokens[: count - 1]).find(stop) < 0
    assert stops.cut(tokenizer.decode(tokens[:count])) == expected


def test_the_first_of_several_texts_ends_the_answer(tokenizer: Any):
    assert StopStrings(("b", "ab"), tokenizer).cut("xab b") == "xab"


def test_special_tokens_stop_by_their_id(tokenizer: Any):
    stops = StopStrings((tokenizer.eos_token,), tokenizer)
    assert stops.token_ids == (tokenizer.eos_token_id,) and not stops.ends([tokenizer.eos_token_id])


def test_a_text_that_the_tokenizer_cannot_write_is_refused():
    class Lowercase:
        def __init__(self) -> None:
            self.added_tokens_decoder: dict[int, Any] = {}

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": list(text.lower().encode())}

        def decode(self, tokens: list[int], **_: object) -> str:
            return bytes(tokens).decode()

    stops: Any = Lowercase()
    with pytest.raises(UsageError, match=r"cannot write 'STOP' \(it writes 'stop'\)"):
        StopStrings(("STOP",), stops)
