"""Statistics of evaluations, with values worked by hand."""

import pytest

from epiphany.report import scores
from rewards.correctness import final_answer


def test_pass_at_k():
    # Of 4 samples 1 is right: a draw of 2 misses it in 3 of 6 cases.
    assert [scores.pass_at_k(4, 1, k) for k in (1, 2, 4)] == pytest.approx([1 / 4, 1 / 2, 1])
    assert scores.pass_at_k(4, 0, 4) == 0 and scores.pass_at_k(4, 4, 1) == 1


def test_majority():
    assert scores.majority(["7", "8", "7"], [1, 0, 1]) == 1
    assert scores.majority(["7", "8", "8"], [1, 0, 0]) == 0
    assert scores.majority(["7", "8", None], [1, 0, 0]) == 1 / 2
    assert scores.majority([None, None], [0, 0]) == 0


def test_sign_test():
    # 5 to 1: (1 + 6) / 64 on one side, twice that on both.
    assert scores.sign_test(5, 1) == pytest.approx(14 / 64)
    assert scores.sign_test(0, 0) == scores.sign_test(3, 3) == 1


def test_paired():
    result = scores.paired([1, 1, 0, 0], [0, 1, 1, 0])
    assert (result.difference, result.won, result.lost, result.p) == (0, [0], [2], 1)
    # The differences 1, 0, -1, 0 have a variance of 2/3.
    assert (result.low, result.high) == pytest.approx((-1.959964 * (2 / 3 / 4) ** 0.5, 1.959964 * (2 / 3 / 4) ** 0.5))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 + 4 = 7", "7"),
        ("<answer>7.0</answer>", "7"),
        ("<answer>$1,200</answer> or 3", "1200"),
        ("\\boxed{New  York}", "new york"),
        ("I do not know", None),
        ("<answer>100</answer>", "100"),
    ],
)
def test_final_answer(text: str, answer: str | None):
    assert final_answer(text) == answer
