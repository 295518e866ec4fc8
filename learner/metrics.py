"""StepStats: what one step of the learner reports.

Plain data. Imports nothing, so that readers of metrics need not load torch.
"""

from dataclasses import dataclass


@dataclass
class StepStats:
    """Statistics of one step. Per-token values are means over the trained completion tokens."""

    # The adapter version that the step made.
    version: int = 0
    # Means over the step's optimizer steps; `grad_norm` is the norm before clipping.
    loss: float = 0.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    # |policy - behavior| log-probability in nats, at the start of the step: mean and maximum.
    logprob_gap: float = 0.0
    logprob_gap_max: float = 0.0
    # Share of tokens whose importance weight is over its cap.
    capped_share: float = 0.0
    # Share of tokens without gradient because of the clip. None with one optimizer step per batch, which cannot clip.
    clipped_share: float | None = None
    # Nats per token.
    entropy: float = 0.0
    # k3 against the base model in nats per token, and the weight of KL in this step. None if not computed.
    reference_kl: float | None = None
    kl_coefficient: float | None = None
    # None without a critic. `explained_variance`: of the returns, by the values before the step.
    value_loss: float | None = None
    explained_variance: float | None = None
    # Pairs trained, and groups without one. None if the algorithm does not train on pairs.
    pairs: int | None = None
    ties: int | None = None
    optimizer_steps: int = 0
    trained_completions: int = 0
    trained_tokens: int = 0
    # Tokens of the packed streams, prompts included.
    stream_tokens: int = 0
    seconds: float = 0.0
