"""A run's model in use: what it answers is what the run's own evaluations saw, alone, in a conversation, measured again
and as the start of another run.
"""

import json
from contextlib import ExitStack
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import epiphany
from conf.errors import UsageError
from epiphany import sampling_workers
from epiphany.use import chat, evaluate
from tests.helpers.runs import launch, overrides, rows

Whole = tuple[Path, str]


def saved_answers(folder: Path, step: int) -> dict[str, str]:
    """The greedy answers of the run's own evaluation by their questions."""
    saved = pq.read_table(folder / "evaluations" / f"step-{step:06d}.parquet").to_pylist()
    return {row["question"]: row["completion"] for row in saved if row["temperature"] == 0}


def quiet(_line: str) -> None: ...


def test_answers_are_those_of_the_runs_own_evaluation(whole: Whole, tmp_path: Path):
    folder, _ = whole
    after, before = saved_answers(folder, 4), saved_answers(folder, 0)
    questions = list(after)
    assert epiphany.generate(questions, f"run={folder}") == list(after.values())
    assert epiphany.generate(questions, f"run={folder}", "model.adapter=null") == list(before.values())
    assert after != before
    twice = epiphany.generate(questions[0], f"run={folder}", "generate.samples=2", "generate.temperature=1")
    assert len(twice) == 2


def test_one_answer_is_text_and_several_are_lines_of_json(whole: Whole, tmp_path: Path):
    folder, _ = whole
    after = saved_answers(folder, 4)
    question, answer = next(iter(after.items()))
    output = launch([f"run={folder}", "task=generate", f"prompt={question}"])
    assert answer in output and "were cut off after" in output
    file, result = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"question": asked}) + "\n" for asked in after))
    launch([f"run={folder}", "task=generate", f"prompts={file}", f"generate.output={result}"])
    lines = [json.loads(line) for line in result.read_text().splitlines()]
    assert {line["question"]: line["answer"] for line in lines} == after
    assert all(line["finish_reason"] == "length" and line["tokens"] == 6 for line in lines if len(line["answer"]) > 6)


def test_a_conversation_shows_each_piece_and_forgets_what_has_no_room(whole: Whole):
    folder, _ = whole
    question, answer = next(iter(saved_answers(folder, 4).items()))
    settings = epiphany.load_settings("task=chat", f"run={folder}", "chat.max_tokens=6", "chat.context_tokens=60")
    with ExitStack() as closing:
        conversation = chat.open_conversation(settings, quiet, closing=closing)
        model = conversation.model
        assert model.adapter is not None
        token_ids, left_out = conversation.prompt(question)
        pieces = list(conversation.answer(token_ids, model.adapter))
        assert "".join(pieces) == answer and left_out == 0 and len(pieces) > 2
        assert "".join(conversation.answer(token_ids, model.nothing)) == saved_answers(folder, 0)[question]
        conversation.messages.append({"role": "assistant", "content": answer})
        lengths = [len(token_ids)]
        while not left_out:
            token_ids, left_out = conversation.prompt(question)
            conversation.messages.append({"role": "assistant", "content": answer})
            lengths.append(len(token_ids))
        assert lengths == sorted(lengths[:-1]) + lengths[-1:] and max(lengths) <= 60
        conversation.clear()
        assert len(conversation.prompt(question)[0]) == lengths[0]
        with pytest.raises(UsageError, match="more than chat"):
            conversation.prompt("and " * 60)


def test_chat_reads_lines_and_compares_with_the_base(whole: Whole, capfd: pytest.CaptureFixture[str]):
    folder, _ = whole
    question, answer = next(iter(saved_answers(folder, 4).items()))
    settings = epiphany.load_settings("task=chat", f"run={folder}", "chat.max_tokens=6", "chat.compare=true")
    notes: list[str] = []
    with ExitStack() as closing, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", iter([f"{question}\n", "/help\n", "/new\n", "/quit\n", "never read\n"]))
        patch.setattr(chat, "_lines", lambda: (line.strip() for line in chat.sys.stdin))
        chat.chat(settings, notes.append, closing=closing)
    shown = capfd.readouterr().out
    assert f"[base]\n{saved_answers(folder, 0)[question]}\n[adapter]\n{answer}\n" in shown
    assert notes.count(chat.HELP) == 1


def test_an_evaluation_equals_the_runs_own_and_goes_on_where_it_was_stopped(whole: Whole, tmp_path: Path):
    folder, _ = whole
    output = launch([f"run={folder}", "task=evaluate"])
    (found,) = (folder / "evaluated").iterdir()
    result = json.loads((found / "result.json").read_text())
    own = {row["step"]: row for row in rows(folder, "evaluations")}
    for name, step in (("base", 0), ("adapter", 4)):
        for kind in ("greedy", "sampled"):
            assert result["models"][name][kind] == own[step][kind]
    compared = result["paired"]
    difference = own[4]["greedy"]["reward"] - own[0]["greedy"]["reward"]
    assert compared["difference"] == pytest.approx(difference) and f"{compared['questions']} questions" in output
    again = launch([f"run={folder}", "task=evaluate"])
    assert "measured already" in again

    settings = epiphany.load_settings("task=evaluate", f"run={folder}", f"evaluation.output={tmp_path / 'parts'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_workers, "COMPLETIONS", 1)
        kept: list[int] = []

        def is_enough() -> bool:
            file = tmp_path / "parts" / "partial.jsonl"
            kept.append(len(file.read_text().splitlines()) - 1 if file.is_file() else 0)
            return kept[-1] >= 3

        with ExitStack() as closing:
            assert evaluate.evaluate(settings, quiet, stop=is_enough, closing=closing) is None
        assert kept[-1] == 3
        with ExitStack() as closing:
            verdict = evaluate.evaluate(settings, quiet, stop=lambda: False, closing=closing)
    assert verdict is not None and verdict.models == result["models"]
    assert not (tmp_path / "parts" / "partial.jsonl").exists()
    settings.evaluation.samples = 2
    with ExitStack() as closing, pytest.raises(UsageError, match="holds another evaluation"):
        evaluate.evaluate(settings, quiet, stop=lambda: False, closing=closing)


def test_an_evaluation_takes_a_file_with_checked_answers(whole: Whole, tmp_path: Path):
    folder, _ = whole
    file = tmp_path / "more.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i} + 2", "answer": str(i + 2)}) + "\n" for i in range(5)))
    chosen = [f"evaluation.source={file}", "reward=exact", "evaluation.samples=2", "evaluation.max_prompts=4"]
    output = launch([f"run={folder}", "task=evaluate", *chosen])
    (result,) = (json.loads(file.read_text()) for file in folder.glob("evaluated/more-*/result.json"))
    measures = result["models"]["adapter"]
    assert measures["greedy"]["prompts"] == 4 and list(measures["of_samples"]) == ["pass@1", "pass@2", "maj@2"]
    assert "more: greedy, 2 sampled at temperature 1; at most 6 tokens; reward 1 x exact" in output


def test_training_starts_from_an_adapter(whole: Whole, tiny_model: Path, tmp_path: Path):
    folder, _ = whole
    start = f"model.adapter={folder / 'adapter'}"
    arguments = overrides(tiny_model, tmp_path / "more", "run.steps=1", start)
    arguments.remove("model.lora.rank=4")
    launch(arguments)
    assert saved_answers(tmp_path / "more", 0) == saved_answers(folder, 4)
    output = launch([*arguments, "model.lora.rank=8"], expect=2)
    assert "model.lora.rank=8: the adapter in model.adapter has its own" in output
    output = launch([*arguments, "algorithm.kl_coefficient=0.1"], expect=2)
    assert "the reference policy is the base model" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run={run}", "model.path=other"], "has settled this"),
        (["run={run}", "algorithm=dapo"], "has settled this"),
        (["run={run}", "experiment=gsm8k"], "has settled this"),
        (["run={run}", "model.lora.rank=8"], "has settled this"),
        (["run={run}", "learner.learning_rate=many"], "learner.learning_rate=many"),
        (["run={run}/none"], "there is no run"),
        (["run={run}", "model.adapter={run}/journal"], "there is no adapter_config.json"),
    ],
)
def test_what_a_run_does_not_have_is_refused(whole: Whole, arguments: list[str], message: str):
    folder, _ = whole
    with pytest.raises(UsageError, match=message):
        epiphany.generate("2 + 1", *(argument.format(run=folder) for argument in arguments))


def test_the_command_of_the_run_uses_it_with_another_task(
    whole: Whole, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = whole
    again = epiphany.load_settings("task=chat", *overrides(tiny_model, folder), "algorithm=grpo")
    assert again.model.adapter == str(folder / "adapter") and again.sampling.max_tokens == 6
    monkeypatch.chdir(tmp_path)
    alone = epiphany.load_settings("task=chat", "model.path=other")
    assert alone.model.adapter is None and alone.model.path == "other"


def test_presets_and_settings_change_those_of_the_run(whole: Whole):
    folder, _ = whole
    settings = epiphany.load_settings("task=evaluate", f"run={folder}", "reward=exact", "sampling.max_tokens=9")
    assert [term.fn for term in settings.reward.terms] == ["exact"] and settings.sampling.max_tokens == 9
    assert settings.algorithm.group_size == 4 and settings.model.adapter == str(folder / "adapter")
    benchmark = epiphany.load_settings("task=evaluate", f"run={folder}", "benchmark=math500")
    assert benchmark.evaluation.source == "HuggingFaceH4/MATH-500" and benchmark.evaluation.samples == 1
