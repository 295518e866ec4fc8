"""What an evaluation found: scores of each model with intervals, pass@k and the majority's answer, and the two models
problem by problem. Written to a folder, read from it, and shown. Knows answers; knows neither models nor engines.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from actors.types import Group, Score
from conf.errors import disk_errors
from conf.schema import Settings
from conf.validate import named_terms
from epiphany.report.activity import print_line
from epiphany.report.evaluation import record_rows, summarize
from epiphany.report.scores import majority, paired, pass_at_k
from epiphany.report.started import installed_versions
from epiphany.rows import system_prompt_of
from epiphany.sampling import evaluation_sampling
from rewards.correctness import final_answer

RESULT, ANSWERS = "result.json", "answers.parquet"
SHOWN = 3  # problems that were won or lost


@dataclass(frozen=True)
class Answers:
    """Scored groups of one model, question by question: one greedy answer each, and the sampled ones, if any."""

    greedy: Sequence[Group]
    sampled: Sequence[Group]


@dataclass(frozen=True)
class Verdict:
    """What was found. `identity` is a hash of all that the answers and their scores depend on.

    `models` holds by name ("base", "adapter") the summaries of greedy and sampled answers, pass@k and maj@k.
    `paired` compares the adapter with the base on the greedy answers, if both were measured: difference, interval, the
    questions won and lost, and p.
    """

    identity: str
    model: str
    adapter: str | None
    questions: str
    too_long: int
    settings: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    paired: Mapping[str, Any] | None
    versions: Mapping[str, str]
    seconds: float

    @classmethod
    def of(
        cls,
        settings: Settings,
        answers: Mapping[str, Answers],
        *,
        identity: str,
        questions: str,
        too_long: int,
        seconds: float,
    ) -> "Verdict":
        """The verdict on answers to `questions`, of which `too_long` were left out."""
        return cls(
            identity=identity,
            model=settings.model.path,
            adapter=settings.model.adapter,
            questions=questions,
            too_long=too_long,
            settings=_settings(settings),
            models={name: _measures(of_model) for name, of_model in answers.items()},
            paired=_compared(answers["base"], answers["adapter"]) if len(answers) > 1 else None,
            versions=installed_versions(),
            seconds=round(seconds, 1),
        )

    def save(self, folder: Path, answers: Mapping[str, Answers]) -> None:
        """Write result.json, and every answer to answers.parquet. Raises DiskError."""
        temperature = float(self.settings["sampling"]["temperature"])
        tables = []
        for name, of_model in answers.items():
            for groups, how in ((of_model.greedy, 0.0), (of_model.sampled, temperature)):
                rows = record_rows(groups, temperature=how)
                tables.append(rows.add_column(0, "model", pa.array([name] * rows.num_rows)))
        with disk_errors(folder):
            pq.write_table(pa.concat_tables(tables), folder / ANSWERS)
            scratch = folder / ".writing"
            scratch.write_text(json.dumps(asdict(self), indent=1))
            scratch.rename(folder / RESULT)

    def show(self, console: Console) -> None:
        """Print the settings, the table and the comparison."""
        sampling, models = self.settings["sampling"], self.models
        samples = next(iter(models.values()))["sampled"]
        how = f", {samples['samples']} sampled at temperature {sampling['temperature']:g}" if samples else ""
        reward = " + ".join(self.settings["reward"])
        print_line(console, f"{self.questions}: greedy{how}; at most {sampling['max_tokens']} tokens; reward {reward}")
        if self.settings["system_prompt"]:
            print_line(console, f"system prompt: {self.settings['system_prompt']}")
        console.print(self._table())
        if self.too_long:
            print_line(console, f"{self.too_long} questions over data.max_prompt_tokens were left out")
        if self.paired is not None:
            for line in _paired_lines(self.paired):
                print_line(console, line)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for name in ("", "questions", "right (95 % interval)", "strict form", "mean reward", "tokens", "truncated"):
            table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
        for kind in ("greedy", "sampled"):
            for name, measures in self.models.items():
                if (summary := measures[kind]) is not None:
                    table.add_row(f"{name}, {kind}", *_cells(summary))
        for name, measures in self.models.items():
            for measure, value in measures["of_samples"].items():
                table.add_row(f"{name}, {measure}", "", f"{value:.1%}")
        return table


def read_verdict(folder: Path) -> Verdict | None:
    """The finished evaluation in `folder`; None if there is none."""
    with disk_errors(folder):
        file = folder / RESULT
        return Verdict(**json.loads(file.read_text())) if file.is_file() else None


def _settings(settings: Settings) -> dict[str, Any]:
    """What the scores depend on besides model and questions."""
    evaluation = settings.evaluation
    return {
        "sampling": asdict(evaluation_sampling(settings)),
        "prefill": settings.sampling.prefill if evaluation.prefill is None else evaluation.prefill,
        "system_prompt": system_prompt_of(settings, settings.data.system_prompt),
        "reward": [f"{term.weight:g} x {term.name}" for term in named_terms(settings.reward.terms)],
        "quantization": settings.model.quantization,
        "dtype": settings.model.dtype,
        "seed": settings.run.seed,
    }


def _measures(answers: Answers) -> dict[str, Any]:
    """The summaries, and what several samples of a question can tell."""
    sampled = answers.sampled
    return {
        "greedy": asdict(summarize(answers.greedy)),
        "sampled": asdict(summarize(sampled)) if sampled else None,
        "of_samples": _of_samples(sampled) if sampled else {},
    }


def _of_samples(groups: Sequence[Group]) -> dict[str, float]:
    """pass@k for each power of two, and maj@k over all samples: means over the questions whose answers are checked, and
    for maj@k have a reference answer, so that there is one to vote for.
    """
    samples = len(groups[0].scores)
    right = [[score.lenient for score in group.scores] for group in groups]
    checked = [
        (group, [value for value in values if value is not None])
        for group, values in zip(groups, right, strict=True)
        if None not in values
    ]
    if samples < 2 or not checked:
        return {}
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    measures = {
        f"pass@{k}": statistics.fmean(pass_at_k(samples, sum(v == 1 for v in values), k) for _, values in checked)
        for k in powers
    }
    votes = [
        majority([final_answer(t.text) for t in group.trajectories], values)
        for group, values in checked
        if group.prompt.answer is not None
    ]
    return {**measures, **({f"maj@{samples}": statistics.fmean(votes)} if votes else {})}


def _compared(base: Answers, adapter: Answers) -> dict[str, Any] | None:
    """The adapter against the base on the greedy answers that both could be scored for."""
    pairs = [
        (group.prompt, _value(group.scores[0]), _value(other.scores[0]))
        for group, other in zip(adapter.greedy, base.greedy, strict=True)
    ]
    scored = [(prompt, a, b) for prompt, a, b in pairs if a is not None and b is not None]
    if len(scored) < 2:
        return None
    result = paired([a for _, a, _ in scored], [b for _, _, b in scored])
    questions = [prompt.question for prompt, _, _ in scored]
    return {
        **asdict(result),
        "won": [questions[i] for i in result.won],
        "lost": [questions[i] for i in result.lost],
        "questions": len(scored),
    }


def _value(score: Score) -> float | None:
    """Whether the answer is right, else its reward where answers are not checked."""
    return score.reward if score.lenient is None else score.lenient


def _cells(summary: Mapping[str, Any]) -> list[str]:
    questions = f"{summary['prompts']}" if summary["samples"] == 1 else f"{summary['prompts']} x {summary['samples']}"
    right = "-"
    if summary["lenient"] is not None:
        right = f"{summary['lenient']:.1%} ({summary['low']:.1%} to {summary['high']:.1%})"
    strict, reward = summary["strict"], summary["reward"]
    return [
        questions,
        right,
        "-" if strict is None else f"{strict:.1%}",
        "-" if reward is None else f"{reward:.3f}",
        f"{summary['mean_tokens']:.1f}",
        f"{summary['truncated']:.0%}",
    ]


def _paired_lines(compared: Mapping[str, Any]) -> list[str]:
    won, lost = compared["won"], compared["lost"]
    lines = [
        f"adapter against base, greedy: {compared['difference']:+.1%} ({compared['low']:+.1%} to "
        f"{compared['high']:+.1%}) of {compared['questions']} questions; {len(won)} won, {len(lost)} lost, "
        f"p = {compared['p']:.2g} (exact sign test)"
    ]
    for name, questions in (("won", won), ("lost", lost)):
        lines += [f"  {name}: {' '.join(question.split())[:100]}" for question in questions[:SHOWN]]
    return lines
