"""What the memory plan is made of: what the settings fix, what they ask for, and what this machine's card has."""

import torch

from conf.schema import Settings
from learner.algorithms.table import has_critic
from learner.memory.footprint import GIB, ROLES, Process, Workload
from learner.memory.plan import Asked


def workload_of(settings: Settings, quantization: str) -> Workload:
    """What memory depends on besides the model."""
    algorithm = settings.algorithm
    return Workload(
        prompts_per_step=algorithm.prompts_per_step,
        group_size=algorithm.group_size,
        max_prompt_tokens=settings.data.max_prompt_tokens,
        max_tokens=settings.sampling.max_tokens,
        max_staleness=settings.runtime.max_staleness,
        quantization=quantization,
        optimizer=settings.learner.optimizer,
        kv_cache_dtype=settings.engine.kv_cache_dtype,
        has_critic=has_critic(algorithm.name),
        has_entropy_bonus=algorithm.entropy_coefficient != 0,
    )


def asked_of(settings: Settings) -> Asked:
    """What the user has fixed of how memory is used."""
    engine, learner = settings.engine, settings.learner
    return Asked(
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        kv_cache_bytes=None if engine.kv_cache_gib is None else int(engine.kv_cache_gib * GIB),
        sleep_mode=engine.sleep_mode,
        micro_batch_tokens=learner.micro_batch_tokens,
        logit_chunk_tokens=learner.logit_chunk_tokens,
        gradient_checkpointing=learner.gradient_checkpointing,
        offload_activations=learner.offload_activations,
    )


def process_on_this_card(settings: Settings, roles: frozenset[str] = ROLES) -> Process:
    """A process with these roles, and what it may take of this machine's GPU."""
    free, total = torch.cuda.mem_get_info()
    limit = settings.hardware.vram_gib
    free = min(free, int(_share_of_gpu(settings, roles) * total))
    budget = int(0.9 * free) if limit is None else min(int(limit * GIB), free)
    return Process(budget, shared=settings.engine.share_weights != "never", roles=roles)


def _share_of_gpu(settings: Settings, roles: frozenset[str]) -> float:
    """The share of one GPU that a process with these roles may use."""
    runtime = settings.runtime
    asked = [runtime.rollout_gpus] * ("rollout" in roles) + [runtime.learner_gpus] * ("learner" in roles)
    return min([1.0, *(share for share in asked if share)])
