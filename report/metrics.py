"""Metrics of a run: metrics.jsonl (one line a step), TensorBoard files beside it, and completions as Parquet."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from learner.stats import StepStats
from rewards.variance import is_zero_variance


class MetricsLog:
    """Appends one line a step. Lines and curves after `last_step` (of a run that died after its checkpoint) go."""

    def __init__(self, file: Path, tensorboard: Path, *, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._file = file
        kept = [row for row in read(file) if row["step"] <= last_step]
        scratch = file.with_suffix(".writing")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in kept))
        scratch.rename(file)
        self._writer = SummaryWriter(str(tensorboard), purge_step=last_step + 1 if last_step else None)

    def write(self, row: Mapping[str, Any]) -> None:
        """`row` holds `step`; nested mappings become curves named a/b."""
        with self._file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        for name, value in _flatten(row):
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def step_row(
    table: pa.Table, stats: StepStats, *, version: int, workers: Mapping[str, Mapping[str, Any]], seconds: float, unscorable: int, resampled: int, given_up: int,
) -> dict[str, Any]:  # fmt: skip
    """One line of metrics.jsonl: what was sampled, how it was scored, what was learned, and how fast.

    `version` is the one that the step made; lags are counted from the one that it trained. `workers` is what
    Pipeline.report says: rollout workers sample side by side, so that their rates add up.
    """
    rewards: list[float] = []
    terms: dict[str, list[float]] = {}
    groups: dict[int, list[tuple[float, str]]] = {}
    for ordinal, reward, named, text in zip(
        *(table.column(c).to_pylist() for c in ("ordinal", "reward", "reward_terms", "text")), strict=True
    ):
        if reward is not None:
            rewards.append(reward)
            groups.setdefault(ordinal, []).append((reward, text))
            for name, value in named:
                terms.setdefault(name, []).append(value)
    flat = sum(is_zero_variance([reward for reward, _ in answers]) for answers in groups.values())
    constant_share, constant_text = _constant_answer(list(groups.values()))
    lags = [version - 1 - span["version"] for spans in table.column("version_spans").to_pylist() for span in spans]
    lengths = pc.list_value_length(table.column("behavior_logprobs"))  # type: ignore[attr-defined]
    learned = dataclasses.asdict(stats)
    learner_seconds = learned.pop("seconds")
    return {
        "step": version,
        "reward": sum(rewards) / len(rewards),
        "reward_terms": {name: sum(values) / len(values) for name, values in terms.items()},
        "no_signal_share": flat / len(groups),
        "constant_share": constant_share,
        "constant_text": constant_text,
        "unscorable": unscorable,
        "resampled": resampled,
        "given_up": given_up,
        "completion_tokens": pc.mean(lengths).as_py(),  # type: ignore[attr-defined]
        "truncated_share": table.column("finish_reason").to_pylist().count("length") / table.num_rows,
        "lag": sum(lags) / len(lags),
        "lag_max": max(lags),
        "rollout_tokens_per_second": sum(w.get("tokens_per_second", 0.0) for w in workers.values()),
        "rollout_seconds": max(w.get("seconds", 0.0) for w in workers.values()),
        "learner_tokens_per_second": stats.stream_tokens / max(learner_seconds, 1e-9),
        "learner_seconds": learner_seconds,
        "seconds": seconds,
        **learned,
        "workers": {name: dict(worker) for name, worker in workers.items()},
    }


def _constant_answer(groups: Sequence[Sequence[tuple[float, str]]]) -> tuple[float | None, str]:
    """The text that is the best answer to most prompts, up to spaces and 200 letters, and its share of them; `groups` are each
    prompt's rewards and texts. Of fewer than four prompts it would say nothing."""
    if len(groups) < 4:
        return None, ""
    texts: Counter[str] = Counter()
    for answers in groups:
        best = max(reward for reward, _ in answers)
        texts.update({text.strip()[:200] for reward, text in answers if reward == best})
    text, count = texts.most_common(1)[0]
    return count / len(groups), text


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a line cut short at the end is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_completions(folder: Path, step: int, table: pa.Table) -> None:
    """The rows that trained `step`, as step-<n>.parquet."""
    scratch = folder / ".writing"
    pq.write_table(table, scratch)
    scratch.rename(folder / f"step-{step:06d}.parquet")


def _flatten(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in row.items():
        flat += _flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(prefix + name, value)]
    return flat
