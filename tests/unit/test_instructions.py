"""IFEval's instructions: for each, a text that follows it and one that does not."""

import pytest

from rewards.errors import RewardError
from rewards.instructions import CHECKS, instructions
from rewards.sample import Sample

LANGUAGE = "language:response_language"
CASES = [
    ("keywords:existence", {"keywords": ["cat", "new york"]}, "Cats in New York.", "A cat in York."),
    (
        "keywords:frequency",
        {"keyword": "tea", "frequency": 2, "relation": "at least"},
        "Tea, more teapots.",
        "Tea and smoke.",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["bad"]}, "A badge.", "Not bad."),
    (
        "keywords:letter_frequency",
        {"letter": "z", "let_frequency": 2, "let_relation": "less than"},
        "Zoo.",
        "Zigzag.",
    ),
    (LANGUAGE, {"language": "de"}, "Das ist die richtige Antwort auf die Frage.", "This is the answer that is right."),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "One. Two 3.5!",
        "One of 3.5 kg.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One\n***\nTwo", "One\n\nTwo"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "Two words.", "Here are three."),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        'One.\n\n"Then two."',
        "One.\n\nNow two.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [place]", "[name] []"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\np. p. s. More.", "Bye. P.S."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n**c**", "* a"),
    ("detectable_format:constrained_response", {}, "Well: My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b c**", "*a* and **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Part", "num_sections": 2},
        "Part 1\na\nPart 2\nb",
        "Part one, Part 2",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<On cats>>\nText", "<<>> Text"),
    ("combination:two_responses", {}, "One.\n******\nTwo.\n******", "One.\n******\nOne."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why so?"}, "why so? Because.", "Because. Why so?"),
    ("startend:end_checker", {"end_phrase": "Any more questions?"}, "Done. Any more questions?", "Done."),
    ("startend:quotation", {}, '"All of it."', 'All "of it"'),
    ("change_case:english_capital", {}, "ALL OF IT, 3 TIMES", "Not ALL"),
    ("change_case:english_lowercase", {}, "all of it, 3 times", "Not all"),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "THIS is BIG.",
        "THIS is Big.",
    ),
    ("punctuation:no_comma", {}, "No such sign.", "One, at least."),
]


def share(ids: list[str], arguments: list[dict | None], text: str, *, strict: bool = False) -> float | None:
    row = {"instruction_id_list": ids, "kwargs": arguments}
    return instructions(Sample("q", text, None, metadata=row), strict=strict)


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_each_instruction_is_told_from_its_violation(name: str, arguments: dict, good: str, bad: str):
    unused = {**arguments, "other": None}  # the data set lists all arguments in every row
    assert (share([name], [unused], good), share([name], [unused], bad)) == (1, 0)


def test_every_instruction_is_tried():
    assert {name for name, *_ in CASES} == {*CHECKS, LANGUAGE}


def test_the_share_of_instructions_and_whether_all_are_followed():
    ids, arguments = ["punctuation:no_comma", "change_case:english_lowercase"], [None, {}]
    assert [share(ids, arguments, "No sign.", strict=strict) for strict in (False, True)] == [0.5, 0]
    assert [share(ids, arguments, "no sign.", strict=strict) for strict in (False, True)] == [1, 1]
    assert share(ids, arguments, "  ") == 0
    assert instructions(Sample("q", "text", None)) is None


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (["keywords:rhymes"], [{}], "keywords:rhymes is not known"),
        (["keywords:existence"], [{}], "arguments that it cannot use"),
        (["keywords:existence"], [{"keywords": "cat"}], "is no list"),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "about"}], "neither 'at least' nor"),
        (["punctuation:no_comma"], [{}, {}], "differ in length"),
        ([LANGUAGE], [{}], "needs language"),
    ],
)
def test_what_is_not_understood_is_refused(ids: list[str], arguments: list[dict | None], message: str):
    with pytest.raises(RewardError, match=message):
        share(ids, arguments, "Some text.")
