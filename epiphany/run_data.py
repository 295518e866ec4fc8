"""What a run is trained on: the model's tokenizer, and the rows rendered as its prompts. Knows no weights."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from actors.data.demonstrations import COLUMN, Demonstrations, make_demonstrations
from actors.data.prompts import PromptSet, Source
from actors.data.rendering import Rendering
from actors.engines.stop_strings import StopStrings
from actors.models.hub import resolve_model
from actors.models.source import ModelSource
from actors.models.tokenizer import end_of_sequence_ids, load_tokenizer
from conf.schema import Settings
from conf.sources import named_sources
from epiphany.rows import Rows, demonstration_rows
from epiphany.sampling import evaluation_sampling, training_sampling


@dataclass(frozen=True)
class RunData:
    """The prompts of a run, and the model that they are rendered for; demonstrations if there is a warm-up."""

    prompts: PromptSet
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    demonstrations: Demonstrations | None


def load_model_source(settings: Settings) -> tuple[ModelSource, PreTrainedTokenizerBase]:
    """Find the model, and load its tokenizer."""
    model = settings.model
    source = resolve_model(model.path, revision=model.revision, package=model.package, package_path=model.package_path)
    tokenizer = load_tokenizer(source, chat_template=model.chat_template, trust_remote_code=model.trust_remote_code)
    return source, tokenizer


def training_rendering(settings: Settings) -> Rendering:
    """How training rows become prompts."""
    return Rendering(settings.sampling.prefill, settings.model.chat_template_kwargs)


def evaluation_rendering(settings: Settings) -> Rendering:
    """How held-out rows become prompts: as in training, but for what is set apart."""
    training, asked = training_rendering(settings), settings.evaluation
    return Rendering(
        training.prefill if asked.prefill is None else asked.prefill,
        training.variables if asked.chat_template_kwargs is None else asked.chat_template_kwargs,
    )


def load_data(settings: Settings, rows: Rows) -> RunData:
    """Render the rows as prompts. Raises UsageError for what the tokenizer or its chat template cannot do."""
    data = settings.data
    source, tokenizer = load_model_source(settings)
    for sampling in (training_sampling(settings), evaluation_sampling(settings)):
        StopStrings(sampling.stop, tokenizer)  # refuses what the tokenizer cannot write
    training = training_rendering(settings)
    prompts = PromptSet(
        [
            Source(loaded.name, loaded.rows, source.weight)
            for loaded, source in zip(rows.train, named_sources(data), strict=True)
        ],
        tokenizer,
        held_out=data.held_out,
        max_prompt_tokens=data.max_prompt_tokens,
        seed=data.seed,
        held_out_rows=None if rows.held_out is None else rows.held_out.rows,
        rendering=training,
        difficulty=data.difficulty,
        revisit_solved=data.revisit_solved,
        held_out_rendering=evaluation_rendering(settings),
    )
    demonstrations = None
    if settings.warmup.steps:
        demonstrations = make_demonstrations(
            demonstration_rows(settings, prompts.training_rows),
            tokenizer,
            column=settings.warmup.column or COLUMN,
            rendering=training,
            end_ids=end_of_sequence_ids(source, tokenizer),
            max_prompt_tokens=data.max_prompt_tokens,
            max_tokens=settings.sampling.max_tokens,
        )
    return RunData(prompts, source, tokenizer, demonstrations)


def describe_data(settings: Settings, rows: Rows, prompts: PromptSet, note: Callable[[str], None]) -> None:
    """Say what is trained on, what was left out, and show the first prompt."""
    for loaded, source in zip(rows.train, named_sources(settings.data), strict=True):
        held_out = sum(prompt.task == loaded.name for prompt in prompts.held_out)
        note(
            f"data {source.source}: {prompts.sizes[loaded.name]} prompts to train on, {held_out} held out; "
            f"prompt from {loaded.prompt_column!r}, answer from {loaded.answer_column!r}"
        )
        if loaded.bad:
            note(f"skipped {len(loaded.bad)} bad rows, the first: {loaded.bad[0]}")
    if prompts.outside:
        low, high = settings.data.difficulty or (0, 1)
        note(f"left out {prompts.outside} prompts whose pass rate is not between {low:g} and {high:g}")
    if prompts.overlap:
        note(f"{prompts.overlap} of the held-out prompts are trained on, too")
    if prompts.too_long:
        note(f"left out {prompts.too_long} prompts of over {settings.data.max_prompt_tokens} tokens")
    note(f"the first prompt, as the model sees it:\n{prompts.at(0).text}")
