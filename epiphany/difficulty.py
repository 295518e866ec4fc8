"""task=difficulty: how often the model answers each prompt right, written beside the data.

What is measured is kept as it comes, so that the same command goes on where it was stopped. Knows workers that sample
and score; knows no learner.
"""

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from actors.data.prompts import PASS_RATE
from actors.engines.stop_strings import StopStrings
from actors.models.loading import fingerprint
from actors.replay.admission import is_solved
from actors.types import Group, Prompt
from conf.errors import UsageError, disk_errors
from conf.schema import Settings
from conf.sources import named_sources
from epiphany.adapters import adapter_layout_of, stored_adapter
from epiphany.identity import adapter_fingerprint, reward_fingerprint, user_files
from epiphany.preflight import check_inputs
from epiphany.report.partial_results import PartialResults
from epiphany.reward_check import check_reward
from epiphany.run_data import load_model_source, training_rendering
from epiphany.sampling import training_sampling
from epiphany.sampling_workers import scored_in_parts, start_sampling


def measure(
    settings: Settings, note: Callable[[str], None], *, stop: Callable[[], bool], closing: ExitStack
) -> Path | None:
    """Measure all prompts and write the file; None if it was asked to stop. Raises UsageError."""
    rows = check_inputs(settings)
    if len(rows.train) > 1:
        raise UsageError("task=difficulty: measure one source at a time, named by data.source")
    max_score = check_reward(settings, rows, note)[rows.train[0].name]
    measured_rows = rows.train[0].rows[: settings.difficulty.max_prompts]
    output = output_file(settings)
    source, tokenizer = load_model_source(settings)
    StopStrings(settings.sampling.stop, tokenizer)  # refuses what the tokenizer cannot write
    prompts = [
        replace(prompt, ordinal=number, purpose="evaluate")
        for number, prompt in enumerate(training_rendering(settings).render(measured_rows, tokenizer))
    ]
    mark = _identity(settings, fingerprint(source), prompts)
    log = PartialResults[int](output.with_suffix(f".{mark[:8]}.partial"), mark)
    note(f"{len(prompts)} prompts of {rows.train[0].name}, {len(log.results)} of them measured already")
    longest = settings.data.max_prompt_tokens
    waiting = [p for p in prompts if p.ordinal not in log.results and len(p.token_ids) <= longest]
    if waiting:
        pipeline = start_sampling(settings, output.parent, note, closing)
        if (adapter := stored_adapter(settings, adapter_layout_of(settings, source))) is not None:
            pipeline.broadcast(adapter)
        sampling, samples = training_sampling(settings), settings.difficulty.samples
        for groups in scored_in_parts(pipeline, waiting, sampling, samples, stop=stop):
            if groups is None:
                return None
            log.add({group.prompt.ordinal: _result(group, max_score) for group in groups})
            if len(log.results) < len(prompts):
                note(f"{len(log.results)} of {len(prompts)}: {_summary(log.results)}")
    unknown = {PASS_RATE: None, "mean_reward": None}
    with disk_errors(output.parent):
        scratch = output.with_suffix(".writing")
        with scratch.open("w") as stream:
            for number, row in enumerate(measured_rows):
                stream.write(json.dumps({**row.metadata, **log.results.get(number, unknown)}) + "\n")
        scratch.rename(output)
    log.delete()
    note(_summary(log.results))
    note(f"written to {output}; to train on what is neither too easy nor too hard: data.difficulty=[0.1, 0.9]")
    return output


def output_file(settings: Settings) -> Path:
    """Where the measured rows go. Raises UsageError if that is the file that is measured."""
    source = Path(named_sources(settings.data)[0].source).expanduser()
    if settings.difficulty.output is not None:
        output = Path(settings.difficulty.output).expanduser()
        if output.suffix != ".jsonl" or output.resolve() == source.resolve():
            raise UsageError(f"difficulty.output={output}: name another .jsonl file than data.source")
        return output
    if source.is_file():
        return source.with_name(f"{source.stem}.difficulty.jsonl")
    return Path(settings.run.folder) / "difficulty.jsonl"


def _identity(settings: Settings, model: str, prompts: Sequence[Prompt]) -> str:
    """A hash of all that the results depend on."""
    parts: list[Any] = [
        model,
        adapter_fingerprint(settings),
        [settings.model.quantization, settings.model.dtype, list(settings.model.keep_16bit)],
        settings.difficulty.samples,
        asdict(training_sampling(settings)),
        settings.run.seed,
        reward_fingerprint(settings, user_files(settings)),
        [asdict(prompt) for prompt in prompts],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _result(group: Group, max_score: float | None) -> dict[str, float | None]:
    """The share of right answers among those that could be scored, and their mean reward.

    Raises UsageError if the reward does not tell what is right.
    """
    scored = [(score, score.reward) for score in group.scores if score.reward is not None]
    if not scored:
        return {PASS_RATE: None, "mean_reward": None}
    if max_score is None and any(score.lenient is None for score, _ in scored):
        raise UsageError(
            "task=difficulty: no term of the reward checks answers, and its full score is not known; set max_score of "
            "the terms of reward.terms that are functions of your own"
        )
    right = [score.lenient == 1 if score.lenient is not None else is_solved([r], max_score) for score, r in scored]
    return {PASS_RATE: statistics.fmean(right), "mean_reward": statistics.fmean(reward for _, reward in scored)}


def _summary(results: Mapping[int, Mapping[str, float | None]]) -> str:
    """How many prompts are how difficult."""
    rates = [result[PASS_RATE] for result in results.values()]
    known = [rate for rate in rates if rate is not None]
    counts = Counter("never" if rate == 0 else "always" if rate == 1 else "at times" for rate in known)
    parts = [f"{counts[kind]} {kind} right" for kind in ("never", "at times", "always")]
    if len(known) < len(rates):
        parts.append(f"{len(rates) - len(known)} not known")
    return ", ".join(parts)
