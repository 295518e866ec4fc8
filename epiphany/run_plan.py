"""RunPlan: what one process of a run will do, resolved once from Settings. Nothing in it is left open.

`Settings` is what was asked; a RunPlan is what will be done: on which device, with which engine and copy of the
weights, and how memory is used. It is made before anything loads. Knows models' shapes; starts nothing.
"""

import os
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from actors.engines.base import EngineOptions
from actors.engines.registry import choose_engine
from actors.models.loading import choose_dtype
from actors.models.lora import lora_arguments_of
from actors.models.source import ModelSource
from actors.types import AdapterLayout
from conf.errors import UsageError
from conf.schema import Settings
from epiphany.checked_model import check_embedding, check_model
from epiphany.memory_settings import asked_of, process_on_this_card, shares_adapter, taken_by_others, workload_of
from epiphany.placement import threads_of
from learner.memory.advice import MemoryPlanError, check_cache, plan_memory
from learner.memory.footprint import ROLES, Way
from learner.memory.plan import MemoryPlan, plan_without_gpu
from learner.memory.shape import ModelShape

EXPANDABLE_SEGMENTS = "expandable_segments:True"


@dataclass(frozen=True)
class Device:
    """What a process runs on: `kind` is cpu or cuda."""

    kind: str
    threads: int
    dtype: str


@dataclass(frozen=True)
class RunPlan:
    """What a process with these `roles` will do. `memory` are lines for the user; `meta_model` has no weights.

    `card` is how a GPU's memory is used; None on a CPU, where it is not limited.
    `shares_adapter`: the learner computes with the engine's copy of the adapter.
    """

    roles: frozenset[str]
    device: Device
    source: ModelSource
    engine_name: str
    engine_reason: str
    engine: EngineOptions
    layout: AdapterLayout
    shape: ModelShape
    way: Way
    meta_model: PreTrainedModel
    memory: list[str]
    card: MemoryPlan | None
    shares_adapter: bool

    def lines(self) -> list[str]:
        """The plan for the user."""
        return [
            f"engine {self.engine_name} ({self.engine_reason}) on {self.device.kind} in {self.device.dtype}; "
            f"model {self.source.origin}",
            *self.memory,
        ]


def choose_device(settings: Settings) -> Device:
    """Device, threads and dtype of this process. Raises UsageError if a GPU is asked for and there is none."""
    kind, has_gpu = settings.hardware.device, torch.cuda.is_available()
    if kind == "auto":
        kind = "cuda" if has_gpu else "cpu"
    if kind == "cuda" and not has_gpu:
        raise UsageError("hardware.device=cuda: torch sees no GPU here; use hardware=auto or hardware=cpu")
    return Device(kind, threads_of(settings), choose_dtype(settings.model.dtype, kind))


def plan_run(
    settings: Settings, source: ModelSource, *, roles: frozenset[str] = ROLES, is_server: bool = False
) -> RunPlan:
    """What a process of this machine with these `roles` will do. Raises UsageError for what cannot run.

    `is_server`: the engine is vLLM's own server, which leaves no part of the base out of the card's memory.
    """
    device = choose_device(settings)
    checked = check_model(settings, source, dtype=device.dtype)
    quantization, shape = checked.quantization, checked.shape
    if roles == {"rollout"}:
        shape = shape.shard(settings.engine.tensor_parallel_size)
    elif roles == {"learner"}:
        shape = shape.shard_layers(settings.runtime.learner_shards)
    engine_name, reason = choose_engine(
        settings.engine.name,
        device=device.kind,
        quantization=quantization,
        family=checked.family,
        tensor_parallel_size=settings.engine.tensor_parallel_size,
    )
    check_embedding(settings, shape, device=device.kind)
    targets = lora_arguments_of(checked.layout)["target_modules"]
    has_one_adapter = roles == ROLES and shares_adapter(settings, targets, engine_name=engine_name)
    way, memory, card = _plan_memory(
        settings,
        device,
        shape,
        quantization=quantization,
        roles=roles,
        has_one_adapter=has_one_adapter,
        is_server=is_server,
    )
    return RunPlan(
        roles=roles,
        device=device,
        source=source,
        engine_name=engine_name,
        engine_reason=reason,
        engine=_engine_options(
            settings, device, source, quantization=quantization, keep_16bit=sorted(checked.kept), way=way
        ),
        layout=checked.layout,
        shape=shape,
        way=way,
        meta_model=checked.meta_model,
        memory=memory,
        card=card,
        shares_adapter=has_one_adapter,
    )


def apply_limits(plan: RunPlan) -> None:
    """Hold torch's allocator in this process to the plan."""
    if plan.card is None:
        torch.set_num_threads(plan.device.threads)
    else:
        enable_expandable_segments()
        torch.cuda.set_per_process_memory_fraction(plan.card.allocator_bytes / torch.cuda.mem_get_info()[1])


def enable_expandable_segments() -> None:
    """Let torch's allocator extend a segment rather than add one, unless the environment configures it already.

    Memory then neither fragments nor peaks.
    """
    if os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        return
    # vLLM reads this before it pools memory, which cannot be extended.
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = EXPANDABLE_SEGMENTS
    torch._C._accelerator_setAllocatorSettings(EXPANDABLE_SEGMENTS)


def _plan_memory(
    settings: Settings,
    device: Device,
    shape: ModelShape,
    *,
    quantization: str,
    roles: frozenset[str],
    has_one_adapter: bool,
    is_server: bool,
) -> tuple[Way, list[str], MemoryPlan | None]:
    """How memory is used, lines for the user, and the plan of a GPU."""
    asked, workload = asked_of(settings), workload_of(settings, quantization)
    if is_server:
        asked = replace(asked, embedding_on_host=False, quantized_scales=False)
    if device.kind != "cuda":
        value_bytes = getattr(torch, device.dtype).itemsize
        way = plan_without_gpu(asked, workload, shape, value_bytes=value_bytes)
        check_cache(way, workload)
        return way, [], None
    process = process_on_this_card(settings, roles, has_one_adapter=has_one_adapter)
    taken = taken_by_others(settings)
    try:
        plan = plan_memory(asked, workload, shape, process, lora_rank=settings.model.lora.rank)
    except MemoryPlanError as error:
        raise MemoryPlanError("\n".join([str(error), *taken])) from None
    lines = [*plan.lines(), *taken]
    if settings.model.dtype == "bfloat16" and device.dtype == "float16":
        lines.insert(0, "this card has no bfloat16: computing in float16 instead")
    return plan.way, lines, plan


def _engine_options(
    settings: Settings, device: Device, source: ModelSource, *, quantization: str, keep_16bit: list[str], way: Way
) -> EngineOptions:
    engine, on_cpu = settings.engine, device.kind == "cpu"
    return EngineOptions(
        model_path=source.path,
        revision=source.revision,
        trust_remote_code=settings.model.trust_remote_code,
        dtype=device.dtype,
        quantization=quantization,
        device=device.kind,
        threads=device.threads,
        max_model_len=settings.data.max_prompt_tokens + settings.sampling.max_tokens,
        max_num_seqs=way.max_num_seqs,
        max_num_batched_tokens=way.max_num_batched_tokens,
        kv_cache_bytes=way.kv_cache_bytes,
        enforce_eager=on_cpu if engine.enforce_eager is None else engine.enforce_eager,
        per_request_seeds=on_cpu if engine.per_request_seeds is None else engine.per_request_seeds,
        seed=settings.run.seed,
        kv_cache_dtype=engine.kv_cache_dtype,
        keep_16bit=tuple(keep_16bit),
        share_weights=engine.share_weights != "never",
        sleep_mode=way.sleep_mode,
        embedding_on_host=way.embedding_on_host,
        quantized_scales=way.quantized_scales,
        tensor_parallel_size=engine.tensor_parallel_size,
    )
