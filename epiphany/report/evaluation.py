"""Evaluation on held-out prompts: the share of right answers or the mean reward, with its interval, and what is kept.

Knows scored groups; knows neither how they were sampled nor how the table looks.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from actors.types import Group, Score
from conf.errors import disk_errors
from epiphany.report.metrics import Row, write_step_table
from epiphany.report.run_folder import Layout
from epiphany.report.scores import normal_interval, wilson

ROWS = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("temperature", pa.float64(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("reference", pa.string()),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("reward", pa.float64()),
        pa.field("strict", pa.float64()),
        pa.field("lenient", pa.float64()),
        pa.field("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Summary:
    """What the completions of held-out prompts score: means over prompts of each prompt's mean.

    `strict` and `lenient` are the shares of right answers, in the required form and anywhere in the text; `low` and
    `high` bound `lenient` at 95 % (Wilson's interval with one observation per prompt, which is cautious if a prompt has
    several samples). All four are None if no term of the reward checks answers. `reward_low` and `reward_high` bound
    the mean `reward` at 95 % (normal approximation), and are None with fewer than two prompts. Completions that could
    not be scored are left out of all these, and counted in `unscorable`.
    """

    strict: float | None
    lenient: float | None
    low: float | None
    high: float | None
    reward: float | None
    reward_low: float | None
    reward_high: float | None
    prompts: int
    samples: int
    truncated: float
    mean_tokens: float
    unscorable: int


def summarize(groups: Sequence[Group]) -> Summary:
    """The summary of scored groups of equal size."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    strict = _means(groups, lambda score: score.strict)
    lenient = _means(groups, lambda score: score.lenient)
    rewards = _means(groups, lambda score: score.reward)
    low, high = wilson(statistics.fmean(lenient), len(lenient)) if lenient else (None, None)
    reward_low, reward_high = normal_interval(rewards) if len(rewards) > 1 else (None, None)
    return Summary(
        strict=statistics.fmean(strict) if strict else None,
        lenient=statistics.fmean(lenient) if lenient else None,
        low=low,
        high=high,
        reward=statistics.fmean(rewards) if rewards else None,
        reward_low=reward_low,
        reward_high=reward_high,
        prompts=len(groups),
        samples=len(groups[0].scores),
        truncated=sum(t.finish_reason == "length" for t in trajectories) / len(trajectories),
        mean_tokens=sum(len(t.token_ids) for t in trajectories) / len(trajectories),
        unscorable=sum(score.reward is None for group in groups for score in group.scores),
    )


def _means(groups: Sequence[Group], value: Callable[[Score], float | None]) -> list[float]:
    """Each prompt's mean of a value over the samples that have it, without prompts that have none."""
    values = [[x for score in group.scores if (x := value(score)) is not None] for group in groups]
    return [statistics.fmean(of_prompt) for of_prompt in values if of_prompt]


def best_constant(answers: Sequence[str | None]) -> tuple[str, float]:
    """The single answer that would be right most often, and how often; ("", 0.0) without references."""
    known = [answer for answer in answers if answer is not None]
    if not known:
        return "", 0.0
    answer, count = Counter(known).most_common(1)[0]
    return answer, count / len(answers)


def record(
    step: int, greedy: Sequence[Group], sampled: Sequence[Group], *, seconds: float, reward: str
) -> dict[str, object]:
    """One line of evaluations.jsonl for the scored groups of an evaluation.

    `reward` is a fingerprint of the reward's terms: only equal ones are compared.
    """
    answer, share = best_constant([group.prompt.answer for group in greedy])
    line = {
        "step": step,
        "reward": reward,
        **_summaries(greedy, sampled),
        "best_constant": {"answer": answer, "share": share},
        "seconds": round(seconds, 3),
    }
    names = sorted({group.prompt.task for group in greedy})
    if len(names) > 1:
        line["by_source"] = {name: _summaries(_of_source(greedy, name), _of_source(sampled, name)) for name in names}
    return line


def _of_source(groups: Sequence[Group], name: str) -> list[Group]:
    return [group for group in groups if group.prompt.task == name]


def _summaries(greedy: Sequence[Group], sampled: Sequence[Group]) -> dict[str, object]:
    return {
        "greedy": asdict(summarize(greedy)),
        "sampled": asdict(summarize(sampled)) if sampled else None,
    }


def one_line(record: Row) -> str:
    """A record as a line for the console, with the number of completions that could not be scored."""
    parts = [f"{kind} {headline(record[kind])}" for kind in ("greedy", "sampled") if record.get(kind)]
    line = f"evaluation at step {record['step']}: {', '.join(parts)}"
    for name, of_source in record.get("by_source", {}).items():
        line += f"; {name}: {headline(of_source['greedy'])}"
    unscorable = unscorable_of(record)
    return f"{line} ({unscorable} completions could not be scored)" if unscorable else line


def headline(summary: Row) -> str:
    """The share of right answers if answers are checked, else the mean reward."""
    if summary["lenient"] is not None:
        return f"{summary['lenient']:.1%} right"
    return "-" if summary["reward"] is None else f"mean reward {summary['reward']:.3f}"


def unscorable_of(record: Row) -> int:
    """How many of a record's completions could not be scored."""
    return sum(record[kind]["unscorable"] for kind in ("greedy", "sampled") if record.get(kind))


def record_rows(groups: Sequence[Group], *, temperature: float) -> pa.Table:
    """The completions of an evaluation as rows, each with its question, its reference answer and its score."""
    rows: list[Mapping[str, object]] = []
    for group in groups:
        for i, (trajectory, score) in enumerate(zip(group.trajectories, group.scores, strict=True)):
            rows.append(
                {
                    "ordinal": group.prompt.ordinal,
                    "sample": i,
                    "temperature": temperature,
                    "question": group.prompt.question,
                    "reference": group.prompt.answer,
                    "completion": trajectory.text,
                    "reward": score.reward,
                    "strict": score.strict,
                    "lenient": score.lenient,
                    "error": score.error,
                }
            )
    return pa.Table.from_pylist(rows, schema=ROWS)


def save(
    folder: Layout, record: Row, greedy: Sequence[Group], sampled: Sequence[Group] = (), *, temperature: float
) -> None:
    """Append the record to evaluations.jsonl and write its rows as evaluations/step-<n>.parquet.

    `temperature` is that of the sampled completions. Raises DiskError if the disk does not take them.
    """
    rows = [record_rows(greedy, temperature=0.0), record_rows(sampled, temperature=temperature)]
    write_step_table(folder.evaluation_rows, record["step"], pa.concat_tables(rows))
    with disk_errors(folder.path), folder.evaluations.open("a") as stream:
        stream.write(json.dumps(record) + "\n")
