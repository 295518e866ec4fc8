"""A Learner from a plan: its base weights, policy, algorithm and optimizer. Knows settings; starts nothing else."""

import contextlib

from transformers import PreTrainedModel

from actors.engines.base import Engine
from actors.models.host_memory import move_to_host
from actors.models.layer_loading import load_by_layer
from actors.models.loading import check_finite, load_base_model
from actors.models.lora import lora_arguments_of
from actors.models.weight_sharing import SharesAdapter, SharesWeights, SharingImpossible, share_weights
from conf.errors import UsageError
from conf.schema import LearnerSettings, Settings
from conf.validate import named_terms
from epiphany.adapters import stored_adapter
from epiphany.run_plan import RunPlan
from epiphany.sampling import training_sampling
from learner.algorithms.table import make_algorithm, supervised
from learner.learner import Learner
from learner.memory.footprint import Way
from learner.model.attention import NAME
from learner.model.critic import Critic
from learner.model.policy import Policy
from learner.optimizer import Optimizer, Schedule
from learner.parallel.sharding import Shard, ShardedBase, ShardedLayer


def make_learner_of_plan(
    settings: Settings, plan: RunPlan, *, engine: Engine | None = None, rank: int = 0
) -> tuple[Learner, str]:
    """The learner at version 0, and where its base weights come from: `engine` if it can share them, a copy, or this
    rank's part of one.
    """
    sharded: ShardedBase | None = None
    if settings.runtime.learner_shards > 1:
        base, sharded = _sharded_base(settings, plan, rank)
        origin = f"one of {settings.runtime.learner_shards} parts"
    else:
        base, origin = _base_model(settings, plan, engine)
    slots = None
    if plan.shares_adapter and isinstance(engine, SharesAdapter):
        with contextlib.suppress(SharingImpossible):  # then the learner has a copy of its own
            slots = engine.adapter_slots()
    check_finite(base, settings.model.path)
    policy = Policy(
        base,
        lora=lora_arguments_of(plan.layout),
        seed=settings.run.seed,
        temperature=settings.sampling.temperature,
        truncation=training_sampling(settings).truncation,
        logit_chunk_tokens=plan.way.logit_chunk_tokens,
        gradient_checkpointing=plan.way.gradient_checkpointing,
        offload_activations=plan.way.offload_activations,
        tile_tokens=plan.way.tile_tokens,
        fused_kernels=settings.learner.fused_kernels,
        adapter_slots=slots,
    )
    if (start := stored_adapter(settings, plan.layout)) is not None:
        policy.lora.load(start)
    return assemble_learner(settings, policy, plan.way, sharded=sharded), origin


def assemble_learner(settings: Settings, policy: Policy, way: Way, *, sharded: ShardedBase | None = None) -> Learner:
    """A learner on `policy` with the algorithm that the settings ask for and the optimizer of the plan."""
    weights = {str(term.name): term.weight for term in named_terms(settings.reward.terms)}
    algorithm = make_algorithm(settings.algorithm, max_tokens=settings.sampling.max_tokens, term_weights=weights)
    asked, ppo = settings.learner, settings.algorithm.ppo
    schedule = Schedule(
        kind=asked.schedule,
        warmup_steps=asked.warmup_steps,
        min_lr_ratio=asked.min_lr_ratio,
        steps=settings.run.steps,
    )
    optimizer = _make_optimizer(asked, policy, way, learning_rate=asked.learning_rate, schedule=schedule)
    critic = None
    if algorithm.has_critic:
        critic = Critic(
            policy.hidden_size,
            learning_rate=ppo.value_learning_rate,
            value_clip=ppo.value_clip,
            device=policy.device,
        )
    return Learner(
        policy,
        algorithm,
        optimizer=optimizer,
        micro_batch_tokens=way.micro_batch_tokens,
        critic=critic,
        sharded=sharded,
    )


def assemble_supervised_learner(
    settings: Settings, policy: Policy, way: Way, *, sharded: ShardedBase | None
) -> Learner:
    """A learner that warms up `policy`, with an optimizer of its own."""
    schedule = Schedule(kind="constant", warmup_steps=0, min_lr_ratio=0.0, steps=settings.warmup.steps)
    optimizer = _make_optimizer(
        settings.learner, policy, way, learning_rate=settings.warmup.learning_rate, schedule=schedule
    )
    algorithm = supervised(max_tokens=settings.sampling.max_tokens)
    return Learner(policy, algorithm, optimizer=optimizer, micro_batch_tokens=way.micro_batch_tokens, sharded=sharded)


def _make_optimizer(
    asked: LearnerSettings, policy: Policy, way: Way, *, learning_rate: float, schedule: Schedule
) -> Optimizer:
    return Optimizer(
        policy.lora.flat,
        kind=way.optimizer,
        learning_rate=learning_rate,
        betas=(asked.adam_beta1, asked.adam_beta2),
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        schedule=schedule,
    )


def _sharded_base(settings: Settings, plan: RunPlan, rank: int) -> tuple[PreTrainedModel, ShardedBase]:
    """The base of which this rank keeps a part of every layer. Raises UsageError where ranks could not stay in step."""
    if plan.device.dtype == "float16":
        raise UsageError(
            "runtime.learner_shards: float16 gradients that overflow are computed again, which learners in lockstep "
            "cannot do one by one; use cards with bfloat16, or model.dtype=float32"
        )
    shard = Shard(rank % settings.runtime.learner_shards, settings.runtime.learner_shards)
    layers: list[ShardedLayer] = []
    base = load_by_layer(
        plan.meta_model,
        plan.source,
        device=plan.device.kind,
        quantization=plan.engine.quantization,
        kept=frozenset(plan.engine.keep_16bit),
        trust_remote_code=settings.model.trust_remote_code,
        after_layer=lambda layer: layers.append(ShardedLayer(layer, shard)),
    )
    if plan.way.embedding_on_host:
        move_to_host(base, base.get_input_embeddings())
    return base, ShardedBase(layers, shard)


def _base_model(settings: Settings, plan: RunPlan, engine: Engine | None) -> tuple[PreTrainedModel, str]:
    share = settings.engine.share_weights
    try:
        if share == "never":
            raise SharingImpossible("engine.share_weights=never")
        if engine is None:
            raise SharingImpossible("the engine is in another process")
        if not isinstance(engine, SharesWeights):
            raise SharingImpossible(f"{type(engine).__name__} does not share its weights")
        weights = engine.base_weights()
        return share_weights(plan.meta_model, weights, device=plan.device.kind), "shared with the engine"
    except SharingImpossible as reason:
        if share == "always":
            raise
        base = load_base_model(
            plan.source,
            dtype=plan.device.dtype,
            device=plan.device.kind,
            quantization=plan.engine.quantization,
            trust_remote_code=settings.model.trust_remote_code,
            attention=NAME,
            keep_16bit=plan.engine.keep_16bit,
            embedding_on_host=plan.way.embedding_on_host,
        )
        return base, f"a second copy ({reason})"
