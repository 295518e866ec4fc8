"""What to say beside a plan: by how much a run does not fit, and which settings would make it fit; or how much room is
left, and what more memory would buy.
"""

from dataclasses import replace

from conf.errors import UsageError
from learner.memory.footprint import GIB, Process, Way, Workload
from learner.memory.plan import ADAMW_8BIT, Asked, MemoryPlan, first_that_fits
from learner.memory.shape import ModelShape

LONGEST_KNOWN = 2**20  # tokens, of a model that does not say how many positions it has


class MemoryPlanError(UsageError):
    """The run does not fit; the message says by how much, and which settings would make it fit."""


def plan_memory(asked: Asked, workload: Workload, shape: ModelShape, process: Process, *, lora_rank: int) -> MemoryPlan:
    """The fastest way to run that fits the process's budgets. Raises MemoryPlanError."""
    plan, smallest = first_that_fits(asked, workload, shape, process)
    check_cache(smallest.way, workload)
    if plan is not None:
        return plan
    if process.host_budget is not None:
        on_any_host, _ = first_that_fits(asked, workload, shape, replace(process, host_budget=None))
        if on_any_host is not None:
            raise MemoryPlanError(
                f"hardware.vram_gib: in {process.budget / GIB:.2f} GiB this run needs {on_any_host.on_host / GIB:.2f} "
                f"GiB of the host's memory, too, which has {process.host_budget / GIB:.2f} GiB left for it; end other "
                "programs, or set a smaller sampling.max_tokens"
            )
    halved = max(1, workload.max_tokens // 2)
    alternatives = {
        "model.quantization=nf4": (asked, replace(workload, quantization="nf4"), shape),
        f"learner.optimizer={ADAMW_8BIT}": (replace(asked, optimizer=ADAMW_8BIT), workload, shape),
        "engine.kv_cache_dtype=fp8": (asked, replace(workload, kv_cache_dtype="fp8"), shape),
        f"sampling.max_tokens={halved}": (asked, replace(workload, max_tokens=halved), shape),
        f"model.lora.rank={max(1, lora_rank // 2)}": (asked, workload, replace(shape, lora=shape.lora // 2)),
    }
    lines = []
    for setting, (changed_asked, changed, changed_shape) in alternatives.items():
        plan, least = first_that_fits(changed_asked, changed, changed_shape, process)
        if least.total < smallest.total:
            verdict = "is not enough by itself" if plan is None else "fits"
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


def check_cache(way: Way, workload: Workload) -> None:
    """Raises MemoryPlanError if the cache that the user asked for holds no sequence at full length."""
    if way.full_length_seqs < 1:
        raise MemoryPlanError(
            f"engine.kv_cache_gib: {way.kv_cache_bytes / GIB:.2f} GiB hold not even one sequence of {workload.longest} "
            "tokens; leave it open, or lower data.max_prompt_tokens or sampling.max_tokens"
        )


def longest_answer(asked: Asked, workload: Workload, shape: ModelShape, process: Process, *, most: int) -> int:
    """The largest sampling.max_tokens, up to `most`, with which the run fits in some way; 0 if none fits."""

    def fits(tokens: int) -> bool:
        plan, _ = first_that_fits(asked, replace(workload, max_tokens=tokens), shape, process)
        return plan is not None

    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def room_lines(
    asked: Asked, workload: Workload, shape: ModelShape, process: Process, *, positions: int | None
) -> list[str]:
    """How long answers may be in this budget, and what one GiB more would buy: for the user. `positions` are those of
    the model, if it says how many.
    """
    most = (positions or LONGEST_KNOWN) - workload.max_prompt_tokens
    more = replace(process, budget=process.budget + GIB)
    longest, longer = (longest_answer(asked, workload, shape, of, most=most) for of in (process, more))
    limit = ", all that the model has positions for" if longest == most and positions else ""
    lines = [f"answers of up to {longest:,} tokens fit{limit}"]
    now, then = (first_that_fits(asked, workload, shape, of)[0] for of in (process, more))
    gains = [f"answers of up to {longer:,} tokens"] if longer > longest else []
    if now is not None and then is not None:
        gains += _gains(now.way, then.way)
    lines.append(f"one GiB more would buy {' and '.join(gains)}" if gains else "one GiB more would buy nothing")
    return lines


def _gains(now: Way, then: Way) -> list[str]:
    """What another way does faster."""
    gains = []
    if then.full_length_seqs > now.full_length_seqs:
        gains.append(f"{then.full_length_seqs} sequences at full length at a time instead of {now.full_length_seqs}")
    if then.optimizer != now.optimizer:
        gains.append("moments in 32 bits")
    if now.sleep_mode and not then.sleep_mode:
        gains.append("an engine that need not sleep while the learner works")
    if now.offload_activations and not then.offload_activations:
        gains.append("activations that stay on the card")
    elif now.gradient_checkpointing and not then.gradient_checkpointing:
        gains.append("activations that need not be computed again")
    if not gains and then.micro_batch_tokens > now.micro_batch_tokens:
        gains.append(f"micro-batches of {then.micro_batch_tokens:,} tokens instead of {now.micro_batch_tokens:,}")
    return gains
