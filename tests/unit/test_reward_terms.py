"""Built-in terms: the values worked by hand in docs/rewards.md, and what is refused or does not apply."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rewards.composition import Term, score
from rewards.errors import RewardError
from rewards.gym import EXPRESSIONS, LISTS, reasoning_gym, score_answer
from rewards.registry import REGISTRY, load_term
from rewards.sample import Sample

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"
ROW = re.compile(r"^\| `(\{fn: .*?\})` \| `(.*?)` \| (?:`(.*?)` )?\| (\S+) \| .* \|$", re.MULTILINE)
LENGTH = re.compile(r"\((\d+) tokens of at most (\d+)\)")
ROWS = ROW.findall(DOCS.read_text())


def term(fn: str, **options: Any) -> Term:
    return load_term(fn, name=fn, weight=1.0, options=options)


def value(fn: str, completion: str, reference: str | None = None, **options: Any) -> float | None:
    """The term's value; None where it does not apply."""
    try:
        return score([term(fn, **options)], Sample("q", completion, reference, tokens=9, max_tokens=99))[0]
    except RewardError as error:
        if str(error) == "no term applies":
            return None
        raise


@pytest.mark.parametrize(("asked", "completion", "reference", "expected"), ROWS)
def test_the_values_in_the_docs_are_right(asked: str, completion: str, reference: str, expected: str):
    fn, options = (settings := yaml.safe_load(asked))["fn"], settings.get("options", {})
    length = LENGTH.fullmatch(completion)
    tokens, max_tokens = (int(length[1]), int(length[2])) if length else (9, 99)
    sample = Sample("q", completion, reference or None, tokens=tokens, max_tokens=max_tokens)
    given, _ = score([term(fn, **options)], sample)
    assert given == pytest.approx(float(expected), abs=5e-4)


def test_the_docs_have_a_value_for_every_term_whose_value_one_text_tells():
    assert {yaml.safe_load(row[0])["fn"] for row in ROWS} == set(REGISTRY) - {"gym", "instructions"}


def test_the_docs_list_every_term():
    listed = re.findall(r"^\| `(\w+)` \| ", DOCS.read_text(), re.MULTILINE)
    assert set(REGISTRY) <= set(listed)


@pytest.mark.parametrize(
    ("completion", "reference", "lenient", "strict"),
    [
        ("<answer>B</answer>", "B", 1, 1),
        ("<answer>B. Assault</answer>", "B. Assault", 1, 0),
        ("It's A's turn: (b)", "B", 0, 0),  # an apostrophe touches A, and b is no capital
        ("The answer is B, I think.", "B", 1, 0),  # I is no letter of an option
        ("B. A contract needs consideration.", "B", 1, 0),  # A is an article
        ("I choose B because of A and C", "B", 1, 0),
        ("So B is right, for it lacks vitamin C.", "B", 1, 0),
        ("Not A but B", "B", 1, 0),  # the last one
        ("<answer>not A, but B</answer>", "A", 0, 0),  # two letters are no choice
        ("**Answer: (B)**", "B", 1, 0),
        ("I choose C", "B", 0, 0),
        ("no letter", "B", 0, 0),
    ],
)
def test_choice(completion: str, reference: str, lenient: float, strict: float):
    assert value("choice", completion, reference) == lenient
    sample = Sample("q", completion, reference)
    assert REGISTRY["choice"].fn(sample, strict=True) == strict
    assert value("choice", completion, "none of them") is None


@functools.cache
def puzzle(task: str) -> dict[str, Any]:
    return reasoning_gym().create_dataset(task, size=1, seed=1)[0]


@pytest.mark.parametrize(
    "answer",
    [
        "open('/tmp/ran', 'w')",
        "__import__('os').mkdir('ran')",
        "().__class__.__base__",
        "[x.y for x in 'abc']",
        "lambda: 1",
        "(1).real",
        "(getattr)((__import__)('os'),'system')('touch ran')",
        "[open][0]('ran', 'w')",
        "(eval)('1')",
        "sin('open(chr(114), chr(119))')",
        "sin(*[open])",
        "(lambda: 0)()",
        "9**9**9**9",
        "1" * 100_000 + " !",
    ],
)
def test_no_answer_to_a_puzzle_is_run(answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for task in (*EXPRESSIONS, *LISTS):
        assert score_answer(task, answer, puzzle(task)) == 0
    assert not list(tmp_path.iterdir())


def test_right_answers_to_puzzles_that_are_evaluated_still_count():
    for task in (*EXPRESSIONS, *LISTS):
        for row in reasoning_gym().create_dataset(task, size=20, seed=1):
            assert score_answer(task, str(row["answer"]), row) == 1, (task, row["answer"])


def test_no_other_scorer_of_reasoning_gym_evaluates_answers():
    """A new version may: then its tasks belong into EXPRESSIONS or LISTS."""
    folder = Path(str(reasoning_gym().__file__)).parent
    evaluating = re.compile(r"\beval\(\s*(?:user_)?answer|(?<!def )(?:sympy|sp)?\.?\bparse_expr\((?:user_)?answer")
    found = {file.stem for file in folder.rglob("*.py") if evaluating.search(file.read_text())}
    assert found == {*EXPRESSIONS, *LISTS}


def test_json_is_found_in_tags_and_fences_and_compared_by_fields():
    reference = '{"name": "Ann", "items": ["Tea", 2], "paid": true}'
    for text in (reference, f"Here it is:\n```json\n{reference}\n```", f"<answer>\n{reference}</answer>"):
        assert value("json_fields", text, reference) == 1
    assert value("json_fields", '{"name": "ann", "items": ["tea", 2], "paid": false, "more": 1}', reference) == 2 / 3
    assert value("json_fields", '{"paid": 1}', '{"paid": true}') == 0
    assert value("json_fields", '["Ann"]', reference) == value("json_fields", "Ann", reference) == 0
    assert value("json_fields", reference, "Ann") is None
    assert value("json_schema", "[" * 100_000, schema={"type": "array"}) == 0
    assert value("json_schema", "null", schema={"type": "null"}) == 1


def test_names_and_code_are_no_spelling_mistakes():
    assert value("spelling", "Kaltenbach met Ms Wrzos at `xqz()`.") == 1
    assert value("spelling", "<thnk>wrold wrold</thnk>") == pytest.approx(0.9)
    assert value("spelling", "qx wz vk xj zq qk jx vq xk zj kq xz") == 0
    assert value("spelling", "ein schoenes haus", language="de") == pytest.approx(0.9)


def test_what_tells_too_little_about_a_language_does_not_count():
    assert value("language", "42 + 17 = 59", language="en") is None
    assert value("language", "C'est la bonne réponse à la question.", language="en") == 0


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        ("spelling", {"language": "xx"}, "no word list of language='xx'"),
        ("language", {"language": "english"}, "'english' is none of "),
        ("regex", {"pattern": "("}, "is no regular expression"),
        ("json_schema", {"schema": {"type": "objekt"}}, "is no JSON schema"),
        ("json_schema", {"schema": "schema.json"}, "is no JSON schema"),
        ("steps", {"target": 0}, "target=0 must be at least 1"),
        ("repetition", {"words": 0}, "words=0 must be at least 1"),
        ("similarity", {"method": "nearest"}, "method='nearest' is none of ratio"),
        ("soft_overlong", {"buffer": 100}, "must be over 0 and at most maximum=99"),
        ("xml_tags", {"names": []}, "names is empty"),
    ],
)
def test_options_that_cannot_work_are_refused(fn: str, options: dict[str, Any], message: str):
    with pytest.raises(RewardError, match=re.escape(message)):
        value(fn, "some text that has letters enough", "reference", **options)
