"""The model card of an export: what was trained on what, how, how well, and the proof. Reads a run's folder."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from conf.schema import Settings
from conf.sources import named_sources
from conf.validate import named_terms
from epiphany.export.proof import Proof
from epiphany.report import metrics
from epiphany.report.evaluation import headline
from epiphany.report.run_folder import Layout
from epiphany.rows import system_prompt_of
from epiphany.use.verdict import RESULT, read_verdict

CURVE_ROWS = 10
USE = {
    "peft": "PEFT loads it onto the base model; vLLM serves it with `--enable-lora`.",
    "merged": "transformers and vLLM load it like any other model.",
    "gguf": "llama.cpp and what is built on it load `model.gguf`.",
    "ollama": "`ollama create <name> -f Modelfile` in this folder, then `ollama run <name>`.",
}


def model_card(settings: Settings, proof: Proof) -> str:
    """The text of README.md."""
    base = public_name(settings.model.path)
    run = Layout(Path(settings.run.folder))
    parts = [
        _front_matter(base, settings.export.format),
        f"# {base}, trained by reinforcement learning\n\n{USE[settings.export.format]}",
        f"Checked when it was exported: {proof.line()}.",
        "## Training\n\n" + _table(("", ""), _settings(settings)),
    ]
    rows = metrics.read(run.metrics)
    if rows:
        parts.append("## Reward\n\n" + _table(("step", "mean reward", "tokens an answer"), _curve(rows)))
    if scores := [*_evaluations(metrics.read(run.evaluations)), *_measured(run.path / "evaluated")]:
        parts.append("## Scores\n\n" + _table(("questions", "greedy", "sampled"), scores))
    return "\n\n".join(parts) + "\n"


def public_name(path: str) -> str:
    """A model or a source without the folders of this machine; ids of the hub stay as they are."""
    return Path(path).name if Path(path).expanduser().exists() or path.startswith(("/", "~", ".")) else path


def _front_matter(base: str, kind: str) -> str:
    library = {"peft": "peft", "merged": "transformers"}.get(kind, "gguf")
    return f"---\nbase_model: {base}\nlibrary_name: {library}\ntags:\n- grpo\n- lora\n- reasoning\n---"


def _settings(settings: Settings) -> list[tuple[str, str]]:
    algorithm, sampling, lora = settings.algorithm, settings.sampling, settings.model.lora
    base = settings.model.dtype if settings.model.quantization == "none" else settings.model.quantization
    prompts, group = algorithm.prompts_per_step, algorithm.group_size
    return [
        ("data", ", ".join(public_name(source.source) for source in named_sources(settings.data))),
        ("reward", " + ".join(f"{term.weight:g} x {term.name}" for term in named_terms(settings.reward.terms))),
        ("system prompt", system_prompt_of(settings, settings.data.system_prompt) or "none"),
        ("algorithm", f"{algorithm.name}, {prompts} prompts x {group} completions a step"),
        ("steps", f"{settings.run.steps}"),
        ("learning rate", f"{settings.learner.learning_rate:g}"),
        ("adapter", f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}"),
        ("base weights", base),
        ("sampling", f"temperature {sampling.temperature:g}, at most {sampling.max_tokens} tokens"),
    ]


def _curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The means of CURVE_ROWS parts of the run."""
    bounds = [len(rows) * i // CURVE_ROWS for i in range(CURVE_ROWS + 1)]
    parts = [rows[a:b] for a, b in pairwise(bounds) if b > a]
    return [
        (
            f"{part[0]['step']} to {part[-1]['step']}",
            _mean(part, "reward", ".3f"),
            _mean(part, "completion_tokens", ".0f"),
        )
        for part in parts
    ]


def _mean(rows: Sequence[Mapping[str, Any]], name: str, pattern: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return format(sum(values) / len(values), pattern) if values else "-"


def _evaluations(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The first and the last evaluation of the run."""
    ends = [records[0], records[-1]] if len(records) > 1 else records
    return [_scores(f"held out, step {record['step']}", record) for record in ends]


def _measured(folder: Path) -> list[tuple[str, str, str]]:
    """What task=evaluate has measured of this run."""
    lines = []
    for file in sorted(folder.glob(f"*/{RESULT}")):
        if (verdict := read_verdict(file.parent)) is not None:
            lines += [_scores(f"{verdict.questions}, {name}", measures) for name, measures in verdict.models.items()]
    return lines


def _scores(name: str, measures: Mapping[str, Any]) -> tuple[str, str, str]:
    greedy, sampled = measures["greedy"], measures["sampled"]
    return f"{name} ({greedy['prompts']})", headline(greedy), headline(sampled) if sampled else "-"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
