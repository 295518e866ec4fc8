"""The page of a run in a real browser: its figures, its texts, and that nothing of a model is markup or runs."""

import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from benchmarks.report_page import made_up_run
from conf.errors import UsageError
from epiphany.commands import COMMANDS
from epiphany.report.page.answers import _outcome as outcome
from epiphany.report.page.html import render
from epiphany.report.page.rollouts import pieces_of
from epiphany.run_settings import load_settings
from tests.helpers.browser import browser, find_browser
from tests.helpers.runs import rows

HOSTILE = (
    "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'> <!-- \u202egnp.exe\u2066 \u200b"
    "javascript:alert(1) {{7*7}} 中文 \x07 \U000e0041"
)
# In CI it must be there: a skipped test proves nothing.
needs_browser = pytest.mark.skipif(
    find_browser() is None and "CI" not in os.environ, reason="needs Chromium (apt-get install chromium)"
)


def write_page(folder: Path, *overrides: str) -> Path:
    settings = load_settings("task=report", f"run={folder}", *overrides)
    assert COMMANDS["report"](settings, lambda *_: None) == 0
    return folder / "report.html"


def content_of(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@needs_browser
def test_a_run_leaves_a_page_whose_figures_are_those_of_its_metrics(whole: tuple[Path, str], tmp_path: Path):
    folder, output = whole
    assert f"the report is {folder / 'report.html'}" in output
    metrics = rows(folder)
    with browser(tmp_path) as page:
        page.open(folder / "report.html")
        assert page.problems == []
        for name in ("reward", "seconds", "logprob_gap", "completion_tokens"):
            told = page.value(
                f"""(() => {{
                  const figure = document.querySelector('figure[data-name="{name.replace("_", " ")}"]');
                  const box = figure.querySelector('svg').getBoundingClientRect();
                  return [0, 0.35, 0.65, 1].map((share) => {{
                    const at = box.left + box.width * (52 + share * (380 - 62)) / 380;
                    figure.querySelector('svg').dispatchEvent(new PointerEvent('pointermove', {{clientX: at}}));
                    return figure.querySelector('.readout').textContent;
                  }});
                }})()"""
            )
            assert [float(text.split()[-1]) for text in told] == [row[name] for row in metrics]
            assert [text.split(":")[0] for text in told] == [f"step {row['step']}" for row in metrics]
        tables = page.value("[...document.querySelectorAll('td')].map((cell) => cell.textContent)")
    greedy = rows(folder, "evaluations")[-1]["greedy"]
    assert f"{greedy['mean_tokens']:.4g}" in tables and f"{greedy['truncated']:.1%}" in tables


@needs_browser
def test_what_a_model_writes_is_shown_as_text_and_never_runs(tiny_model: Path, tmp_path: Path):
    text = HOSTILE + "x" * 1_000_000
    made_up_run(tmp_path / "run", steps=2, groups=2, questions=8, text=text, overrides=(f"model.path={tiny_model}",))
    table = pq.read_table(tmp_path / "run" / "completions" / "step-000002.parquet").to_pylist()
    tokens = tokens_of(HOSTILE, tiny_model)
    for row in table:
        count = len(row["token_ids"]) - row["prompt_length"]
        row["token_ids"] = [*row["token_ids"][: row["prompt_length"]], *(tokens * count)[:count]]
        row |= {"question": text, "reference": HOSTILE, "error": HOSTILE}
    schema = pq.read_schema(tmp_path / "run" / "completions" / "step-000002.parquet")
    pq.write_table(pa.Table.from_pylist(table, schema), tmp_path / "run" / "completions" / "step-000002.parquet")
    file = write_page(tmp_path / "run")
    assert file.stat().st_size < 20 * 2**20
    with browser(tmp_path / "profile") as page:
        page.open(file)
        compared = page.value("[...document.querySelectorAll('.columns pre')].map((pre) => pre.textContent)")
        page.value("[...document.querySelectorAll('.tabs button')].find((b) => b.textContent == 'step 2').click()")
        page.value("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        shaded = {}
        for shading in ("log-probability", "gap", "plain"):
            page.value(
                "[...document.querySelectorAll('.tabs button')]"
                f".find((button) => button.textContent.includes({shading!r})).click()"
            )
            shaded[shading] = page.value(
                "[...document.querySelectorAll('.answer pre')].map((pre) => "
                "[pre.textContent, [...pre.querySelectorAll('span')].filter((span) => span.style.background).length])"
            )
        questions = page.value("[...document.querySelectorAll('.question-text')].map((p) => p.textContent)")
        assert page.value("window.ran") is None
        assert page.value("document.querySelectorAll('img, iframe, script').length") == 2  # the content and ours
        assert page.problems == []
    assert compared and all(is_shown(text) and "characters are left out" in text for text in compared)
    assert questions and all(map(is_shown, questions))
    assert len(shaded["gap"]) == 16  # both groups stay open when the shading changes
    for shading, answers in shaded.items():
        assert all(is_shown(text) for text, _ in answers)
        assert all((marked > 100) == (shading != "plain") for _, marked in answers)


def is_shown(text: str) -> bool:
    """Whether a text of the page begins with all of HOSTILE, its hidden characters by their codes."""
    visible = HOSTILE
    for hidden in "\u202e\u2066\u200b\x07\U000e0041":
        visible = visible.replace(hidden, f"U+{ord(hidden):04X}")
    return text.startswith(visible)


def test_outcomes_without_a_checked_answer_are_those_of_the_reward():
    def row(reward: float | None, lenient: float | None = None) -> dict:
        return {"reward": reward, "lenient": lenient}

    assert [outcome(row(0.3), row(after), key="reward") for after in (0.4, 0.2, 0.3, None)] == [
        *("rose", "fell", "stayed"),
        None,
    ]
    assert outcome(row(0.3, 0.25), row(0.6, 0.5), key="lenient") == "wrong"
    assert outcome(row(0.3, 0.25), row(1.0, 1.0), key="lenient") == "won"
    assert outcome(None, row(1.0, 1.0), key="lenient") is None


def test_tokens_that_are_parts_of_characters_are_shown_whole(tiny_model: Path):
    """The tiny tokenizer has a token for each byte."""
    tokenizer, tokens = AutoTokenizer.from_pretrained(tiny_model), tokens_of("a 中文 b", tiny_model)
    assert pieces_of(tokens, tokenizer) == ["a", " ", "", "", "中", "", "", "文", " ", "b"]
    cut = pieces_of(tokens[:4], tokenizer)
    assert cut is not None and "".join(cut) == tokenizer.decode(tokens[:4]) and len(cut) == 4
    backwards = pieces_of(tokens[::-1], tokenizer)
    assert backwards is not None and len(backwards) == len(tokens)


def tokens_of(text: str, model: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"]


@needs_browser
def test_runs_are_laid_over_each_other_and_what_differs_is_listed(tiny_model: Path, tmp_path: Path):
    for name, rate in (("one", "1e-4"), ("two", "3e-4")):
        changed = (f"model.path={tiny_model}", f"learner.learning_rate={rate}")
        made_up_run(tmp_path / name, steps=3, groups=2, questions=4, overrides=changed)
    page_file = write_page(tmp_path / "one", f"report.compare=[{tmp_path / 'two'}]")
    with browser(tmp_path / "profile") as page:
        page.open(page_file)
        assert page.problems == []
        assert page.value("""document.querySelectorAll('figure[data-name="reward"] path').length""") == 2
        assert page.value("document.querySelector('.legend').textContent").split() == ["●", "one", "●", "two"]
        differing = page.value("[...document.querySelectorAll('h4 + .scroll tr')].map((row) => row.textContent)")
    assert "learner.learning_rate0.00010.0003" in differing


def test_tokens_are_shown_with_what_engine_and_learner_gave_them(tiny_model: Path, tmp_path: Path):
    overrides = (f"model.path={tiny_model}",)
    made_up_run(tmp_path / "run", steps=20, groups=6, answers=9, tokens=3000, questions=4, overrides=overrides)
    content = content_of(write_page(tmp_path / "run"))
    assert [step["step"] for step in content["rollouts"]] == [1, 4, 6, 9, 12, 15, 17, 20]
    step = content["rollouts"][0]
    assert step["of_groups"] == 6 and [len(group["answers"]) for group in step["groups"]] == [8] * 4
    answer = step["groups"][0]["answers"][0]
    lengths = {len(answer[name]) for name in ("pieces", "logprobs", "policy_logprobs")}
    assert lengths == {3000 - answer["left_out"]} and answer["left_out"] > 0
    assert set(answer["policy_logprobs"]) == {-0.9}


def test_without_the_model_the_page_has_texts_and_says_why(tiny_model: Path, tmp_path: Path, capsys):
    made_up_run(tmp_path / "run", steps=1, groups=1, questions=4, overrides=(f"model.path={tiny_model}",))
    settings = tmp_path / "run" / "settings.json"
    settings.write_text(settings.read_text().replace(str(tiny_model), "/nowhere/model"))
    content = content_of(write_page(tmp_path / "run"))
    assert not content["has_tokens"] and content["rollouts"][0]["groups"][0]["answers"][0]["text"]
    assert "the report shows no tokens: " in capsys.readouterr().err


def test_a_title_is_text_and_a_number_that_is_none_is_null():
    page = render({"a": float("nan"), "b": [float("inf"), 1.5]}, title="</title><script>")
    assert "<title>&lt;/title&gt;&lt;script&gt;</title>" in page and '{"a":null,"b":[null,1.5]}' in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="holds no run"):
        write_page(tmp_path)
