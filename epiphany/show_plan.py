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
    from actors.models.lora import lora_arguments_of
    from epiphany.run_plan import plan_run

    runtime, algorithm, lora = settings.runtime, settings.algorithm, settings.model.lora
    if runtime.name == "local":
        plan = plan_run(settings, source)
        lines, way = plan.lines(), plan.way
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
