"""A model's tokenizer, its chat template, and the tokens that end a completion. Loads no weights."""

import contextlib
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from actors.models.source import ModelError, ModelSource

# For base models without a chat template: the question, then a place for the answer.
BASE_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}Question: {{ m['content'] }}\n"
    "{% else %}Answer: {{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


def load_tokenizer(
    source: ModelSource, *, chat_template: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer, with `chat_template` (text or a file), its own template, or BASE_TEMPLATE, in that order.

    Raises ModelError if the model has no tokenizer, or `chat_template` names a file that is not there.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raises Exception itself for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model.path: {source.path} holds no tokenizer that can be read ({reason}); copy tokenizer.json and "
            "tokenizer_config.json of the model there"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = BASE_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _template_text(chat_template: str) -> str:
    if "{" in chat_template:
        return chat_template
    file = Path(chat_template).expanduser()
    if not file.is_file():
        raise ModelError(f"model.chat_template: {chat_template} is neither a Jinja template nor a file")
    return file.read_text()


def end_of_sequence_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation config.

    Raises ModelError if there is none.
    """
    listed: int | list[int] | None = None
    with contextlib.suppress(OSError):
        listed = GenerationConfig.from_pretrained(source.path, revision=source.revision or "main").eos_token_id
    ids = set(listed if isinstance(listed, list) else [] if listed is None else [listed])
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))  # type: ignore[arg-type]
    if not ids:
        raise ModelError(f"model.path: the tokenizer of {source.path} has no end-of-sequence token")
    return tuple(sorted(ids))
