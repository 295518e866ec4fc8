"""RunPlan: what one process of a run will do, resolved once from Settings. Nothing in it is left open.

`Settings` is what was asked; a RunPlan is what will be done: on which device, with which engine and copy of the
weights, and how memory is used. It is made before anything loads. Knows models' shapes; starts nothing.
"""

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from actors.engines.base import EngineOptions
from actors.engines.registry import choose_engine
from actors.models.families import ModelFamily, check_quantization, family_of
from actors.models.loading import check_checkpoint, checkpoint_quantization, choose_dtype, positions_of
from actors.models.lora import adapter_layout, lora_arguments_of
from actors.models.source import ModelSource
from actors.models.weight_sharing import build_meta_model, resolve_kept_modules
from actors.types import AdapterLayout
from conf.errors import UsageError
from conf.schema import Settings
from epiphany.adapters import lora_arguments
from epiphany.memory_settings import asked_of, process_on_this_card, shares_adapter, taken_by_others, workload_of
from epiphany.placement import threads_of
from learner.memory.advice import MemoryPlanError, check_cache, plan_memory
from learner.memory.footprint import ROLES, Way
from learner.memory.plan import MemoryPlan, plan_without_gpu
from learner.memory.shape import ModelShape
from learner.model.attention import NAME
from learner.model.supported import check_attention, check_head

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


@dataclass(frozen=True)
class CheckedModel:
    """A model that can run here, without weights, and what is planned with: its adapter, its sizes, what nf4 leaves."""

    meta_model: PreTrainedModel
    family: ModelFamily
    quantization: str
    kept: frozenset[str]
    layout: AdapterLayout
    shape: ModelShape


def check_model(settings: Settings, source: ModelSource, *, dtype: str) -> CheckedModel:
    """The model of the settings. Raises UsageError for what no engine or learner of ours computes."""
    model = settings.model
    quantization = checkpoint_quantization(source, trust_remote_code=model.trust_remote_code) or model.quantization
    meta_model = build_meta_model(source, dtype=dtype, trust_remote_code=model.trust_remote_code, attention=NAME)
    longest = settings.data.max_prompt_tokens + settings.sampling.max_tokens
    _check_positions(meta_model, longest, model.path)
    check_checkpoint(source, meta_model, trust_remote_code=model.trust_remote_code)
    check_attention(meta_model, longest=longest)
    check_head(meta_model)
    kept = resolve_kept_modules(meta_model, model.keep_16bit)
    family = family_of(meta_model.config)
    check_quantization(family, quantization)
    layout = adapter_layout(meta_model, **lora_arguments(settings, family))
    return CheckedModel(meta_model, family, quantization, kept, layout, ModelShape.of(meta_model, layout.size, kept))


def plan_run(settings: Settings, source: ModelSource, *, roles: frozenset[str] = ROLES) -> RunPlan:
    """What a process of this machine with these `roles` will do. Raises UsageError for what cannot run."""
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
    targets = lora_arguments_of(checked.layout)["target_modules"]
    has_one_adapter = roles == ROLES and shares_adapter(settings, targets, engine_name=engine_name)
    way, memory, card = _plan_memory(
        settings, device, shape, quantization=quantization, roles=roles, has_one_adapter=has_one_adapter
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
) -> tuple[Way, list[str], MemoryPlan | None]:
    """How memory is used, lines for the user, and the plan of a GPU."""
    asked, workload = asked_of(settings), workload_of(settings, quantization)
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


def _check_positions(model: PreTrainedModel, longest: int, path: str) -> None:
    positions = positions_of(model.config)
    if positions is not None and longest > positions:
        raise UsageError(
            f"data.max_prompt_tokens + sampling.max_tokens = {longest}: {path} has {positions} positions; lower one of "
            "them"
        )
