"""Which model fits on which card: `python -m benchmarks.fits [--measure] [override ...]`.

For each model of SHAPES and each preset of conf/hardware/, in nf4 and in 16 bits: what the plan takes for one prompt
with 8 answers of 512 tokens, how it would run, and the longest answers that fit. One JSON line for each pair that fits,
then docs/memory.md's table. Arithmetic alone: needs no GPU and loads no weights.

With `--measure` on a GPU that nothing else uses, each of MEASURED runs (benchmarks.memory, in a process of its own):
what was planned beside what its driver counted, and seconds.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from actors.models.families import family_of
from actors.models.lora import adapter_layout, lora_arguments_of
from benchmarks.common import report
from benchmarks.shapes import POSITIONS, SHAPES, shape_config
from conf.compose import load_settings
from epiphany.adapters import lora_arguments
from epiphany.memory_settings import asked_of, shares_adapter, workload_of
from learner.memory.advice import longest_answer
from learner.memory.footprint import GIB, Process
from learner.memory.plan import MemoryPlan, first_that_fits
from learner.memory.shape import ModelShape

CARDS = ("8gb", "12gb", "16gb", "24gb", "48gb", "80gb")
WORK = (
    "experiment=none",
    "data=file",
    "data.source=none.jsonl",
    "algorithm.prompts_per_step=1",
    "algorithm.group_size=8",
    "sampling.max_tokens=512",
    "data.max_prompt_tokens=128",
)


# Cases of benchmarks/work.py, and how many tokens of an answer are sampled: the cache is there from the beginning.
MEASURED = {
    "3gb-qwen": 512,
    "8gb-qwen-16k": 64,
    "8gb-llama-8b": 512,
    "22gb-llama-8b-20k": 64,
    "48gb-llama-70b": 512,
    "80gb-llama-8b-64k": 64,
    "80gb-llama-8b-128k": 64,
}


@dataclass(frozen=True)
class Subject:
    """What the plan needs of a model, and the layers that its adapter is on."""

    shape: ModelShape
    targets: Sequence[str]


def subject_of(name: str, overrides: Sequence[str]) -> Subject:
    """A model of SHAPES with an adapter as the settings ask for."""
    config = shape_config(name)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    layout = adapter_layout(model, **lora_arguments(load_settings(*WORK, *overrides), family_of(config)))
    return Subject(ModelShape.of(model, layout.size), lora_arguments_of(layout)["target_modules"])


def plan_of(subject: Subject, card: str, overrides: Sequence[str]) -> tuple[MemoryPlan | None, int]:
    """The plan for a card, None if nothing fits, and the longest answers that do."""
    settings = load_settings(*WORK, f"hardware={card}", *overrides)
    asked, workload = asked_of(settings), workload_of(settings, settings.model.quantization)
    process = Process(
        int((settings.hardware.vram_gib or 0) * GIB),
        shared=True,
        shares_adapter=shares_adapter(settings, subject.targets, engine_name="vllm"),
    )
    plan, _ = first_that_fits(asked, workload, subject.shape, process)
    most = POSITIONS - workload.max_prompt_tokens
    return plan, longest_answer(asked, workload, subject.shape, process, most=most)


def measure(case: str, sampled: int, overrides: Sequence[str]) -> str:
    """The table's line of a case that runs now."""
    command = [sys.executable, "-m", "benchmarks.memory", case, "--sampled", str(sampled), "--steps", "1", *overrides]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    stages = {row["stage"]: row for row in map(json.loads, filter(lambda x: x.startswith("{"), output.splitlines()))}
    rollout, learner = stages["rollout 1"], stages["learner 1"]
    planned, counted = learner["planned_gib"], max(row["process_gib_highest"] for row in stages.values())
    report(benchmark="fits", case=case, planned_gib=planned, process_gib=counted, overrides=overrides)
    rate = rollout["tokens"] / rollout["seconds"]
    return f"| {case} | {planned:.2f} | {counted:.2f} | {rate:,.0f} | {learner['seconds']:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", action="store_true")
    arguments, overrides = parser.parse_known_args()
    if arguments.measure:
        lines = [measure(case, sampled, overrides) for case, sampled in MEASURED.items()]
        print("| case | planned GiB | driver's GiB | tokens/s at the beginning | seconds of learning |")
        print("|---|---|---|---|---|")
        print("\n".join(lines))
        return
    rows = []
    for name in [name for name in SHAPES if name != "tiny"]:
        subject = subject_of(name, overrides)
        for quantization in ("nf4", "none"):
            cells = []
            for card in CARDS:
                plan, longest = plan_of(subject, card, [f"model.quantization={quantization}", *overrides])
                cells.append(f"{longest:,}" if longest else "-")
                if plan is not None:
                    report(
                        benchmark="fits",
                        model=name,
                        quantization=quantization,
                        card=card,
                        overrides=overrides,
                        planned_gib=plan.total / GIB,
                        micro_batch_tokens=plan.way.micro_batch_tokens,
                        longest_answer=longest,
                    )
            rows.append(f"| {name} | {'nf4' if quantization == 'nf4' else '16 bits'} | {' | '.join(cells)} |")
    print(f"| model | | {' | '.join(CARDS)} |")
    print(f"|---|---|{'---|' * len(CARDS)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
