"""Rewards of one sample, by hand."""

import pytest

from rewards import answers, style
from rewards.registry import RewardError, correctness, load_term, score
from rewards.sample import Sample


def sample(completion: str, answer: str | None = "7", **more) -> Sample:
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
    assert answers.numeric(sample(completion, answer)) == lenient
    assert answers.numeric(sample(completion, answer), strict=True) == strict


def test_numeric_does_not_apply_to_words():
    assert answers.numeric(sample("7", "seven")) is None


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
    assert answers.math(sample(completion, answer)) == expected


def test_exact():
    assert answers.exact(sample("  New   York ", "new york")) == 1
    assert answers.exact(sample("New york", "new york"), strict=True) == 0
    assert answers.exact(sample("I say <answer>Paris</answer>", "paris")) == 1


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
    assert style.think_answer(sample(completion)) == expected


def test_length():
    values = [style.length(sample("", tokens=n), target=10, maximum=20) for n in (5, 10, 15, 20, 30)]
    assert values == [1, 1, 0.5, 0, 0]


def test_gym_scores_with_the_tasks_own_scorer():
    from rewards.gym import reasoning_gym

    entry = reasoning_gym().create_dataset("chain_sum", size=1, seed=3)[0]
    metadata = {**entry, "metadata": {**entry["metadata"], "source_dataset": "chain_sum"}}
    right = sample(f"<answer>{entry['answer']}</answer>", entry["answer"], metadata=metadata)
    wrong = sample("<answer>no</answer>", entry["answer"], metadata=metadata)
    assert answers.gym(right) == 1 and answers.gym(right, strict=True) == 1
    assert answers.gym(wrong, strict=True) == 0
    assert answers.gym(sample("7")) is None


def terms(*pairs):
    return [load_term(name, name=name, weight=weight, options={}) for name, weight in pairs]


def test_terms_add_by_weight_and_those_that_do_not_apply_stay_out():
    text = "<think>easy</think><answer>7</answer>"
    assert score(terms(("numeric", 1.0), ("think_answer", 0.5)), sample(text)) == (
        1.5,
        {"numeric": 1, "think_answer": 1},
    )
    assert score(terms(("numeric", 1.0), ("think_answer", 0.5)), sample(text, "word")) == (0.5, {"think_answer": 1})
    with pytest.raises(RewardError, match="no term applies"):
        score(terms(("numeric", 1.0)), sample(text, "word"))


def test_strict_and_lenient_come_from_the_term_that_checks():
    assert correctness(terms(("think_answer", 1.0), ("numeric", 1.0)), sample("is 7")) == (0, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuch", "neither registered"),
        ("nosuch_module:f", "does not import: ModuleNotFoundError"),
        ("math:nosuch", "no function nosuch"),
        ("nosuch.py:f", "no file"),
    ],
)
def test_a_reward_that_cannot_be_found_says_so(name: str, message: str):
    with pytest.raises(RewardError, match=message):
        load_term(name, name="mine", weight=1.0, options={})
