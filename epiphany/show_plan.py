"""task=plan: what a run would do on this machine, and whether it fits. Starts nothing."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from conf.schema import Settings
from epiphany.preflight import check_inputs
from epiphany.quiet import quiet_libraries, quiet_transformers
from epiphany.reward_check import check_reward

if TYPE_CHECKING:
    from actors.models.source import ModelSource


def show_plan(settings: Settings, note: Callable[[str], None]) -> None:
    """Check the data and the reward, and say what would run. Raises UsageError for what cannot."""
    quiet_libraries()
    rows = check_inputs(settings)
    check_reward(settings, rows, note)
    quiet_transformers()
    with warnings.catch_warnings(action="ignore"):
        from epiphany.run_data import describe_data, load_data

    data = load_data(settings, rows)
    describe_data(settings, rows, data.prompts, note)
    for line in _plan_lines(settings, data.source):
        note(line)


def _plan_lines(settings: Settings, source: "ModelSource") -> list[str]:
    """What each process of a run would do on a machine like this one, and what is trained: lines for the user."""
    import torch

    if settings.hardware.device == "cuda" and settings.hardware.vram_gib is not None and not torch.cuda.is_available():
        return _lines_of_another_card(settings, source, settings.hardware.vram_gib)
    from actors.models.loading import positions_of
    from actors.models.lora import lora_arguments_of
    from epiphany.memory_settings import asked_of, process_on_this_card, workload_of
    from epiphany.run_plan import plan_run
    from learner.memory.advice import room_lines

    runtime, algorithm, lora = settings.runtime, settings.algorithm, settings.model.lora
    if runtime.name == "local":
        plan = plan_run(settings, source)
        lines, way = plan.lines(), plan.way
        if plan.device.kind == "cuda":
            workload = workload_of(settings, plan.engine.quantization)
            positions = positions_of(plan.meta_model.config)
            process = process_on_this_card(settings, has_one_adapter=plan.shares_adapter)
            lines += room_lines(asked_of(settings), workload, plan.shape, process, positions=positions)
    else:
        rollout = plan_run(settings, source, roles=frozenset({"rollout"}))
        plan = plan_run(settings, source, roles=frozenset({"learner"}))
        way = rollout.way
        lines = [
            f"{runtime.rollout_workers} rollout workers, each on a machine like this one:",
            *rollout.lines(),
            f"{runtime.learner_data_parallel_size} learners, each on a machine like this one:",
            f"{plan.device.kind} in {plan.device.dtype}",
            *plan.memory,
        ]
    return [
        *lines,
        f"{settings.run.steps} steps of {algorithm.name}, each {algorithm.prompts_per_step} prompts x "
        f"{algorithm.group_size} completions of up to {settings.sampling.max_tokens} tokens, "
        f"{way.max_num_seqs} sequences at a time in each engine",
        f"trains a LoRA adapter of rank {lora.rank} on {', '.join(lora_arguments_of(plan.layout)['target_modules'])}: "
        f"{plan.layout.size:,} numbers",
    ]


def _lines_of_another_card(settings: Settings, source: "ModelSource", vram_gib: float) -> list[str]:
    """What a run in one process would take of a card with this limit. Raises UsageError if it does not fit."""
    from actors.models.loading import positions_of
    from actors.models.lora import lora_arguments_of
    from epiphany.checked_model import check_model
    from epiphany.memory_settings import asked_of, shares_adapter, workload_of
    from learner.memory.advice import plan_memory, room_lines
    from learner.memory.footprint import GIB, Process

    checked = check_model(settings, source, dtype="bfloat16")
    targets = lora_arguments_of(checked.layout)["target_modules"]
    process = Process(
        int(vram_gib * GIB),
        shared=settings.engine.share_weights != "never",
        shares_adapter=shares_adapter(settings, targets, engine_name="vllm"),
    )
    asked, workload = asked_of(settings), workload_of(settings, checked.quantization)
    plan = plan_memory(asked, workload, checked.shape, process, lora_rank=settings.model.lora.rank)
    return [
        f"this machine has no GPU; on a card with a limit of {vram_gib:g} GiB:",
        *plan.lines(),
        *room_lines(asked, workload, checked.shape, process, positions=positions_of(checked.meta_model.config)),
    ]
