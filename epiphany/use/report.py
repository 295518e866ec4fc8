"""task=report: the page of a run, which is also written at the end of each."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from conf.errors import UsageError, disk_errors
from conf.schema import Settings
from epiphany.report.page.content import content_of
from epiphany.report.page.html import render
from epiphany.report.run_folder import Layout
from epiphany.run_data import load_model_source
from epiphany.run_settings import settings_of_run


def report(settings: Settings, note: Callable[[str], None]) -> Path:
    """Write the page of the run in run.folder, and return its file. Raises UsageError."""
    folder, asked = Layout(Path(settings.run.folder)), settings.report
    others = [Layout(Path(other).expanduser()) for other in asked.compare]
    output = folder.page if asked.output is None else Path(asked.output).expanduser()
    content = content_of(folder, others, tokenizer=_tokenizer_of(folder, note))
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(render(content, title=f"{content['runs'][0]['name']} - Epiphany"))
    note(f"the report is {output} ({output.stat().st_size / 2**20:.1f} MiB)")
    return output


def report_of_finished(settings: Settings, note: Callable[[str], None]) -> None:
    """The same for a run that has ended, which a report that fails must not change."""
    try:
        report(settings, note)
    except Exception as error:  # noqa: BLE001 - the run is done and saved, whatever the report may raise
        note(f"the report could not be written: {type(error).__name__}: {error}")


def _tokenizer_of(folder: Layout, note: Callable[[str], None]) -> PreTrainedTokenizerBase | None:
    """That of the run's model; None, with a line that says so, where it cannot be had."""
    try:
        _, tokenizer = load_model_source(settings_of_run(folder))
    except UsageError as error:
        note(f"the report shows no tokens: {error}")
        return None
    return tokenizer
