"""What a run says before its first step: the data, the first prompt, and whether its own answer gets full marks."""

import json
from collections.abc import Callable

from actors.pipeline import Pipeline
from actors.prompts import PromptSet
from actors.reward import RewardWorker
from actors.sources import DataError, Loaded
from conf.schema import Settings
from rewards.sample import Sample


def introduce(settings: Settings, rows: Loaded, prompts: PromptSet, note: Callable[[str], None]) -> None:
    """Say what is trained on, and what was left out."""
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


def check_gold(
    settings: Settings, rows: Loaded, prompts: PromptSet, pipeline: Pipeline, note: Callable[[str], None]
) -> None:
    """Show the first prompt and the score of its own answer. Raises DataError if that is not full marks."""
    prompt = prompts.at(0)
    note(f"the first prompt, as the model sees it:\n{prompt.text}")
    if prompt.answer is None or rows.answer_column is None:
        return
    worker = pipeline.one("reward")
    completion, full = worker.submit(RewardWorker.gold, prompt.answer).result()
    sample = Sample(prompt.question, completion, prompt.answer, prompt.task, metadata=json.loads(prompt.metadata))
    score = worker.submit(RewardWorker.score_sample, sample).result()
    note(
        f"its gold answer {prompt.answer!r} scores {score.reward} of {full:g}"
        + (f" ({score.error})" if score.error else "")
    )
    if settings.reward.check_gold and (score.reward is None or score.reward < full - 1e-9):
        raise DataError(
            f"the gold answer {completion!r} does not score full marks ({score.terms}): check the reward and "
            "data.answer_column, or set reward.check_gold=false"
        )
