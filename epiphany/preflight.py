"""What is checked and shown before the first step: shadowed modules, the data, the first prompt, and its reference
answer.

Knows data and rewards; starts nothing.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from actors.data.prompts import PromptSet
from actors.data.sources import DataError, Loaded, load_rows
from actors.models.hub import resolve_model
from actors.models.source import ModelSource
from actors.models.tokenizer import load_tokenizer
from actors.reward import RewardWorker
from actors.runtime.supervisor import Supervisor
from conf.schema import Settings
from conf.validate import named_terms
from rewards.correctness import plain_number
from rewards.sample import Sample


@dataclass(frozen=True)
class RunData:
    """What a run is trained on, and the model that it is rendered for."""

    rows: Loaded
    prompts: PromptSet
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase


def load_model_source(settings: Settings) -> tuple[ModelSource, PreTrainedTokenizerBase]:
    """Find the model, and load its tokenizer."""
    model = settings.model
    source = resolve_model(model.path, revision=model.revision, package=model.package, package_path=model.package_path)
    tokenizer = load_tokenizer(source, chat_template=model.chat_template, trust_remote_code=model.trust_remote_code)
    return source, tokenizer


def load_data(settings: Settings) -> RunData:
    """Read the rows, and render them as prompts."""
    data = settings.data

    def load(source: str, task: dict[str, object]) -> Loaded:
        return load_rows(
            source,
            task=task,
            split=data.split,
            prompt_column=data.prompt_column,
            answer_column=data.answer_column,
            system_prompt=settings.reward.system_prompt if data.system_prompt is None else data.system_prompt,
            max_bad_rows=data.max_bad_rows,
            seed=data.seed,
        )

    held_out = None
    if data.held_out_source is not None:
        held_out = load(data.held_out_source, {**data.task, **data.held_out_task})
    rows = load(data.source, data.task)
    source, tokenizer = load_model_source(settings)
    prompts = PromptSet(
        rows.rows,
        tokenizer,
        held_out=data.held_out,
        max_prompt_tokens=data.max_prompt_tokens,
        seed=data.seed,
        held_out_rows=None if held_out is None else held_out.rows,
    )
    return RunData(rows, prompts, source, tokenizer)


def describe_data(settings: Settings, data: RunData, note: Callable[[str], None]) -> None:
    """Say what is trained on, what was left out, and show the first prompt."""
    rows, prompts = data.rows, data.prompts
    note(
        f"data {settings.data.source}: {prompts.size} prompts to train on, {len(prompts.held_out)} held out; "
        f"prompt from {rows.prompt_column!r}, answer from {rows.answer_column!r}"
    )
    if rows.bad:
        note(f"skipped {len(rows.bad)} bad rows, the first: {rows.bad[0]}")
    if prompts.overlap:
        note(f"{prompts.overlap} of the held-out prompts are trained on, too")
    if prompts.too_long:
        note(f"left out {prompts.too_long} prompts of over {settings.data.max_prompt_tokens} tokens")
    note(f"the first prompt, as the model sees it:\n{prompts.at(0).text}")


def check_reference_answer(
    settings: Settings, data: RunData, supervisor: Supervisor, note: Callable[[str], None]
) -> None:
    """Show the score of the first prompt's reference answer. Raises DataError if it is not the maximum score."""
    prompt = data.prompts.at(0)
    if prompt.answer is None or data.rows.answer_column is None:
        return
    worker = supervisor.slot("reward")
    completion, max_score = worker.submit(RewardWorker.reference_completion, prompt.answer).result()
    sample = Sample(
        prompt.question,
        completion,
        prompt.answer,
        prompt.task,
        metadata=json.loads(prompt.metadata),
        answers=prompt.answers,
    )
    score = worker.submit(RewardWorker.score_sample, sample).result()
    if score.reward is None:
        note(f"its reference answer {prompt.answer!r} cannot be scored: {score.error}")
    else:
        of_maximum = "" if max_score is None else f" of {max_score:g}"
        note(f"its reference answer {prompt.answer!r} scores {score.reward:g}{of_maximum}")
    if not settings.reward.check_reference_answer:
        return
    if score.reward is None:
        advice = (
            f"the reference answer {completion!r} cannot be scored: correct the reward or data.answer_column, or set "
            "reward.check_reference_answer=false"
        )
        if any(term.fn == "numeric" for term in settings.reward.terms) and plain_number(prompt.answer) is None:
            advice = (
                f"the reference answer {prompt.answer!r} is no number: choose reward=exact for words, reward=math for "
                "mathematics, or another data.answer_column"
            )
        raise DataError(f"{score.error}\n{advice}")
    if max_score is not None and score.reward < max_score - 1e-9:
        raise DataError(
            f"the reference answer {completion!r} scores {score.reward:g}, not the maximum of {max_score:g} "
            f"({score.terms}): check the reward and data.answer_column, or set reward.check_reference_answer=false"
        )


def reward_fingerprint(settings: Settings) -> str:
    """Tells whether scores can be compared: a hash of the reward's terms and of the user's files that hold them."""
    digest = hashlib.sha256()
    for term in named_terms(settings.reward.terms):
        digest.update(json.dumps([term.fn, term.name, term.weight, dict(term.options)], sort_keys=True).encode())
        file = Path(term.fn.rpartition(":")[0]).expanduser()
        if file.suffix == ".py" and file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
