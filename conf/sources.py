"""The sources of a run as a list, each complete and with a name. Knows only the settings."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conf.schema import DataSettings, SourceSettings

GYM = "reasoning_gym:"


def named_sources(data: DataSettings) -> Sequence[SourceSettings]:
    """data.sources, or data.source alone; what a source leaves out is as `data` says."""
    sources = data.sources or [SourceSettings(source=data.source, task=data.task)]
    return [
        replace(
            source,
            name=source.name or source_name(source.source),
            split=source.split or data.split,
            task={**data.task, **source.task},
            prompt_column=source.prompt_column or data.prompt_column,
            answer_column=source.answer_column or data.answer_column,
            system_prompt=data.system_prompt if source.system_prompt is None else source.system_prompt,
        )
        for source in sources
    ]


def source_name(source: str) -> str:
    """What a source is called that has no name of its own: as its file, or as its reasoning-gym task."""
    return source.removeprefix(GYM) if source.startswith(GYM) else Path(source).stem
