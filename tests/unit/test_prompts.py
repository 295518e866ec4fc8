"""Rows of every source, their errors, and the seeded order with its exact cursor."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from actors.prompts import PromptSet
from actors.sources import DataError, load_rows

DEFAULTS = {
    "task": {}, "split": "train", "prompt_column": None, "answer_column": None, "system_prompt": None,
    "max_bad_rows": 0, "seed": 0,
}  # fmt: skip


def load(source: object, **options):
    return load_rows(str(source), **{**DEFAULTS, **options})


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_jsonl_csv_and_parquet_read_alike(tmp_path: Path):
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f'"{r["question"]}",{r["answer"]}\n' for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        loaded = load(tmp_path / name)
        assert (loaded.prompt_column, loaded.answer_column) == ("question", "answer")
        assert [(r.question, r.answer) for r in loaded.rows] == [("0 + 1?", "1"), ("1 + 1?", "2"), ("2 + 1?", "3")]


def test_gsm8k_answers_are_understood(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "First 2.\n#### 1,042"}])
    assert load(file).rows[0].answer == "1,042"


def test_messages_keep_their_roles_and_drop_the_reply(tmp_path: Path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat, "answer": 3}])
    row = load(file, system_prompt="other").rows[0]
    assert [m["role"] for m in row.messages] == ["system", "user"]
    assert (row.question, row.answer) == ("u", "3")


def test_reasoning_gym_by_task_name():
    rows = load("reasoning_gym:chain_sum", task={"size": 5, "min_terms": 2, "max_terms": 2}).rows
    assert len(rows) == 5
    assert rows[0].metadata["metadata"]["source_dataset"] == "chain_sum"


def test_bad_rows_say_file_and_line_and_some_may_be_skipped(tmp_path: Path):
    good = {"question": "q", "answer": "1"}
    file = write_jsonl(
        tmp_path / "a.jsonl", [good, "{not json", {"question": "", "answer": "1"}, {"question": "q"}, good]
    )
    with pytest.raises(DataError, match=r"3 bad rows, 2 allowed(.|\n)*a.jsonl:2: not JSON"):
        load(file, max_bad_rows=2)
    loaded = load(file, max_bad_rows=3)
    assert len(loaded.rows) == 2
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in loaded.bad] == ["2", "3", "4"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "is empty"),
        ('{"text": "x"}\n', {}, "none of the columns .* only text; set data.prompt_column"),
        ('{"question": "x"}\n', {"prompt_column": "ask"}, "data.prompt_column=ask"),
    ],
)
def test_unusable_files_say_what_to_change(tmp_path: Path, content: str, options: dict, message: str):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.jsonl", **options)


def test_missing_sources_say_so(tmp_path: Path):
    with pytest.raises(DataError, match="no file"):
        load(tmp_path / "nosuch.jsonl")
    with pytest.raises(DataError, match="refuses nosuch"):
        load("reasoning_gym:nosuch")


@pytest.fixture(scope="module")
def prompts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    file = write_jsonl(
        tmp_path_factory.mktemp("data") / "a.jsonl",
        [{"question": f"q{i % 20}", "answer": str(i % 20)} for i in range(40)],
    )
    rows = load(file).rows
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def make(held_out: int = 5, seed: int = 0, limit: int = 100, **more) -> PromptSet:
        return PromptSet(rows, tokenizer, held_out=held_out, max_prompt_tokens=limit, seed=seed, **more)

    return make


def test_the_template_is_applied_once(prompts):
    prompt = prompts().at(0)
    assert prompt.text == f"<s>user: {prompt.question}</s><s>assistant: "
    assert prompt.token_ids.count(0) == 2


def test_an_epoch_has_every_training_prompt_once_and_the_next_another_order(prompts):
    one = prompts()
    epochs = [[one.at(e * one.size + i).question for i in range(one.size)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_the_cursor_is_exact(prompts):
    one, other = prompts(), prompts()
    expected = [one.at(i).question for i in range(90)]
    assert [other.at(i).question for i in reversed(range(90))] == expected[::-1]
    assert [prompts(seed=1).at(i).question for i in range(90)] != expected


def test_no_held_out_question_is_trained(prompts):
    one = prompts()
    trained = {one.at(i).question for i in range(one.size)}
    assert one.size == 30 and len(one.held_out) == 5 and one.overlap == 0
    assert not trained & {p.question for p in one.held_out}
    assert len({p.ordinal for p in one.held_out}) == 5 and all(p.ordinal < 0 for p in one.held_out)


def test_held_out_rows_of_their_own_count_their_overlap(prompts, tmp_path: Path):
    extra = load(
        write_jsonl(tmp_path / "t.jsonl", [{"question": "q1", "answer": "1"}, {"question": "new", "answer": "2"}])
    ).rows
    one = prompts(held_out_rows=extra)
    assert (one.size, [p.question for p in one.held_out], one.overlap) == (40, ["q1", "new"], 1)


def test_too_long_prompts_are_counted_and_none_left_is_an_error(prompts):
    lengths = sorted(len(prompts().at(i).token_ids) for i in range(30))
    assert prompts(limit=lengths[0]).too_long > 0
    with pytest.raises(DataError, match="all 40 prompts are over"):
        prompts(limit=3)
    with pytest.raises(DataError, match="leaves nothing to train on"):
        prompts(held_out=20)
