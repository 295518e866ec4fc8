"""task=evaluate: how good a model is, alone or beside its base, on held-out questions, a file or a named benchmark.

Answers are kept as they come, so that the same command goes on where it was stopped. Knows workers that sample and
score; how the result is computed and shown is verdict.py's.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from actors.models.loading import fingerprint
from actors.models.source import ModelSource
from actors.pipeline import Pipeline
from actors.types import Adapter, Group, Prompt, Sampling, Score, Trajectory, Turn, VersionSpan
from conf.errors import UsageError
from conf.schema import Settings
from conf.validate import check_settings
from epiphany.adapters import adapter_layout_of, no_adapter, stored_adapter
from epiphany.identity import adapter_fingerprint, reward_fingerprint, user_files
from epiphany.report.partial_results import PartialResults
from epiphany.report.run_folder import Layout
from epiphany.reward_check import check_reward
from epiphany.rows import read_rows
from epiphany.run_data import evaluation_rendering, load_data, load_model_source
from epiphany.sampling import evaluation_sampling
from epiphany.sampling_workers import scored_in_parts, start_sampling
from epiphany.use.model import describe
from epiphany.use.verdict import Answers, Verdict, read_verdict


@dataclass(frozen=True)
class Questions:
    """The questions of an evaluation, and how many more were left out because they are too long."""

    name: str
    prompts: list[Prompt]
    too_long: int


def evaluate(
    settings: Settings, note: Callable[[str], None], *, stop: Callable[[], bool], closing: ExitStack
) -> Verdict | None:
    """Measure the model, and its base if there is an adapter; None if it was asked to stop. Raises UsageError."""
    settings = with_own_source(settings)
    source, questions = load_questions(settings, note)
    mark = _identity(settings, source, questions)
    folder = output_folder(settings, questions, mark)
    if (done := read_verdict(folder)) is not None:
        if done.identity != mark:
            raise UsageError(f"evaluation.output={folder} holds another evaluation; name another folder")
        note(f"measured already: {folder}")
        return done
    started = time.monotonic()
    log = PartialResults[str](folder / "partial.jsonl", mark)
    note(f"{describe(settings)}: {len(questions.prompts)} questions of {questions.name}")
    if log.results:
        note(f"{len(log.results)} groups of answers are there already")
    pipeline = start_sampling(settings, folder, note, closing)
    answers = {}
    for name, adapter in adapters(settings, source).items():
        pipeline.broadcast(adapter)
        of_model = _answers(name, questions, settings, pipeline, log, stop)
        if of_model is None:
            return None
        answers[name] = of_model
    verdict = Verdict.of(
        settings,
        answers,
        identity=mark,
        questions=questions.name,
        too_long=questions.too_long,
        seconds=time.monotonic() - started,
    )
    verdict.save(folder, answers)
    log.delete()
    note(f"written to {folder}")
    return verdict


def with_own_source(settings: Settings) -> Settings:
    """With evaluation.source as the only source of data, if it is set. Raises UsageError if that cannot work."""
    asked = settings.evaluation
    if asked.source is None:
        return settings
    data = replace(
        settings.data,
        source=asked.source,
        sources=[],
        task={},
        split=asked.split,
        prompt_column=asked.prompt_column,
        answer_column=asked.answer_column,
        held_out_source=None,
        difficulty=None,
    )
    changed = replace(settings, data=data, warmup=replace(settings.warmup, steps=0))
    check_settings(changed)
    return changed


def load_questions(settings: Settings, note: Callable[[str], None]) -> tuple[ModelSource, Questions]:
    """The questions, rendered for the model that answers them: evaluation.source's, else the run's held-out ones."""
    settings = replace(settings, warmup=replace(settings.warmup, steps=0))
    rows = read_rows(settings)
    check_reward(settings, rows, note)
    most = settings.evaluation.max_prompts
    if settings.evaluation.source is None:
        data = load_data(settings, rows)
        name = settings.data.held_out_source or ", ".join(f"{loaded.name} (held out)" for loaded in rows.train)
        return data.source, Questions(name, data.prompts.held_out[:most], data.prompts.too_long)
    source, tokenizer = load_model_source(settings)
    loaded = rows.train[0]
    rendered = evaluation_rendering(settings).render(loaded.rows[:most], tokenizer)
    fitting = [prompt for prompt in rendered if len(prompt.token_ids) <= settings.data.max_prompt_tokens]
    prompts = [replace(prompt, ordinal=i, purpose="evaluate") for i, prompt in enumerate(fitting)]
    return source, Questions(loaded.name, prompts, len(rendered) - len(fitting))


def adapters(settings: Settings, source: ModelSource) -> dict[str, Adapter]:
    """The adapters to measure by name: `base`, which does nothing, and `adapter`, or one of them."""
    layout = adapter_layout_of(settings, source)
    adapter = stored_adapter(settings, layout)
    if adapter is None:
        return {"base": no_adapter(layout)}
    return {**({"base": no_adapter(layout)} if settings.evaluation.compare_base else {}), "adapter": adapter}


def output_folder(settings: Settings, questions: Questions, mark: str) -> Path:
    """Where the result goes: evaluations that differ in anything that matters have folders of their own."""
    if settings.evaluation.output is not None:
        return Path(settings.evaluation.output).expanduser()
    run = Layout(Path(settings.run.folder))
    parent = run.path / "evaluated" if run.settings.is_file() else Path("evaluated")
    name = "".join(letter if letter.isalnum() else "-" for letter in questions.name).strip("-")
    return parent / f"{name[:40]}-{mark[:8]}"


def _answers(
    name: str,
    questions: Questions,
    settings: Settings,
    pipeline: Pipeline,
    log: PartialResults[str],
    stop: Callable[[], bool],
) -> Answers | None:
    """A greedy answer and the sampled ones to every question by the adapter that was broadcast; None once stopped."""
    sampling, samples = evaluation_sampling(settings), settings.evaluation.samples
    kinds: dict[str, tuple[Sampling, int]] = {"greedy": (replace(sampling, temperature=0.0), 1)}
    if samples:
        kinds["sampled"] = (sampling, samples)
    groups: dict[str, list[Group]] = {"sampled": []}
    for kind, (how, count) in kinds.items():
        keys = {prompt.ordinal: f"{name}/{kind}/{prompt.ordinal}" for prompt in questions.prompts}
        waiting = [prompt for prompt in questions.prompts if keys[prompt.ordinal] not in log.results]
        for answered in scored_in_parts(pipeline, waiting, how, count, stop=stop):
            if answered is None:
                return None
            log.add({keys[group.prompt.ordinal]: _to_json(group) for group in answered})
        groups[kind] = [_from_json(prompt, log.results[keys[prompt.ordinal]]) for prompt in questions.prompts]
    return Answers(groups["greedy"], groups["sampled"])


def _to_json(group: Group) -> list[dict[str, Any]]:
    """The trajectories of a group with their scores."""
    pairs = zip(group.trajectories, group.scores, strict=True)
    return [{**asdict(trajectory), "score": asdict(score)} for trajectory, score in pairs]


def _from_json(prompt: Prompt, samples: Sequence[dict[str, Any]]) -> Group:
    trajectories = tuple(
        Trajectory(
            token_ids=tuple(sample["token_ids"]),
            turns=tuple(Turn(**turn) for turn in sample["turns"]),
            logprobs=tuple(sample["logprobs"]),
            text=sample["text"],
            finish_reason=sample["finish_reason"],
            version_spans=tuple(VersionSpan(**span) for span in sample["version_spans"]),
        )
        for sample in samples
    )
    return Group(prompt, trajectories, "", scores=tuple(Score(**sample["score"]) for sample in samples))


def _identity(settings: Settings, source: ModelSource, questions: Questions) -> str:
    """A hash of all that the answers and their scores depend on."""
    parts: list[Any] = [
        fingerprint(source),
        adapter_fingerprint(settings),
        [settings.model.quantization, settings.model.dtype, list(settings.model.keep_16bit)],
        [settings.evaluation.samples, settings.evaluation.compare_base, settings.run.seed],
        asdict(evaluation_sampling(settings)),
        reward_fingerprint(settings, user_files(settings)),
        [asdict(prompt) for prompt in questions.prompts],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
