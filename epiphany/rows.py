"""The rows of a run, read from its sources, and the system message that they get. Knows data; knows no model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.data.demonstrations import built_in_rows
from actors.data.sources import Loaded, Row, load_rows
from conf.schema import Settings, SourceSettings
from conf.sources import named_sources


@dataclass(frozen=True)
class Rows:
    """The rows of each source to train on, some of which may be held out, and those of data.held_out_source."""

    train: Sequence[Loaded]
    held_out: Loaded | None

    @property
    def sources(self) -> list[Loaded]:
        """All of them."""
        return [*self.train, *([] if self.held_out is None else [self.held_out])]


def read_rows(settings: Settings) -> Rows:
    """Read the rows of data.source and data.held_out_source. Raises DataError."""
    data, sources = settings.data, named_sources(settings.data)
    train = [_load(settings, source) for source in sources]
    if data.held_out_source is None:
        return Rows(train, None)
    task = {**data.task, **data.held_out_task}
    return Rows(train, _load(settings, replace(sources[0], source=data.held_out_source, task=task)))


def _load(settings: Settings, source: SourceSettings) -> Loaded:
    return load_rows(
        source.source,
        name=str(source.name),
        task=source.task,
        split=str(source.split),
        prompt_column=source.prompt_column,
        answer_column=source.answer_column,
        system_prompt=system_prompt_of(settings, source.system_prompt),
        max_bad_rows=settings.data.max_bad_rows,
        seed=settings.data.seed,
    )


def system_prompt_of(settings: Settings, asked: str | None) -> str | None:
    """The system message that was asked for, else the reward's; None or an empty text for none."""
    return settings.reward.system_prompt if asked is None else asked


def demonstration_rows(settings: Settings, training_rows: Sequence[Row]) -> Sequence[Row]:
    """The rows whose demonstrations the warm-up trains on."""
    if settings.warmup.column:
        return training_rows
    return built_in_rows(system_prompt_of(settings, settings.data.system_prompt))
