"""Texts that end a completion, found in what was sampled. Knows the tokenizer; knows no engine."""

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from conf.errors import UsageError

REPLACEMENT = "\ufffd"  # what the bytes of a part of a character decode to
ANCHOR = "a"  # in front of a token, so that decoding keeps the token's leading space


class StopStrings:
    """Whether a completion ends with one of `texts`, which are not empty.

    A text that is one of the tokenizer's special tokens stops by its id, in `token_ids`: decoding drops it. Raises
    UsageError for a text that the tokenizer cannot write.
    """

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.token_ids = tuple(special[text] for text in texts if text in special)
        self._texts = tuple(text for text in texts if text not in special)
        for text in self._texts:
            written = self._decode(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
            if text not in written:
                raise UsageError(
                    f"sampling.stop: the model's tokenizer cannot write {text!r} (it writes {written!r}), so that no "
                    "answer would end with it"
                )
        # A token has at least one byte, but for the special ones, which are not decoded.
        self._window = max((len(text.encode()) for text in self._texts), default=0) + 4

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of the sampled tokens completes a stop text, which none before it did."""
        if not self._texts or token_ids[-1] not in self._completing:
            return False
        tail = self._decode(token_ids[-self._window :])
        return any(text in tail for text in self._texts)

    def cut(self, text: str) -> str:
        """The text of a completion up to the end of its first stop text; all of it if it has none."""
        ends = [position + len(stop) for stop in self._texts if (position := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    @cached_property
    def _completing(self) -> frozenset[int]:
        """The tokens that hold the last character of a stop text, or a part of a character: few of the vocabulary."""
        last = {text[-1] for text in self._texts} | {REPLACEMENT}
        (anchor,) = self._tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]  # type: ignore[misc]
        pairs = [[anchor, token] for token in range(len(self._tokenizer))]
        decoded = self._tokenizer.batch_decode(pairs, skip_special_tokens=True)
        return frozenset(token for token, text in enumerate(decoded) if not last.isdisjoint(text[len(ANCHOR) :]))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))
