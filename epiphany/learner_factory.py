"""A Learner from a plan: its base weights, policy, algorithm and optimizer. Knows settings; starts nothing else."""

from transformers import PreTrainedModel

from actors.engines.base import Engine
from actors.models.loading import check_finite, load_base_model
from actors.models.lora import lora_arguments_of
from actors.models.weight_sharing import SharesWeights, SharingImpossible, share_weights
from conf.schema import LearnerSettings, Settings
from conf.validate import named_terms
from epiphany.adapters import stored_adapter
from epiphany.run_plan import RunPlan
from epiphany.sampling import training_sampling
from learner.algorithms.table import make_algorithm, supervised
from learner.learner import Learner
from learner.model.attention import NAME
from learner.model.critic import Critic
from learner.model.policy import Policy
from learner.optimizer import Optimizer, Schedule


def make_learner_of_plan(settings: Settings, plan: RunPlan, *, engine: Engine | None = None) -> tuple[Learner, str]:
    """The learner at version 0, and where its base weights come from: `engine` if it can share them, or a copy."""
    base, origin = _base_model(settings, plan, engine)
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
        fused_kernels=settings.learner.fused_kernels,
    )
    if (start := stored_adapter(settings, plan.layout)) is not None:
        policy.lora.load(start)
    return assemble_learner(settings, policy, micro_batch_tokens=plan.way.micro_batch_tokens), origin


def assemble_learner(settings: Settings, policy: Policy, *, micro_batch_tokens: int) -> Learner:
    """A learner on `policy` with the algorithm and optimizer that the settings ask for."""
    weights = {str(term.name): term.weight for term in named_terms(settings.reward.terms)}
    algorithm = make_algorithm(settings.algorithm, max_tokens=settings.sampling.max_tokens, term_weights=weights)
    asked, ppo = settings.learner, settings.algorithm.ppo
    schedule = Schedule(
        kind=asked.schedule,
        warmup_steps=asked.warmup_steps,
        min_lr_ratio=asked.min_lr_ratio,
        steps=settings.run.steps,
    )
    optimizer = _make_optimizer(asked, policy, learning_rate=asked.learning_rate, schedule=schedule)
    critic = None
    if algorithm.has_critic:
        critic = Critic(
            policy.hidden_size,
            learning_rate=ppo.value_learning_rate,
            value_clip=ppo.value_clip,
            device=policy.device,
        )
    return Learner(policy, algorithm, optimizer=optimizer, micro_batch_tokens=micro_batch_tokens, critic=critic)


def assemble_supervised_learner(settings: Settings, policy: Policy, *, micro_batch_tokens: int) -> Learner:
    """A learner that warms up `policy`, with an optimizer of its own."""
    schedule = Schedule(kind="constant", warmup_steps=0, min_lr_ratio=0.0, steps=settings.warmup.steps)
    optimizer = _make_optimizer(
        settings.learner, policy, learning_rate=settings.warmup.learning_rate, schedule=schedule
    )
    algorithm = supervised(max_tokens=settings.sampling.max_tokens)
    return Learner(policy, algorithm, optimizer=optimizer, micro_batch_tokens=micro_batch_tokens)


def _make_optimizer(asked: LearnerSettings, policy: Policy, *, learning_rate: float, schedule: Schedule) -> Optimizer:
    return Optimizer(
        policy.lora.flat,
        kind=asked.optimizer,
        learning_rate=learning_rate,
        betas=(asked.adam_beta1, asked.adam_beta2),
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        schedule=schedule,
    )


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
        )
        return base, f"a second copy ({reason})"
