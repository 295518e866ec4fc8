"""task=generate: answers to questions, by a run's model or by a model alone."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from actors.data.sources import Row, load_rows
from actors.engines.stop_strings import StopStrings
from actors.rollout import RolloutWorker
from actors.types import Group
from conf.errors import UsageError, disk_errors
from conf.schema import Settings
from epiphany.rows import system_prompt_of
from epiphany.run_data import evaluation_rendering, load_model_source
from epiphany.use.model import Load, answer_sampling, describe, open_model


@dataclass(frozen=True)
class Answer:
    """One answer to a question; `sample` counts those to the same question, and `finish_reason` is "length" if it was
    cut off after `tokens` tokens."""

    question: str
    answer: str
    sample: int
    tokens: int
    finish_reason: str


def asked_rows(settings: Settings) -> list[Row]:
    """The questions that the settings ask. Raises UsageError if they ask none, or cannot be read."""
    asked = settings.generate
    if (asked.prompt is None) == (asked.prompts is None):
        raise UsageError("task=generate: give one question as prompt=<text>, or a file of them as prompts=<file>")
    system_prompt = system_prompt_of(settings, settings.data.system_prompt)
    if asked.prompt is not None:
        return text_rows([asked.prompt], system_prompt)
    assert asked.prompts is not None
    return load_rows(
        asked.prompts,
        name="prompts",
        task={},
        split="train",
        prompt_column=None,
        answer_column=None,
        system_prompt=system_prompt,
        max_bad_rows=0,
        seed=settings.run.seed,
    ).rows


def text_rows(texts: Sequence[str], system_prompt: str | None) -> list[Row]:
    """Each text as the question of a row."""
    if not all(text.strip() for text in texts):
        raise UsageError("a question is empty")
    first = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [
        Row((*first, {"role": "user", "content": text}), (), "prompts", {}, f"question {number}")
        for number, text in enumerate(texts, start=1)
    ]


def answers(
    settings: Settings, rows: Sequence[Row], *, note: Callable[[str], None], closing: ExitStack
) -> Iterator[Answer]:
    """The answers to the rows in their order, each as soon as it and those before it are there."""
    asked = settings.generate
    source, tokenizer = load_model_source(settings)
    sampling = answer_sampling(settings, temperature=asked.temperature, max_tokens=asked.max_tokens)
    StopStrings(sampling.stop, tokenizer)  # refuses what the tokenizer cannot write
    rendered = evaluation_rendering(settings).render(rows, tokenizer)
    prompts = [replace(prompt, ordinal=i, purpose="evaluate") for i, prompt in enumerate(rendered)]
    note(describe(settings))
    load = Load(len(prompts) * asked.samples, max(len(p.token_ids) for p in prompts), sampling.max_tokens)
    model = open_model(settings, source, tokenizer, load, note=note, closing=closing)
    worker = RolloutWorker(model.engine, seed=settings.run.seed)
    worker.dispatch(prompts, sampling, asked.samples)
    ready: dict[int, Group] = {}
    for prompt in prompts:
        while prompt.ordinal not in ready:
            for key in worker.run_engine().finished:
                ready[key[1]] = worker.pop_group(key)
        group = ready.pop(prompt.ordinal)
        for sample, trajectory in enumerate(group.trajectories):
            tokens = len(trajectory.token_ids)
            yield Answer(prompt.question, trajectory.text, sample, tokens, trajectory.finish_reason)


def generate(settings: Settings, note: Callable[[str], None], *, closing: ExitStack) -> None:
    """Answer what is asked: a single answer as text, several as JSON lines, on the standard output or in a file."""
    asked = settings.generate
    rows = asked_rows(settings)
    is_one = len(rows) == 1 and asked.samples == 1 and asked.output is None
    stream = sys.stdout
    if asked.output is not None:
        output = Path(asked.output).expanduser()
        with disk_errors(output.parent):
            output.parent.mkdir(parents=True, exist_ok=True)
            stream = closing.enter_context(output.open("w"))
    count = cut_off = longest = 0
    for answer in answers(settings, rows, note=note, closing=closing):
        print(answer.answer if is_one else json.dumps(asdict(answer)), file=stream, flush=True)
        count, longest = count + 1, max(longest, answer.tokens)
        cut_off += answer.finish_reason == "length"
    if cut_off:
        note(f"{cut_off} of {count} answers were cut off after {longest} tokens; generate.max_tokens allows more")
    if asked.output is not None:
        note(f"{count} answers written to {asked.output}")
