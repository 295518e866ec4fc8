"""Which model fits on which card, by the memory plan: `python -m benchmarks.fits [override ...]`.

For each model of SHAPES and each preset of conf/hardware/, in nf4 and in 16 bits: what the plan takes for one prompt
with 8 answers of 512 tokens, how it would run, and the longest answers that fit. One JSON line for each pair that fits,
then docs/memory.md's table. Arithmetic alone: needs no GPU and loads no weights.
"""

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from actors.models.families import family_of
from actors.models.lora import adapter_layout
from benchmarks.common import report
from benchmarks.shapes import SHAPES, shape_config
from conf.compose import load_settings
from epiphany.adapters import lora_arguments
from epiphany.memory_settings import asked_of, workload_of
from learner.memory.advice import longest_answer
from learner.memory.footprint import GIB, ModelShape, Process
from learner.memory.plan import MemoryPlan, first_that_fits

CARDS = ("8gb", "12gb", "16gb", "24gb", "48gb", "80gb")
POSITIONS = 131072
WORK = (
    "experiment=none",
    "data=file",
    "data.source=none.jsonl",
    "algorithm.prompts_per_step=1",
    "algorithm.group_size=8",
    "sampling.max_tokens=512",
    "data.max_prompt_tokens=128",
)


def shape_of(name: str, overrides: Sequence[str]) -> ModelShape:
    """What the plan needs of a model with an adapter as the settings ask for."""
    config = shape_config(name)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    layout = adapter_layout(model, **lora_arguments(load_settings(*WORK, *overrides), family_of(config)))
    return ModelShape.of(model, layout.size)


def plan_of(shape: ModelShape, card: str, overrides: Sequence[str]) -> tuple[MemoryPlan | None, int]:
    """The plan for a card, None if nothing fits, and the longest answers that do."""
    settings = load_settings(*WORK, f"hardware={card}", *overrides)
    asked, workload = asked_of(settings), workload_of(settings, settings.model.quantization)
    process = Process(int((settings.hardware.vram_gib or 0) * GIB), shared=True)
    plan, _ = first_that_fits(asked, workload, shape, process)
    return plan, longest_answer(asked, workload, shape, process, most=POSITIONS - workload.max_prompt_tokens)


def main() -> None:
    _, overrides = argparse.ArgumentParser(description=__doc__).parse_known_args()
    rows = []
    for name in [name for name in SHAPES if name != "tiny"]:
        shape = shape_of(name, overrides)
        for quantization in ("nf4", "none"):
            cells = []
            for card in CARDS:
                plan, longest = plan_of(shape, card, [f"model.quantization={quantization}", *overrides])
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
