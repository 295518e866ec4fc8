"""What the memory plan is made of: what the settings fix, what they ask for, and what this machine's card has."""

import math
from collections.abc import Iterable

import torch

from actors.engines.vllm.adapter_slot import slot_rank
from actors.models.families import ATTENTION, MLP
from conf.schema import Settings
from epiphany.machine import free_memory, gpus_of_machine
from learner.algorithms.table import has_critic
from learner.memory.footprint import GIB, ROLES, Process, Workload
from learner.memory.plan import Asked

HOST_SHARE = 0.8  # of the host's free memory that may be pinned: the rest is for workers, data and the system


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
        kv_cache_dtype=settings.engine.kv_cache_dtype,
        answers_per_unit=2 if algorithm.name == "online_dpo" else 1,
        slot_ratio=slot_rank(settings.model.lora.rank) / settings.model.lora.rank,
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
        # Of a base that is split among learners, a layer is there only while it computes.
        gradient_checkpointing=True if settings.runtime.learner_shards > 1 else learner.gradient_checkpointing,
        offload_activations=learner.offload_activations,
        embedding_on_host=settings.model.embedding_on_host,
        optimizer=None if learner.optimizer == "auto" else learner.optimizer,
    )


def shares_adapter(settings: Settings, targets: Iterable[str], *, engine_name: str) -> bool:
    """Whether engine and learner of one process can have one copy of the adapter, on the layers `targets`: an engine
    that has each of them as it is, and whose sequences are all finished while the learner works.
    """
    is_idle = settings.runtime.name == "local" and settings.runtime.max_staleness == 0
    has_whole_layers = engine_name == "vllm" and {*targets} <= {*ATTENTION, *MLP}
    return is_idle and has_whole_layers and settings.engine.share_weights != "never"


def process_on_this_card(
    settings: Settings, roles: frozenset[str] = ROLES, *, has_one_adapter: bool = False
) -> Process:
    """A process with these roles, and what it may take of this machine: of its GPU, and of the host's memory."""
    free, total = torch.cuda.mem_get_info()
    limit = settings.hardware.vram_gib
    free = min(free, int(_share_of_gpu(settings, roles) * total))
    budget = int(0.9 * free) if limit is None else min(int(limit * GIB), free)
    return Process(
        budget,
        shared=settings.engine.share_weights != "never",
        roles=roles,
        shares_adapter=has_one_adapter and roles == ROLES,
        ranks=settings.runtime.learner_data_parallel_size,
        host_budget=int(HOST_SHARE * free_memory() / _processes_beside(settings)),
    )


def taken_by_others(settings: Settings) -> list[str]:
    """A line for the user if other processes leave less of the card than hardware.vram_gib asks for."""
    (free, total), limit = torch.cuda.mem_get_info(), settings.hardware.vram_gib
    if limit is None or limit * GIB <= free:
        return []
    has = f"hardware.vram_gib={limit:g}: this card has {total / GIB:.2f} GiB, of which {free / GIB:.2f} are free"
    return [has if limit * GIB > total else f"{has}: other processes have the rest (nvidia-smi shows them)"]


def _processes_beside(settings: Settings) -> int:
    """How many of the run's processes may share this machine's memory: no more than its GPUs have room for."""
    runtime = settings.runtime
    if runtime.name == "local":
        return 1
    shares = [share for share in (runtime.rollout_gpus, runtime.learner_gpus) if share]
    room = math.ceil(gpus_of_machine() / min([1.0, *shares]))
    return max(1, min(runtime.rollout_workers + runtime.learner_data_parallel_size, room))


def _share_of_gpu(settings: Settings, roles: frozenset[str]) -> float:
    """The share of one GPU that a process with these roles may use."""
    runtime = settings.runtime
    asked = [runtime.rollout_gpus] * ("rollout" in roles) + [runtime.learner_gpus] * ("learner" in roles)
    return min([1.0, *(share for share in asked if share)])
