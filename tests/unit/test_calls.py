"""Tool calls as models write them, and as they write them wrong."""

import json
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.environments.calls import FORMS, Call, CallError, form_of, parse_calls

ADD = Call("add", {"a": 1, "b": [2.5, "x"]})
BODY = json.dumps({"name": "add", "arguments": {"a": 1, "b": [2.5, "x"]}})


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        ("hermes", f"I add.\n<tool_call>\n{BODY}\n</tool_call>", [ADD]),
        ("hermes", f"<tool_call>{BODY}</tool_call> and <tool_call>{BODY}</tool_call>", [ADD, ADD]),
        ("hermes", "The answer is 4.", []),
        ("tags", f"<tool>{BODY}</tool>", [ADD]),
        (
            "qwen_xml",
            "<tool_call>\n<function=run>\n<parameter=code>\nprint('<b>')\nx = 1\n</parameter>\n<parameter=n>\n3\n"
            "</parameter>\n</function>\n</tool_call>",
            [Call("run", {"code": "print('<b>')\nx = 1", "n": "3"}, is_text=True)],
        ),
        ("qwen_xml", "<tool_call><function=now></function></tool_call>", [Call("now", {}, is_text=True)]),
        ("llama3", BODY.replace("arguments", "parameters"), [ADD]),
        ("llama3", "<|python_tag|>" + BODY.replace("arguments", "parameters") + "<|eom_id|>", [ADD]),
        ("llama3", "No call: {", []),
        ("mistral", f"[TOOL_CALLS] [{BODY}, {BODY}]</s>", [ADD, ADD]),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1, "b": [2.5, "x"]}[TOOL_CALLS]now[ARGS]{}', [ADD, Call("now", {})]),
        ("mistral", "Plain.", []),
    ],
)
def test_calls_are_read(form: str, text: str, calls: list[Call]):
    assert parse_calls(text, form) == calls


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("hermes", "<tool_call>{}", "without its </tool_call>"),
        ("hermes", f"<tool_call><tool_call>{BODY}</tool_call>", "without its"),
        ("hermes", "<tool_call>add(1, 2)</tool_call>", "not valid JSON"),
        ("hermes", '<tool_call>{"name": "add"}</tool_call>', 'an object of "arguments"'),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{}"}</tool_call>', 'an object of "arguments"'),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', "NaN is no JSON number"),
        ("hermes", '<tool_call>{"name": "a", "name": "b", "arguments": {}}</tool_call>', "comes twice"),
        ("hermes", '<tool_call>{"name": "a", "arguments": {}, "then": 1}</tool_call>', "must not have 'then'"),
        ("hermes", "<tool_call>" + "[" * 99_000 + "</tool_call>", "not valid JSON"),
        ("hermes", "<tool_call>" + " " * 100_001 + "</tool_call>", "100000 are allowed"),
        ("hermes", f"<tool_call>{BODY}</tool_call>" * 33, "33 calls in one answer"),
        ("qwen_xml", f"<tool_call>{BODY}</tool_call>", "must hold <function=name>"),
        ("qwen_xml", "<tool_call><function=run>code</function></tool_call>", "<parameter=name>...</parameter> only"),
        (
            "qwen_xml",
            "<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
            "a of f is given twice",
        ),
        ("llama3", "{'name': 'add'}", "not valid JSON"),
        ("mistral", "[TOOL_CALLS]add", r"name\[ARGS\]"),
        ("mistral", "[TOOL_CALLS] [1]", "must be an object"),
    ],
)
def test_what_is_no_call_is_told_to_the_model(form: str, text: str, message: str):
    with pytest.raises(CallError, match=message):
        parse_calls(text, form)


@given(text=st.text(alphabet='<>/=[]{}":,toolcafunin_prmexARGSTLC1 \n', max_size=200), form=st.sampled_from([*FORMS]))
def test_any_answer_has_calls_or_a_reason(text: str, form: str):
    try:
        assert all(isinstance(call.name, str) for call in parse_calls(text, form))
    except CallError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("template", "form"),
    [("qwen2_5", "hermes"), ("qwen3", "hermes"), ("llama3_1", "llama3"), ("llama3", None), ("gemma3", None)],
)
def test_a_template_says_which_form_it_teaches(template: str, form: str | None):
    assert form_of((files("trl") / "chat_templates" / f"{template}.jinja").read_text()) == form
