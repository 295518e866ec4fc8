"""From settings to a Learner: first what fits, then the model with the engine's weights or its own."""

import os
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from actors.build import Machine, lora_arguments
from actors.engine import Engine
from actors.lora import adapter_layout
from actors.models import ModelSource, check_checkpoint, check_finite, load_base_model, stored_quantization
from actors.shared import SharesWeights, SharingImpossible, attach, build_skeleton, kept_in_16bit
from actors.types import AdapterLayout
from conf.check import named_terms
from conf.errors import UsageError
from conf.schema import Settings
from learner import memory
from learner.attention import NAME, check_attention
from learner.learner import Learner
from learner.objectives import OBJECTIVES
from learner.policy import Policy, check_logits

GROW_IN_PLACE = "expandable_segments:True"


@dataclass(frozen=True)
class Blueprint:
    """What is settled before anything loads: `settings` without nulls of the memory plan, on which `machine` and from which
    `source`, the model's structure and sizes, the adapter's layout, and `notes` for the user."""

    settings: Settings
    machine: Machine
    source: ModelSource
    skeleton: PreTrainedModel
    shape: memory.ModelShape
    layout: AdapterLayout
    notes: list[str]


def settle(settings: Settings, source: ModelSource) -> Settings:
    """Say of the model what its checkpoint says: that it is in 4 bits already, and which layers model.keep_16bit names."""
    model = replace(settings.model, quantization=stored_quantization(source) or settings.model.quantization)
    if model.keep_16bit:
        skeleton = build_skeleton(source, dtype="float32", trust_remote_code=model.trust_remote_code)
        model = replace(model, keep_16bit=sorted(kept_in_16bit(skeleton, model.keep_16bit)))
    return replace(settings, model=model)


def draw(
    settings: Settings, machine: Machine, source: ModelSource, *, roles: frozenset[str] = memory.BOTH
) -> Blueprint:
    """Settle what the memory plan decides and hold torch's allocator to it, for a process that has these `roles`. Raises
    MemoryPlanError, and UsageError if the model has too few positions."""
    settings = settle(settings, source)
    model = settings.model
    skeleton = build_skeleton(source, dtype=machine.dtype, trust_remote_code=model.trust_remote_code, attention=NAME)
    longest = settings.data.max_prompt_tokens + settings.sampling.max_tokens
    positions = getattr(skeleton.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UsageError(
            f"data.max_prompt_tokens + sampling.max_tokens = {longest}: {model.path} has {positions} positions; lower one of them"
        )
    check_checkpoint(source, skeleton, trust_remote_code=model.trust_remote_code)
    check_attention(skeleton, longest=longest)
    check_logits(skeleton)
    kept = frozenset(model.keep_16bit)
    layout = adapter_layout(skeleton, **lora_arguments(settings))
    shape = memory.ModelShape.of(skeleton, layout.size, kept)
    if roles == {"rollout"}:
        shape = shape.spread(settings.engine.tensor_parallel_size)
    if machine.device != "cuda":
        entry = getattr(torch, machine.dtype).itemsize
        return Blueprint(memory.without_gpu(settings, shape, entry=entry), machine, source, skeleton, shape, layout, [])
    free, total = torch.cuda.mem_get_info()
    limit = settings.hardware.vram_gib
    free = min(free, int(_share_of_gpu(settings, roles) * total))
    budget = int(0.9 * free) if limit is None else min(int(limit * memory.GIB), free)
    plan = memory.plan(settings, shape, budget=budget, shared=settings.engine.share_weights != "never", roles=roles)
    let_memory_grow_in_place()
    torch.cuda.set_per_process_memory_fraction(plan.allocator_bytes / total)
    return Blueprint(plan.settings, machine, source, skeleton, shape, layout, plan.lines())


def let_memory_grow_in_place() -> None:
    """Have torch's allocator extend a segment rather than add one, so that memory neither fragments nor peaks, unless the
    environment already configures it."""
    if os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        return
    # vLLM looks here before it pools memory, which cannot grow so.
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = GROW_IN_PLACE
    torch._C._accelerator_setAllocatorSettings(GROW_IN_PLACE)


def _share_of_gpu(settings: Settings, roles: frozenset[str]) -> float:
    """Of one GPU, what a process with these roles may use."""
    r = settings.runtime
    asked = [r.rollout_gpus] * ("rollout" in roles) + [r.learner_gpus] * ("learner" in roles)
    return min([1.0, *(n for n in asked if n)])


def build_learner(blueprint: Blueprint, *, engine: Engine | None = None) -> tuple[Learner, str]:
    """The learner at version 0, and where its base weights come from: `engine` if it can lend them, or a copy."""
    settings = blueprint.settings
    learner = settings.learner
    assert learner.logit_chunk_tokens is not None
    base, origin = _base_model(blueprint, engine)
    check_finite(base, settings.model.path)
    policy = Policy(
        base, lora=lora_arguments(settings), seed=settings.run.seed, temperature=settings.sampling.temperature,
        logit_chunk_tokens=learner.logit_chunk_tokens, gradient_checkpointing=bool(learner.gradient_checkpointing),
        offload_activations=bool(learner.offload_activations), fused_kernels=learner.fused_kernels,
    )  # fmt: skip
    weights = {str(term.name): term.weight for term in named_terms(settings.reward.terms)}
    objective = OBJECTIVES[settings.algorithm.name](
        settings.algorithm, max_tokens=settings.sampling.max_tokens, term_weights=weights
    )
    return Learner(policy, objective, learner, steps=settings.run.steps), origin


def _base_model(blueprint: Blueprint, engine: Engine | None) -> tuple[PreTrainedModel, str]:
    settings, machine, source = blueprint.settings, blueprint.machine, blueprint.source
    share, model = settings.engine.share_weights, settings.model
    try:
        if share == "never":
            raise SharingImpossible("engine.share_weights=never")
        if engine is None:
            raise SharingImpossible("no engine is in its process")
        if not isinstance(engine, SharesWeights):
            raise SharingImpossible(f"{type(engine).__name__} lends no weights")
        return attach(blueprint.skeleton, engine.base_weights(), device=machine.device), "shared with the engine"
    except SharingImpossible as reason:
        if share == "always":
            raise
        base = load_base_model(
            source, dtype=machine.dtype, device=machine.device, quantization=model.quantization,
            trust_remote_code=model.trust_remote_code, attention=NAME, keep_16bit=model.keep_16bit,
        )  # fmt: skip
        return base, f"a second copy ({reason})"
