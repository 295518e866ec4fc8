"""What is checked before torch is imported, so that a mistake is told at once: the rows, the sinks, the run folder, the
reward and what it makes of the reference answers.

Knows data, rewards and the run folder; knows no model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from actors.data.demonstrations import COLUMN, WARMUP, built_in_rows, demonstration_text
from actors.data.readers import DataError
from actors.data.sources import Loaded, Row, load_rows
from actors.reward import RewardWorker
from actors.types import Score
from conf.schema import Settings, SourceSettings
from conf.sources import named_sources
from epiphany.report.run_folder import RunFolder
from epiphany.report.sinks import check_sinks
from rewards.correctness import plain_number
from rewards.sample import Sample

CHECKED_ANSWERS = 64  # of each source, spread evenly over its rows
DEMONSTRATIONS = 8  # of the warm-up that are scored
CHECK_SECONDS = 5.0  # after which no other answer is scored
TOLERATED_SHARE = 0.1  # of the reference answers that were scored


@dataclass(frozen=True)
class Rows:
    """The rows of each source to train on, some of which may be held out, and those of data.held_out_source."""

    train: Sequence[Loaded]
    held_out: Loaded | None

    @property
    def sources(self) -> list[Loaded]:
        """All of them."""
        return [*self.train, *([] if self.held_out is None else [self.held_out])]


@dataclass(frozen=True)
class Checked:
    """A run whose rows, folder and reward are in order. The folder is locked. `max_scores` are the largest rewards by
    source, where they are known.
    """

    rows: Rows
    folder: RunFolder
    max_scores: Mapping[str, float | None]


@dataclass(frozen=True)
class ScoredAnswer:
    """The reference answer of a row as a completion, and what the reward gives to it. The maximum may be unknown;
    `expected` are the scores of the terms, by name, of which it is known that this completion gets them.
    """

    row: Row
    completion: str
    score: Score
    max_score: float | None
    expected: Mapping[str, float]

    @property
    def is_full(self) -> bool:
        """Whether it gets what is expected."""
        given = self.score.terms
        is_expected = all(given.get(name, float("-inf")) >= full - 1e-9 for name, full in self.expected.items())
        return self.score.reward is not None and is_expected


def check(settings: Settings, note: Callable[[str], None], closing: ExitStack) -> Checked:
    """Check what needs no model. Raises UsageError for what is wrong. `closing` gives the run folder back."""
    rows = check_inputs(settings)
    folder = RunFolder(Path(settings.run.folder))
    closing.callback(folder.close)
    return Checked(rows, folder, check_reward(settings, rows, note, log=folder.reward_log))


def check_inputs(settings: Settings) -> Rows:
    """The rows of a run whose sinks can be opened. Raises UsageError, and writes nothing."""
    rows = read_rows(settings)
    check_sinks(settings.run.sinks)
    return rows


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


def make_reward(settings: Settings, log: Path | None) -> RewardWorker:
    """A reward worker, with a child process of its own; what rewards print goes to `log`. Raises RewardError."""
    reward = settings.reward
    return RewardWorker(
        reward.terms,
        deadline_seconds=reward.deadline_seconds,
        memory_gib=reward.memory_gib,
        max_tokens=settings.sampling.max_tokens,
        sources=[str(source.name) for source in named_sources(settings.data)],
        log=log,
    )


def check_reward(
    settings: Settings, rows: Rows, note: Callable[[str], None], *, log: Path | None = None
) -> Mapping[str, float | None]:
    """Load the reward, and say what it gives to reference answers of the rows. Returns the largest rewards by source.

    Raises RewardError if it does not load, and DataError if more than TOLERATED_SHARE of the answers of a source do not
    get the full score, or cannot be scored, unless reward.check_reference_answer is off.
    """
    worker = make_reward(settings, log)
    try:
        deadline = monotonic() + CHECK_SECONDS
        scored = [list(_score_reference_answers(worker, source, deadline)) for source in rows.sources]
        max_scores = {source.name: worker.max_score(source.name) for source in rows.train}
        if settings.warmup.steps:
            note(_check_demonstrations(settings, rows, worker))
    finally:
        worker.close()
    for answers in filter(None, scored):
        failed = [answer for answer in answers if not answer.is_full]
        if settings.reward.check_reference_answer and len(failed) > TOLERATED_SHARE * len(answers):
            raise DataError(_refusal(settings, failed, len(answers)))
        note(_scores_line(answers))
        if failed:
            error = failed[0].score.error
            note(_failed_line(failed, len(answers)) + ("" if error is None else f": {error}"))
    unknown = [name for name, score in max_scores.items() if score is None]
    if settings.data.revisit_solved < 1 and unknown:
        raise DataError(
            f"data.revisit_solved: the largest reward is not known of {', '.join(unknown)}; set max_score of the terms "
            "of reward.terms that are functions of your own"
        )
    return max_scores


def _score_reference_answers(worker: RewardWorker, source: Loaded, deadline: float) -> Iterator[ScoredAnswer]:
    """Answers spread over the rows of a source, scored as completions; after the deadline only the first of them."""
    for i, row in enumerate(_spread([row for row in source.rows if row.answers])):
        if i and monotonic() > deadline:
            return
        completion, max_score = worker.reference_completion(row.answers[0], row.task), worker.max_score(row.task)
        sample = Sample(row.question, completion, row.answer, row.task, metadata=row.metadata, answers=row.answers)
        yield ScoredAnswer(row, completion, worker.score_sample(sample), max_score, worker.expected(row.task))


def demonstration_rows(settings: Settings, training_rows: Sequence[Row]) -> Sequence[Row]:
    """The rows whose demonstrations the warm-up trains on."""
    if settings.warmup.column:
        return training_rows
    return built_in_rows(system_prompt_of(settings, settings.data.system_prompt))


def _check_demonstrations(settings: Settings, rows: Rows, worker: RewardWorker) -> str:
    """Score some demonstrations; a line for the user. Raises DataError if built-in ones do not get the full score."""
    column = settings.warmup.column or COLUMN
    training_rows = [row for source in rows.train for row in source.rows]
    shown = [row for row in demonstration_rows(settings, training_rows) if demonstration_text(row, column)]
    if not shown:
        raise DataError(f"warmup.column={column}: no training row has a demonstration there")
    scored = []
    for row in _spread(shown)[:DEMONSTRATIONS]:
        text, task = demonstration_text(row, column) or "", rows.train[0].name if row.task == WARMUP else row.task
        sample = Sample(row.question, text, row.answer, task, metadata=row.metadata, answers=row.answers)
        scored.append(
            ScoredAnswer(row, text, worker.score_sample(sample), worker.max_score(task), worker.expected(task))
        )
    failed = next((answer for answer in scored if not answer.is_full), None)
    if settings.warmup.column is None and failed is not None:
        reason = "" if failed.score.error is None else f" ({failed.score.error})"
        raise DataError(
            f"warmup.steps: the built-in demonstrations, such as {failed.completion!r}, do not get the full score "
            f"of this reward{reason}; name a column with others in warmup.column"
        )
    return _scores_line(scored, "demonstration")


def _spread(rows: Sequence[Row]) -> list[Row]:
    """At most CHECKED_ANSWERS of the rows, evenly spread: the first one, then in an order that skips back and forth, so
    that the first few of them are spread, too.
    """
    count = min(CHECKED_ANSWERS, len(rows))
    even = [rows[i * len(rows) // count] for i in range(count)]
    return [*even[::8], *(row for start in range(1, 8) for row in even[start::8])]


def _scores_line(answers: Sequence[ScoredAnswer], kind: str = "reference answer") -> str:
    rewards = [answer.score.reward for answer in answers if answer.score.reward is not None]
    first = answers[0]
    if len(answers) == 1:
        what = f"the {kind} {first.completion!r} scores"
    else:
        what = f"{len(answers)} {kind}s, such as {first.completion!r}, score"
    low, high = min(rewards, default=None), max(rewards, default=None)
    scores = "nothing" if low is None else f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return f"reward: {what} {scores}" + ("" if first.max_score is None else f" of {first.max_score:g}")


def _failed_line(failed: Sequence[ScoredAnswer], count: int) -> str:
    first, score = failed[0], failed[0].score
    if score.reward is None:
        reason = f"{first.completion!r} cannot be scored"
    else:
        reason = f"{first.completion!r} scores {score.reward:g} of {first.max_score:g} ({score.terms})"
    where = f"for example in {first.row.place}"
    return f"{len(failed)} of {count} reference answers do not get the full score, {where}: {reason}"


def _refusal(settings: Settings, failed: Sequence[ScoredAnswer], count: int) -> str:
    """The reward's own error first, if there is one, then what to change."""
    row, score = failed[0].row, failed[0].score
    advice = "correct the reward or data.answer_column, or set reward.check_reference_answer=false"
    is_numeric = any(term.fn == "numeric" for term in settings.reward.terms)
    if is_numeric and row.answer is not None and plain_number(row.answer) is None:
        advice = (
            f"the reference answer {row.answer!r} is no number: choose reward=exact for words, reward=math for "
            "mathematics, or another data.answer_column"
        )
    own_error = "" if score.error is None else f"{score.error}\n"
    return f"{own_error}{_failed_line(failed, count)}\n{advice}"
