"""What to say when no way to run fits: by how much, and which settings would make it fit."""

from dataclasses import replace

from conf.errors import UsageError
from learner.memory.footprint import GIB, ModelShape, Process, Workload
from learner.memory.plan import Asked, MemoryPlan, first_that_fits


class MemoryPlanError(UsageError):
    """The run does not fit; the message says by how much, and which settings would make it fit."""


def plan_memory(asked: Asked, workload: Workload, shape: ModelShape, process: Process, *, lora_rank: int) -> MemoryPlan:
    """The fastest way to run that fits the process's budget. Raises MemoryPlanError."""
    plan, smallest = first_that_fits(asked, workload, shape, process)
    if plan is not None:
        return plan
    halved = max(1, workload.max_tokens // 2)
    alternatives = {
        "model.quantization=nf4": (replace(workload, quantization="nf4"), shape),
        "learner.optimizer=adamw8bit": (replace(workload, optimizer="adamw8bit"), shape),
        "engine.kv_cache_dtype=fp8": (replace(workload, kv_cache_dtype="fp8"), shape),
        f"sampling.max_tokens={halved}": (replace(workload, max_tokens=halved), shape),
        f"model.lora.rank={max(1, lora_rank // 2)}": (workload, replace(shape, lora=shape.lora // 2)),
    }
    lines = []
    for setting, (changed, changed_shape) in alternatives.items():
        _, least = first_that_fits(asked, changed, changed_shape, process)
        if least.total < smallest.total:
            verdict = "fits" if least.total <= process.budget else "is not enough by itself"
            lines.append(f"  {setting}: {least.total / GIB:.2f} GiB, {verdict}")
    raise MemoryPlanError(
        "\n".join(
            [
                f"hardware.vram_gib: {process.budget / GIB:.2f} GiB cannot hold this run; the smallest way to run it "
                f"takes {smallest.total / GIB:.2f} GiB, {(smallest.total - process.budget) / GIB:.2f} too much",
                *smallest.lines()[1:],
                "what would take less:",
                *lines,
                "  or a smaller model",
            ]
        )
    )
