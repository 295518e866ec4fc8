"""The reward of a run: the process that scores, and what it makes of the reference answers before anything is loaded.

Knows data and rewards; knows no model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from actors.data.demonstrations import COLUMN, WARMUP, demonstration_text
from actors.data.readers import DataError
from actors.data.sources import Loaded, Row
from actors.reward import RewardWorker
from actors.types import Score
from conf.schema import Settings
from conf.sources import named_sources
from epiphany.rows import Rows, demonstration_rows
from rewards.correctness import plain_number
from rewards.sample import Sample

CHECKED_ANSWERS = 64  # of each source, spread evenly over its rows
DEMONSTRATIONS = 8  # of the warm-up that are scored
CHECK_SECONDS = 5.0  # after the first answer, after which no other one is scored
NO_ANSWER = "I do not know."
TOLERATED_SHARE = 0.1  # of the reference answers that were scored


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
        scored = [list(_score_reference_answers(worker, source, settings)) for source in rows.sources]
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


def _score_reference_answers(worker: RewardWorker, source: Loaded, settings: Settings) -> Iterator[ScoredAnswer]:
    """Answers spread over the rows of a source, scored as completions, until CHECK_SECONDS after the first one, which
    may import libraries. Without answers, a completion of NO_ANSWER, of which nothing is expected but a score.
    """
    deadline, max_tokens = float("inf"), settings.sampling.max_tokens
    for row in _spread([row for row in source.rows if row.answers] or source.rows[:1]):
        if monotonic() > deadline:
            return
        completion, expected = NO_ANSWER, {}
        if row.answers:
            completion, expected = worker.reference_completion(row.answers[0], row.task), worker.expected(row.task)
        score = worker.score_sample(_sample_of(row, completion, row.task, max_tokens))
        yield ScoredAnswer(row, completion, score, worker.max_score(row.task), expected)
        deadline = min(deadline, monotonic() + CHECK_SECONDS)


def _sample_of(row: Row, completion: str, task: str, max_tokens: int) -> Sample:
    return Sample(
        *(row.question, completion, row.answer, task),
        max_tokens=max_tokens,
        metadata=row.metadata,
        answers=row.answers,
    )


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
        score = worker.score_sample(_sample_of(row, text, task, settings.sampling.max_tokens))
        scored.append(ScoredAnswer(row, text, score, worker.max_score(task), worker.expected(task)))
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
