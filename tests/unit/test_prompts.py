"""Prompts: rendered once, split, and in a seeded order with an exact cursor."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from actors.data import rendering
from actors.data.prompts import PromptSet, Source
from actors.data.readers import DataError
from actors.data.rendering import Rendering
from actors.data.sources import Row
from actors.types import Completion, Trajectory


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def row(question: str, *answers: str) -> Row:
    return Row(({"role": "user", "content": question},), answers, "task", {"question": question}, "here")


@pytest.fixture(scope="module")
def prompts(tiny_model: Path):
    rows = [row(f"q{i % 20}", str(i % 20)) for i in range(40)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def make(held_out: int = 5, seed: int = 0, limit: int = 100, **more) -> PromptSet:
        return PromptSet(
            [Source("task", rows)], tokenizer, held_out=held_out, max_prompt_tokens=limit, seed=seed, **more
        )

    return make


def test_an_answer_may_begin_with_a_given_text(tokenizer: Any):
    rows = [row("q", "1"), row("p", "1")]
    prompt = PromptSet(
        [Source("task", rows)], tokenizer, held_out=1, max_prompt_tokens=99, seed=0, rendering=Rendering("<think>")
    ).at(0)
    assert prompt.text.endswith("assistant: <think>") and prompt.prefill == "<think>"
    completion = Completion("a", (1,), (0.0,), "so</think>", "stop", ())
    assert Trajectory.single_turn(completion, prefill=prompt.prefill).text == "<think>so</think>"


def test_variables_reach_the_chat_template_and_unknown_ones_are_refused(tokenizer: Any):
    tokenizer.chat_template += "{% if not enable_thinking %}<think></think>{% endif %}"
    texts = [
        PromptSet(
            [Source("task", [row("q", "1"), row("p", "1")])],
            tokenizer,
            held_out=1,
            max_prompt_tokens=99,
            seed=0,
            rendering=Rendering(variables={"enable_thinking": thinks}),
        )
        .at(0)
        .text
        for thinks in (True, False)
    ]
    assert [text.endswith("<think></think>") for text in texts] == [False, True]
    for name, message in (("thinking", "reads no 'thinking'"), ("add_generation_prompt", "is set by Epiphany")):
        with pytest.raises(DataError, match=message):
            PromptSet(
                [Source("task", [row("q", "1")])],
                tokenizer,
                held_out=0,
                max_prompt_tokens=99,
                seed=0,
                rendering=Rendering(variables={name: 1}),
            )


def test_the_template_is_applied_once(prompts):
    prompt = prompts().at(0)
    assert prompt.text == f"<s>user: {prompt.question}</s><s>assistant: "
    assert prompt.token_ids.count(0) == 2


def test_an_epoch_has_every_training_prompt_once_and_the_next_another_order(prompts):
    prompt_set = prompts()
    epochs = [[prompt_set.at(e * prompt_set.size + i).question for i in range(prompt_set.size)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_the_cursor_is_exact(prompts):
    first, other = prompts(), prompts()
    expected = [first.at(i).question for i in range(90)]
    assert [other.at(i).question for i in reversed(range(90))] == expected[::-1]
    assert [prompts(seed=1).at(i).question for i in range(90)] != expected


def test_no_held_out_question_is_trained(prompts):
    prompt_set = prompts()
    trained = {prompt_set.at(i).question for i in range(prompt_set.size)}
    assert prompt_set.size == 30 and len(prompt_set.held_out) == 5 and prompt_set.overlap == 0
    assert not trained & {p.question for p in prompt_set.held_out}
    assert [(p.purpose, p.ordinal) for p in prompt_set.held_out] == [("evaluate", i) for i in range(5)]
    assert prompt_set.at(0).purpose == "train"


def test_held_out_rows_of_their_own_count_their_overlap(prompts):
    extra = [row("q1", "1"), row("new", "2")]
    prompt_set = prompts(held_out_rows=extra)
    assert (prompt_set.size, [p.question for p in prompt_set.held_out], prompt_set.overlap) == (
        40,
        ["q1", "new"],
        1,
    )


def test_too_long_prompts_are_counted_and_none_left_is_an_error(prompts):
    lengths = sorted(len(prompts().at(i).token_ids) for i in range(30))
    assert prompts(limit=lengths[0]).too_long > 0
    with pytest.raises(DataError, match="all 40 prompts are over"):
        prompts(limit=3)
    with pytest.raises(DataError, match="leaves nothing to train on"):
        prompts(held_out=20)


def test_a_chat_template_that_refuses_the_messages_says_so(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"System role not supported; change the messages, data.system_prompt"):
        PromptSet([Source("task", [row("q", "1")])], tokenizer, held_out=0, max_prompt_tokens=100, seed=0)


def test_a_chat_template_that_does_not_end_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendering, "TEMPLATE_SECONDS", 0.05)
    tokenizer.chat_template = "{% for i in range(300) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="does not end within"):
        PromptSet([Source("task", [row("q", "1")])], tokenizer, held_out=0, max_prompt_tokens=100, seed=0)


def test_a_chat_template_that_computes_nonsense_says_so(tokenizer: Any):
    tokenizer.chat_template = "{% for i in range(10 ** 9) %}{% endfor %}"  # over what Jinja's sandbox lets through
    with pytest.raises(DataError, match="refuses the prompt"):
        PromptSet([Source("task", [row("q", "1")])], tokenizer, held_out=0, max_prompt_tokens=100, seed=0)


def test_held_out_prompts_may_be_rendered_in_their_own_way(tokenizer: Any):
    prompt_set = PromptSet(
        [Source("task", [row("q", "1"), row("p", "1")])],
        tokenizer,
        held_out=1,
        max_prompt_tokens=99,
        seed=0,
        rendering=Rendering("<think>"),
        held_out_rendering=Rendering("So"),
    )
    assert prompt_set.at(0).prefill == "<think>"
    assert [(p.prefill, p.text.endswith("So")) for p in prompt_set.held_out] == [("So", True)]
    assert prompt_set.held_out[0].question != prompt_set.at(0).question


def test_prompts_carry_all_answers_and_their_fingerprint_tells_them(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sets = [
        PromptSet(
            [Source("t", [row("q", *answers), row("p", "1")])], tokenizer, held_out=0, max_prompt_tokens=100, seed=0
        )
        for answers in (("1",), ("1", "2"), ("1", "2"))
    ]
    prompt = next(prompt for prompt in map(sets[1].at, range(2)) if prompt.question == "q")
    assert (prompt.answer, prompt.answers) == ("1", ("1", "2"))
    first, second, third = (prompt_set.fingerprint() for prompt_set in sets)
    assert first != second == third


def test_sources_are_mixed_by_weight_and_each_holds_out_its_own(tokenizer: Any):
    sources = [
        Source(name, [replace(row(f"{name}{i}", "1"), task=name) for i in range(10)], weight)
        for name, weight in (("a", 3.0), ("b", 1.0))
    ]
    prompt_set = PromptSet(sources, tokenizer, held_out=2, max_prompt_tokens=99, seed=0)
    assert prompt_set.sizes == {"a": 8, "b": 8} and [p.task for p in prompt_set.held_out] == ["a", "b", "a", "b"]
    tasks = [prompt_set.at(ordinal).task for ordinal in range(32)]
    assert (tasks.count("a"), tasks.count("b")) == (24, 8)
    assert len({prompt_set.at(i).question for i in range(32) if tasks[i] == "b"}) == 8
    other = PromptSet(
        [sources[0], replace(sources[1], weight=2.0)], tokenizer, held_out=2, max_prompt_tokens=99, seed=0
    )
    assert prompt_set.fingerprint() != other.fingerprint()


def rated(question: str, rate: object) -> Row:
    return replace(row(question, "1"), metadata={"pass_rate": rate})


def test_only_rows_of_the_asked_difficulty_are_trained_and_all_are_held_out_from(tokenizer: Any):
    rows = [rated(f"q{i}", i / 10) for i in range(11)] + [rated("long", None)]
    prompt_set = PromptSet(
        [Source("t", rows)], tokenizer, held_out=6, max_prompt_tokens=99, seed=0, difficulty=[0.2, 0.8]
    )
    trained = {prompt_set.at(i).question for i in range(prompt_set.size)}
    held_out = {prompt.question for prompt in prompt_set.held_out}
    assert trained and trained <= {f"q{i}" for i in range(2, 9)} and not trained & held_out
    assert prompt_set.outside == 12 - 6 - len(trained)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([rated("a", 0.5), row("b", "1")], "has no pass_rate; task=difficulty"),
        ([rated("a", 0.95), rated("b", 0.0)], r"data.difficulty=\[0.1, 0.9\]: no row of t has"),
        ([rated("a", "half"), rated("b", 0.0)], "pass_rate is 'half'; it must be between 0 and 1"),
    ],
)
def test_rows_without_the_asked_difficulty_are_refused(tokenizer: Any, rows: list[Row], message: str):
    with pytest.raises(DataError, match=message):
        PromptSet([Source("t", rows)], tokenizer, held_out=0, max_prompt_tokens=99, seed=0, difficulty=[0.1, 0.9])
