"""Rows of every source, and the sentences about files and rows that cannot be used."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.data.readers import DataError
from actors.data.sources import load_rows

DEFAULTS = {
    "name": "rows",
    "task": {},
    "split": "train",
    "prompt_column": None,
    "answer_column": None,
    "system_prompt": None,
    "max_bad_rows": 0,
    "seed": 0,
}


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
    described = rows[0].metadata["metadata"]
    assert isinstance(described, dict) and described["source_dataset"] == "chain_sum"


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
    with pytest.raises(DataError, match=f"no file nosuch.jsonl in {Path.cwd()}"):
        load("nosuch.jsonl")
    with pytest.raises(DataError, match="is a folder; name a file in it"):
        load(tmp_path)
    with pytest.raises(DataError, match="refuses nosuch"):
        load("reasoning_gym:nosuch")


def refused(source: Path) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(DataError) as raised:
        load(source)
    return str(raised.value)


def follow(advice: str, folder: Path) -> Path:
    """Run the command that a sentence ends with, in `folder`; the file that it writes."""
    command = advice.split(": ", 1)[1]
    bin_folder = Path(sys.executable).parent
    environment = {"PATH": f"{bin_folder}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=True)
    return folder / command.rsplit("> ", 1)[1]


ROWS = [{"question": "Où est-ce; là?", "answer": "1"}, {"question": "a, b?", "answer": "2"}]
WITH_SEMICOLONS = 'question;answer\n"Où est-ce; là?";1\n"a, b?";2\n'
WITH_COMMAS = 'question,answer\nOù est-ce; là?,1\n"a, b?",2\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps(ROWS, indent=1).encode(), "is a JSON array; write one row a line"),
        ("a.csv", WITH_SEMICOLONS.encode(), "separates its columns by ';'"),
        ("a.csv", WITH_COMMAS.encode("latin-1"), "is not UTF-8 but probably LATIN1"),
        ("a.csv", WITH_COMMAS.encode("utf-16"), "is not UTF-8 but probably UTF-16"),
    ],
)
def test_the_advice_on_a_file_that_cannot_be_read_works(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    sentence = refused(tmp_path / name)
    assert message in sentence and "\n" not in sentence
    rows = load(follow(sentence, tmp_path)).rows
    assert [(row.question, row.answer) for row in rows] == [(row["question"], row["answer"]) for row in ROWS]


def test_sharegpt_rows_are_refused_and_can_be_renamed(tmp_path: Path):
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    file = write_jsonl(tmp_path / "a.jsonl", [{"conversations": turns, "answer": "1"}])
    assert 'rename "conversations" to "messages", "from" to "role"' in refused(file)
    with pytest.raises(DataError, match="ShareGPT"):
        load(file, prompt_column="conversations")
    text = file.read_text()
    for old, new in {"conversations": "messages", "from": "role", "value": "content"}.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    file.write_text(text.replace('"human"', '"user"').replace('"gpt"', '"assistant"'))
    assert [row.question for row in load(file).rows] == ["u"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "text", "text": "u"}, {"type": "image"}], "a message of parts .images or texts."),
        (None, "whose content is no text but NoneType"),
    ],
)
def test_a_message_that_is_no_text_is_refused(tmp_path: Path, content: object, message: str):
    rows = [{"messages": [{"role": "user", "content": content}], "answer": "1"}]
    with pytest.raises(DataError, match=message):
        load(write_jsonl(tmp_path / "a.jsonl", rows))


def test_rows_with_an_image_are_refused(tmp_path: Path):
    rows = [
        {"question": "q", "answer": "1", "image": None},
        {"question": "What is shown?", "answer": "1", "image": "a"},
    ]
    with pytest.raises(DataError, match=":2: image is not read: models are given text only"):
        load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert len(load(write_jsonl(tmp_path / "b.jsonl", rows[:1])).rows) == 1


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_truncated_parquet_file_is_refused(tmp_path: Path, size: int):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS * 100), file)
    file.write_bytes(file.read_bytes()[:size])
    assert "is not a complete Parquet file" in refused(file)


def test_of_several_answers_all_are_kept_and_the_first_is_the_reference(tmp_path: Path):
    rows = [{"question": "q", "answer": ["#### 1", 1.0, None]}, {"question": "q", "answer": "2"}]
    loaded = load(write_jsonl(tmp_path / "a.jsonl", rows)).rows
    assert [(row.answer, row.answers) for row in loaded] == [("1", ("1", "1.0")), ("2", ("2",))]
    assert loaded[0].metadata["answer"] == ["#### 1", 1.0, None]
    for answer, message in (([], "no answer"), ({"text": "1"}, "answer is neither text nor a number")):
        with pytest.raises(DataError, match=message):
            load(write_jsonl(tmp_path / "b.jsonl", [{"question": "q", "answer": answer}]))
