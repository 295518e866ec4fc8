"""What a learner's step reports. Knows nothing, so that whoever reads it need not load torch."""

from dataclasses import dataclass


@dataclass
class StepStats:
    """What a step did. Means are over the completion tokens that were trained; `mismatch` is the mean
    |policy - behavior| log-probability in nats, `reference_kl` is k3 against the base model where it was computed, and
    `kl_coefficient` its weight in that step. `clipped_share` is None with one optimizer step a batch, which cannot clip.
    `explained_variance` is of the returns, by the values before the step."""

    loss: float = 0.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    mismatch: float = 0.0
    mismatch_max: float = 0.0
    capped_share: float = 0.0
    clipped_share: float | None = None
    entropy: float = 0.0
    reference_kl: float | None = None
    kl_coefficient: float | None = None
    value_loss: float | None = None
    explained_variance: float | None = None
    pairs: int | None = None
    ties: int | None = None
    optimizer_steps: int = 0
    trained_completions: int = 0
    trained_tokens: int = 0
    stream_tokens: int = 0
    seconds: float = 0.0
