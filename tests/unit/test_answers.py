"""Rewards of one sample, by hand: registered functions, a user's own, and their sum."""

import sys
from pathlib import Path
from typing import Any

import pytest

from rewards import correctness, format
from rewards.composition import Term, max_score, reference_completion, score
from rewards.composition import correctness as strict_and_lenient
from rewards.errors import RewardError
from rewards.registry import load_term
from rewards.sample import Sample


def sample(completion: str, answer: str | None = "7", **more: Any) -> Sample:
    return Sample("q", completion, answer, **more)


@pytest.mark.parametrize(
    ("completion", "answer", "lenient", "strict"),
    [
        ("7", "7", 1, 1),
        ("The answer is 7.", "7", 1, 0),
        ("4 + 3 = 7", "7", 1, 0),
        ("7 or 8", "7", 0, 0),
        ("<answer>7</answer> not 8", "7", 1, 1),
        ("so \\boxed{7}, see 12", "7", 1, 1),
        ("#### 7", "7", 1, 1),
        ("9-2", "2", 1, 0),
        ("4 - 7 = -3", "-3", 1, 0),
        ("1,234.50", "1234.5", 1, 1),
        ("$12", "12", 1, 1),
        ("nothing", "7", 0, 0),
        ("", "7", 0, 0),
    ],
)
def test_numeric(completion: str, answer: str, lenient: float, strict: float):
    assert correctness.numeric(sample(completion, answer)) == lenient
    assert correctness.numeric(sample(completion, answer), strict=True) == strict


def test_numeric_does_not_apply_to_words():
    assert correctness.numeric(sample("7", "seven")) is None


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("\\boxed{\\frac{1}{2}}", "1/2", 1),
        ("The result is $\\frac{2}{4}$.", "\\frac{1}{2}", 1),
        ("<answer>x^2 + 2x + 1</answer>", "(x+1)^2", 1),
        ("\\boxed{0.25}", "\\frac{1}{4}", 1),
        ("\\boxed{3}", "\\frac{1}{2}", 0),
        ("It is 42.", "42", 1),
        ("\\boxed{84/2}", "42", 1),
    ],
)
def test_math(completion: str, answer: str, expected: float):
    assert correctness.math(sample(completion, answer)) == expected


def test_exact():
    assert correctness.exact(sample("  New   York ", "new york")) == 1
    assert correctness.exact(sample("New york", "new york"), strict=True) == 0
    assert correctness.exact(sample("I say <answer>Paris</answer>", "paris")) == 1


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>a\n</think>\n<answer>b</answer>\n", 1),
        ("<think>a</think><answer> </answer>", 0),
        ("well <think>a</think><answer>b</answer>", 0),
        ("<think>a</think><think>c</think><answer>b</answer>", 0),
        ("<answer>b</answer>", 0),
    ],
)
def test_think_answer(completion: str, expected: float):
    assert format.think_answer(sample(completion)) == expected


@pytest.mark.parametrize(
    ("completion", "tags", "order", "inside"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1, 1),
        (" <think>a</think> \n <answer>b</answer>\n", 1, 1, 1),
        ("well, <think>a</think> so <answer>b</answer>.", 1, 1, 1 - 8 / 45),
        ("<answer>b</answer>", 1 / 2, 1 / 3, 0),
        ("<answer>b</answer><think>a</think>", 1, 2 / 3, 0),
        ("<think>a</think><think>", 1 / 4, 0, 0),
        ("</think><think>", 1 / 2, 0, 0),
        ("b", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_a_part_of_the_form_earns_a_part(completion: str, tags: float, order: float, inside: float):
    of_form = [function(sample(completion)) for function in (format.tags, format.tag_order, format.inside_tags)]
    assert of_form == pytest.approx([tags, order, inside])


def test_length():
    values = [format.length(sample("", tokens=n), target=10, maximum=20) for n in (5, 10, 15, 20, 30)]
    assert values == [1, 1, 0.5, 0, 0]


def test_gym_scores_with_the_tasks_own_scorer():
    from rewards.gym import reasoning_gym

    entry = reasoning_gym().create_dataset("chain_sum", size=1, seed=3)[0]
    metadata = {**entry, "metadata": {**entry["metadata"], "source_dataset": "chain_sum"}}
    right = sample(f"<answer>{entry['answer']}</answer>", entry["answer"], metadata=metadata)
    wrong = sample("<answer>no</answer>", entry["answer"], metadata=metadata)
    assert correctness.gym(right) == 1 and correctness.gym(right, strict=True) == 1
    assert correctness.gym(wrong, strict=True) == 0
    assert correctness.gym(sample("7")) is None


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("function", [correctness.numeric, correctness.math, correctness.exact])
def test_any_of_several_acceptable_answers_is_right(function: Any, strict: bool):
    answers = ("7", "1/2" if function is correctness.math else "0.5")
    for completion, expected in (("7", 1.0), ("0.5", 1.0), ("8", 0.0)):
        text = f"<answer>{completion}</answer>" if function is not correctness.exact else completion
        assert function(sample(text, "7", answers=answers), strict=strict) == expected


def test_a_sample_with_one_reference_has_it_as_its_only_answer():
    assert sample("x").answers == ("7",) and sample("x", None).answers == ()


def terms(*pairs: tuple[str, float], **options: Any) -> list[Term]:
    return [load_term(fn, name=fn.rpartition(":")[2], weight=weight, options=options) for fn, weight in pairs]


def test_terms_add_by_weight_and_those_that_do_not_apply_stay_out():
    text = "<think>easy</think><answer>7</answer>"
    both = terms(("numeric", 1.0), ("think_answer", 0.5))
    assert score(both, sample(text)) == (1.5, {"numeric": 1, "think_answer": 1})
    assert score(both, sample(text, "word")) == (0.5, {"think_answer": 1})
    with pytest.raises(RewardError, match="no term applies"):
        score(terms(("numeric", 1.0)), sample(text, "word"))


def test_strict_and_lenient_come_from_the_first_term_that_checks_and_applies():
    assert strict_and_lenient(terms(("think_answer", 1.0), ("numeric", 1.0)), sample("is 7")) == (0, 1)
    assert strict_and_lenient(terms(("numeric", 1.0), ("exact", 1.0)), sample("Word", "word")) == (0, 1)


def test_the_reference_completion_gets_the_maximum():
    for chosen in (terms(("math", 1.0), ("think_answer", 0.2)), terms(("numeric", 2.0)), terms(("exact", 1.0))):
        text = reference_completion(chosen, "12")
        assert score(chosen, sample(text, "12"))[0] == max_score(chosen)
    assert reference_completion(terms(("think_answer", 1.0), ("think_answer", 1.0)), "12").count("<answer>") == 1


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's file of rewards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "words_of_mine", raising=False)
    (tmp_path / "words_of_mine.py").write_text("FIRST = 'yes'\n\n\ndef word(row):\n    return row['word']\n")
    file = tmp_path / "rewards.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import words_of_mine\n"
        "@dataclass\n"
        "class Found:\n"
        "    value: float\n"
        "def score(sample, bonus=0.0):\n"
        "    return Found(sample.completion == words_of_mine.FIRST).value + bonus\n"
        "def fails(sample):\n"
        "    return words_of_mine.word(sample.metadata)\n"
        "def trl(completions, word, **kwargs):\n"
        "    assert kwargs['prompts'] == ['q'] and 'prompt' not in kwargs\n"
        "    return [float(c == w) for c, w in zip(completions, word)]\n"
        "async def trl_async(prompts, completions, scale=1.0):\n"
        "    return [scale * len(completions[0])]\n"
        "def trl_chat(prompts, completions):\n"
        "    return [float(prompts[0][0]['role'] == 'user' and completions[0][0]['content'] == 'yes')]\n"
        "def trl_none(completions):\n"
        "    return [None]\n"
        "def trl_number(completions):\n"
        "    return 1.0\n"
        "def trl_ids(completions, completion_ids):\n"
        "    return [1.0]\n"
        "def three(prompt, completion, answer):\n"
        "    return 1.0\n"
        "NUMBER = 3\n"
    )
    return file


def test_a_users_file_may_define_dataclasses_and_import_its_neighbors(mine: Path):
    assert score(terms((f"{mine}:score", 1.0), bonus=0.5), sample("yes")) == (1.5, {"score": 1.5})


def test_a_users_own_reward_checks_no_answer_and_has_no_known_maximum(mine: Path):
    own = f"{mine}:score"
    assert strict_and_lenient(terms((own, 1.0)), sample("yes")) == (None, None)
    assert max_score(terms((own, 1.0), ("numeric", 1.0))) is None
    assert max_score(terms((own, -1.0), ("numeric", 1.0))) == 1.0
    assert max_score(terms(("numeric", -1.0))) is None


def test_an_error_of_a_users_reward_begins_with_its_file_and_line(mine: Path):
    with pytest.raises(RewardError, match=r"^words_of_mine.py:5: KeyError: 'word'$"):
        score(terms((f"{mine}:fails", 1.0)), sample("yes"))
    (mine.parent / "typo.py").write_text("x = 1\ndef score(sample:\n    return 1.0\n")
    with pytest.raises(RewardError, match=r"typo.py:f' does not import: typo.py:2: SyntaxError: "):
        terms((f"{mine.parent}/typo.py:f", 1.0))
    (mine.parent / "early.py").write_text("x = 1\ny = x.nosuch\n")
    with pytest.raises(RewardError, match=r"does not import: early.py:2: AttributeError: "):
        terms((f"{mine.parent}/early.py:f", 1.0))


def test_a_function_with_trls_signature_is_called_as_trl_does(mine: Path):
    row = {"word": "yes", "prompt": "q", "more": 1}
    assert score(terms((f"{mine}:trl", 1.0)), sample("yes", metadata=row))[0] == 1.0
    assert score(terms((f"{mine}:trl_async", 1.0), scale=2.0), sample("yes", metadata=row))[0] == 6.0
    messages = {"prompt": [{"role": "user", "content": "q"}]}
    assert score(terms((f"{mine}:trl_chat", 1.0)), sample("yes", metadata=messages))[0] == 1.0
    assert score(terms((f"{mine}:trl_none", 1.0), ("numeric", 1.0)), sample("7"))[1] == {"numeric": 1.0}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("trl", r"takes word, but the data has no such column \(it has more\)"),
        ("trl_number", r"must return a list with one score for each completion; it gave 1.0"),
    ],
)
def test_what_a_trl_reward_does_wrong_is_said(mine: Path, function: str, message: str):
    with pytest.raises(RewardError, match=message):
        score(terms((f"{mine}:{function}", 1.0)), sample("yes", metadata={"more": 1}))


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("trl_ids", {}, r"requires completion_ids, which only TRL has"),
        ("trl_chat", {"x": 1}, r"has no parameter x"),
        ("three", {}, r"missing a required argument: 'completion'.*a reward takes \(sample, \*\*options\)"),
        ("score", {"x": 1}, r"unexpected keyword argument 'x'"),
        ("NUMBER", {}, r"no function NUMBER"),
    ],
)
def test_a_signature_that_cannot_work_is_refused(mine: Path, function: str, options: dict[str, Any], message: str):
    with pytest.raises(RewardError, match=message):
        terms((f"{mine}:{function}", 1.0), **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuch", "neither registered"),
        ("nosuch_module:f", "does not import: ModuleNotFoundError"),
        ("math:nosuch", "no function nosuch"),
        ("nosuch.py:f", "no file"),
        ("length", "missing a required argument: 'target'"),
    ],
)
def test_a_reward_that_cannot_be_found_or_called_says_so(name: str, message: str):
    with pytest.raises(RewardError, match=message):
        load_term(name, name="mine", weight=1.0, options={})
