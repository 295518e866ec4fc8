"""What chat templates put between turns: those of the families that people train, as TRL ships them."""

from importlib.resources import files

import pytest
from transformers import PreTrainedTokenizerFast

from actors.data.continuation import appended_tokens, continuation
from actors.data.readers import DataError
from actors.data.rendering import Rendering
from benchmarks.shapes import byte_tokenizer

QUESTION = [{"role": "user", "content": "Guess a number."}]
ASKED = [{"role": "system", "content": "You play."}, *QUESTION]
CHATML = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LLAMA = "<|eot_id|><|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
# As TRL names them: what follows an answer when the user says "Higher.", and when a tool does.
USER = {
    "qwen2_5": CHATML.format("Higher."),
    "qwen3": CHATML.format("Higher."),
    "llama3": LLAMA.format("user", "Higher."),
    "llama3_1": LLAMA.format("user", "Higher."),
    "gemma3": "<end_of_turn>\n<start_of_turn>user\nHigher.<end_of_turn>\n<start_of_turn>model\n",
    "phi3": "<|end|>\n<|user|>\nHigher.<|end|>\n<|assistant|>\n",
}
TOOL = {
    "qwen2_5": CHATML.format("<tool_response>\nHigher.\n</tool_response>"),
    "qwen3": CHATML.format("<tool_response>\nHigher.\n</tool_response>"),
    "llama3_1": LLAMA.format("ipython", '"Higher."'),
}


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(258)
    tokenizer.chat_template = template
    return tokenizer


def template_of(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text()


@pytest.mark.parametrize("name", USER)
@pytest.mark.parametrize("before", [QUESTION, ASKED])
def test_what_a_user_says_next(name: str, before: list[dict[str, str]]):
    behind = [{"role": "user", "content": "Higher."}]
    text = continuation(Rendering(), tokenizer_with(template_of(name)), before=before, behind=behind)
    assert text.rstrip("\n") == USER[name].rstrip("\n")


@pytest.mark.parametrize("name", TOOL)
def test_what_a_tool_gives(name: str):
    behind = [{"role": "tool", "name": "compare", "content": "Higher."}]
    text = continuation(Rendering(), tokenizer_with(template_of(name)), before=ASKED, behind=behind)
    assert text.rstrip("\n") == TOOL[name].rstrip("\n")


def test_a_template_that_wants_a_call_before_a_result_gets_one():
    """Mistral's way: results carry the id of their call, and follow it."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}{% if not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}"
        "{% endif %}[RESULT]{{ m.tool_call_id }} {{ m.content }}[/RESULT]"
        "{% elif m.tool_calls %}[CALLS]{{ m.tool_calls[0].function.name }}</s>{% else %}{{ m.content }}</s>{% endif %}"
        "{% endfor %}"
    )
    behind = [{"role": "tool", "name": "compare", "content": "Higher."}]
    text = continuation(Rendering(), tokenizer_with(template), before=QUESTION, behind=behind)
    assert text == "</s>[RESULT]epiphany0 Higher.[/RESULT]"


def test_templates_that_cannot_go_on_are_refused():
    behind = [{"role": "user", "content": "Higher."}]
    forgetful = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="leaves out earlier answers"):
        continuation(Rendering(), tokenizer_with(forgetful), before=QUESTION, behind=behind)
    with pytest.raises(DataError, match="refuses"):
        tool = [{"role": "tool", "name": "compare", "content": "Higher."}]
        continuation(Rendering(), tokenizer_with(template_of("gemma3")), before=QUESTION, behind=tool)


def test_the_sampled_end_of_a_turn_is_not_repeated():
    tokenizer = tokenizer_with("")
    (end,) = tokenizer("</s>", add_special_tokens=False)["input_ids"]
    (other,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    appended = appended_tokens("</s>\nuser: Higher.\n", tokenizer, last_sampled=end)
    assert tokenizer.decode(list(appended)) == "\nuser: Higher.\n"
    assert appended_tokens("</s>\nuser: Higher.\n", tokenizer, last_sampled=other) == (end, *appended)
