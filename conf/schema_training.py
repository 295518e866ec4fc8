"""Settings of the objective and of the optimizer step. conf/facts.py says which algorithm reads which setting."""

from dataclasses import dataclass, field

from conf.facts import ALGORITHMS
from conf.fields import setting


@dataclass
class PPOSettings:
    """Settings of `algorithm=ppo`: advantage estimation and the value head."""

    gamma: float = setting(1.0, "Discount factor per token.", minimum=0, maximum=1)
    gae_lambda: float = setting(1.0, "Lambda of generalized advantage estimation.", minimum=0, maximum=1)
    value_clip: float | None = setting(
        0.2, "How far a value may move from its old value in one step. null: no limit.", above=0
    )
    value_learning_rate: float = setting(5e-3, "Learning rate of the value head.", above=0)
    critic_warmup_steps: int = setting(0, "Steps at the start in which only the value head is trained.", minimum=0)


@dataclass
class OnlineDPOSettings:
    """Settings of `algorithm=online_dpo`."""

    beta: float = setting(0.1, "Strength of the pull toward the reference model.", above=0)
    preference_loss: str = setting(
        "sigmoid", "Loss of a pair of completions; sigmoid is DPO's.", choices=("sigmoid", "ipo", "hinge")
    )


@dataclass
class AlgorithmSettings:
    """The objective and its constants. docs/algorithms.md says when to choose which algorithm."""

    name: str = setting("grpo", "The algorithm.", choices=tuple(ALGORITHMS), extensible=True)
    prompts_per_step: int = setting(16, "Prompts in the batch of a step.", minimum=1)
    group_size: int = setting(8, "Completions sampled for each prompt, which are compared with each other.", minimum=2)
    epochs: int = setting(1, "Passes over the batch of a step.", minimum=1)
    minibatches: int = setting(
        1, "Optimizer steps in each pass; each uses a part of the prompts of the batch.", minimum=1
    )

    scale_rewards: str | None = setting(
        None,
        "What advantages are divided by: the standard deviation of the rewards in the group or in the batch, or "
        "nothing. null: the algorithm's default.",
        choices=("group", "batch", "none"),
    )
    normalize_terms: bool = setting(
        False, "Normalize each term of the reward in its group by itself (GDPO, arXiv:2601.05242)."
    )
    zero_variance_groups: str = setting(
        "keep",
        "Groups in which all rewards are equal. keep: they count in the means of the loss. filter: they do not. "
        "resample: other prompts take their place.",
        choices=("keep", "filter", "resample"),
    )
    max_resampled: float = setting(
        3.0, "resample replaces at most this many groups per step, as a multiple of prompts_per_step.", minimum=0
    )
    mask_truncated: bool = setting(False, "Leave completions that were cut off at sampling.max_tokens out of the loss.")
    overlong_buffer: float = setting(
        0.0,
        "Length penalty: the reward falls linearly by up to 1 over this last part of sampling.max_tokens "
        "(0.2: the last fifth). 0: no penalty.",
        minimum=0,
        maximum=1,
    )

    clip_low: float = setting(0.2, "The ratio policy / old is clipped at 1 - clip_low.", minimum=0)
    clip_high: float = setting(0.2, "The ratio policy / old is clipped at 1 + clip_high.", minimum=0)
    dual_clip: float | None = setting(
        None, "For negative advantages, also cap the ratio at this value (dual-clip PPO). null: no cap.", above=0
    )
    loss_aggregation: str | None = setting(
        None,
        "How the losses of tokens are combined. sequence_mean: mean over each completion, then over completions. "
        "token_mean: mean over all tokens. constant_length: sum over each completion / sampling.max_tokens, then mean "
        "over completions. sequence_sum: sum over each completion, then mean over completions. "
        "null: the algorithm's default.",
        choices=("sequence_mean", "token_mean", "constant_length", "sequence_sum"),
    )
    kl_coefficient: float = setting(
        0.0, "Weight of KL(policy || base model). 0: the reference pass is skipped.", minimum=0
    )
    kl_estimator: str = setting("k3", "Estimator of the KL divergence.", choices=("k1", "k2", "k3"))
    kl_placement: str = setting(
        "loss", "Add the KL term to the loss, or subtract it from the reward.", choices=("loss", "reward")
    )
    kl_target: float | None = setting(
        None, "Adapt kl_coefficient by up to 2 % a step to reach this KL divergence. null: fixed.", above=0
    )
    entropy_coefficient: float = setting(0.0, "Weight of the entropy bonus.", minimum=0)
    importance_sampling_cap: float | None = setting(
        2.0,
        "Cap of the importance weight old / behavior, which corrects the log-probability gap between engine and "
        "learner. null: no correction.",
        above=0,
    )
    importance_sampling_level: str = setting(
        "token", "Importance weights per token or per completion.", choices=("token", "sequence")
    )
    importance_sampling_mode: str = setting(
        "truncate", "Weights above the cap: set to the cap (truncate) or to 0 (mask).", choices=("truncate", "mask")
    )

    ppo: PPOSettings = field(default_factory=PPOSettings)
    online_dpo: OnlineDPOSettings = field(default_factory=OnlineDPOSettings)

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps for each batch."""
        return self.epochs * self.minibatches


@dataclass
class WarmupSettings:
    """Supervised fine-tuning on demonstrations before the first rollout, for a form that the model never writes."""

    steps: int = setting(0, "Optimizer steps. 0: none.", minimum=0)
    column: str | None = setting(
        None,
        "Column of the training rows with demonstrations: whole answers, as the model should write them. null: eight "
        "built-in ones, in the form <think>...</think><answer>...</answer>.",
    )
    demonstrations_per_step: int = setting(8, "Demonstrations in the batch of a step.", minimum=1)
    learning_rate: float = setting(1e-4, "Learning rate.", above=0)


@dataclass
class LearnerSettings:
    """The optimizer step."""

    learning_rate: float = setting(1e-4, "Peak learning rate.", above=0)
    schedule: str = setting(
        "constant",
        "Learning rate after the warmup: constant, or a decay until run.steps.",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = setting(0, "Steps of linear warmup.", minimum=0)
    min_lr_ratio: float = setting(0.0, "The decay ends at learning_rate times this.", minimum=0, maximum=1)
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", minimum=0)
    max_grad_norm: float = setting(1.0, "The gradient is scaled down to this norm.", above=0)
    adam_beta1: float = setting(0.9, "Decay of the first moment.", minimum=0, below=1)
    adam_beta2: float = setting(0.999, "Decay of the second moment.", minimum=0, below=1)
    optimizer: str = setting(
        "auto",
        "adamw8bit keeps moments in one byte each (bitsandbytes). auto: adamw, unless the memory plan needs adamw8bit.",
        choices=("auto", "adamw", "adamw8bit"),
    )
    micro_batch_tokens: int | None = setting(
        None, "Tokens in one packed micro-batch. null: the memory plan decides (8192 without a GPU).", minimum=1
    )
    logit_chunk_tokens: int | None = setting(
        None,
        "Tokens whose logits are in memory at one time. null: the memory plan decides (1024 without a GPU).",
        minimum=1,
    )
    gradient_checkpointing: bool | None = setting(
        None, "Recompute activations in the backward pass. null: the memory plan decides (false without a GPU)."
    )
    offload_activations: bool | None = setting(
        None, "Keep checkpointed activations in host memory. null: the memory plan decides (false without a GPU)."
    )
    fused_kernels: bool = setting(
        True,
        "Use liger-kernel's fused norms, rotary embedding and SwiGLU, if it is installed and supports the model.",
    )
