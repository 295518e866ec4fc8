"""What a learner's step reports. Knows nothing, so that whoever reads it need not load torch."""

from dataclasses import dataclass


@dataclass
class StepStats:
    """What a step did. Means are over the completion tokens that were trained; `mismatch` is the mean
    |policy - behavior| log-probability in nats, `reference_kl` is k3 against the base model where it was computed."""

    loss: float = 0.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    mismatch: float = 0.0
    mismatch_max: float = 0.0
    capped_share: float = 0.0
    entropy: float = 0.0
    reference_kl: float | None = None
    trained_completions: int = 0
    trained_tokens: int = 0
    stream_tokens: int = 0
    seconds: float = 0.0
