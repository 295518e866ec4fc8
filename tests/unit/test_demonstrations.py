"""Demonstrations: rendered like prompts, ended like answers, and in a seeded order of batches."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from actors.data.demonstrations import COLUMN, Demonstrations, built_in_rows, end_of_answer, make_demonstrations
from actors.data.readers import DataError
from actors.data.rendering import PLAIN, Rendering
from actors.data.sources import Row
from conf.schema import WarmupSettings
from epiphany.warm_up import batches
from rewards.correctness import math
from rewards.format import think_answer
from rewards.sample import Sample


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def demonstrations_of(tokenizer: Any, texts: list[str | None], **more: Any) -> Demonstrations:
    rows = [
        Row(({"role": "user", "content": f"q{i}"},), ("1",), "t", {COLUMN: text}, f"row {i}")
        for i, text in enumerate(texts)
    ]
    options = {"rendering": PLAIN, "max_prompt_tokens": 99, "max_tokens": 20, **more}
    return make_demonstrations(rows, tokenizer, column=COLUMN, end_ids=[tokenizer.eos_token_id], **options)


def test_the_built_in_ones_are_right_and_in_the_form():
    rows = built_in_rows("Think.")
    assert len(rows) == 8 and rows[0].messages[0] == {"role": "system", "content": "Think."}
    for row in rows:
        sample = Sample(row.question, str(row.metadata[COLUMN]), row.answer)
        assert (math(sample), think_answer(sample)) == (1.0, 1.0), row.place


def test_a_demonstration_is_the_prompt_the_text_and_the_end(tokenizer: Any):
    made = demonstrations_of(tokenizer, ["yes", None, "a longer text than twenty tokens of letters"])
    (group,), (trajectory,) = made.groups, made.groups[0].trajectories
    assert made.too_long == 1 and group.prompt.question == "q0"
    assert tokenizer.decode(trajectory.token_ids) == "yes" + tokenizer.eos_token
    assert trajectory.turns[0].length == len(trajectory.token_ids) == len(trajectory.logprobs)


def test_a_prefill_is_part_of_the_prompt(tokenizer: Any):
    made = demonstrations_of(tokenizer, ["<think>yes"], rendering=Rendering("<think>"))
    assert made.groups[0].prompt.text.endswith("<think>")
    assert tokenizer.decode(made.groups[0].trajectories[0].token_ids) == "yes" + tokenizer.eos_token
    with pytest.raises(DataError, match=r"row 0: the demonstration does not begin with '<think>'"):
        demonstrations_of(tokenizer, ["yes"], rendering=Rendering("<think>"))


@pytest.mark.parametrize(
    ("texts", "more", "message"),
    [
        ([None, " "], {}, "no training row has a demonstration"),
        (["much too long"], {"max_tokens": 3}, "all 1 demonstrations are over sampling.max_tokens=3"),
        ([["yes"]], {}, "row 0 holds no text there but list"),
    ],
)
def test_what_cannot_be_trained_is_refused(tokenizer: Any, texts: list[Any], more: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        demonstrations_of(tokenizer, texts, **more)


def test_an_answer_ends_as_the_chat_template_ends_it(tokenizer: Any):
    ends = [tokenizer.eos_token_id, *tokenizer("z", add_special_tokens=False)["input_ids"]]
    assert end_of_answer(tokenizer, PLAIN, ends) == tokenizer.eos_token_id
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = "{% for m in messages %}{{ m['content'] }}z{% endfor %}"
    assert end_of_answer(other, PLAIN, ends) == ends[1]
    other.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert end_of_answer(other, PLAIN, ends) == tokenizer.eos_token_id


def test_every_demonstration_comes_once_in_an_epoch(tokenizer: Any):
    groups = demonstrations_of(tokenizer, ["a", "b", "c"]).groups
    settings = WarmupSettings(steps=6, demonstrations_per_step=2)
    texts = [table.column("text").to_pylist() for table in batches(groups, settings, seed=0)]
    assert [len(step) for step in texts] == [2] * 6
    in_order = [text for step in texts for text in step]
    epochs = [in_order[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(epoch) == ["a", "b", "c"] for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1
    assert texts == [table.column("text").to_pylist() for table in batches(groups, settings, seed=0)]
    assert texts != [table.column("text").to_pylist() for table in batches(groups, settings, seed=1)]
