"""From settings to a Learner."""

from actors.build import Machine, lora_arguments
from actors.models import ModelSource, load_base_model
from conf.schema import Settings
from learner.attention import NAME
from learner.learner import Learner
from learner.objectives import OBJECTIVES
from learner.policy import Policy


def build_learner(settings: Settings, machine: Machine, source: ModelSource) -> Learner:
    """The learner at version 0, with weights of its own."""
    model, learner = settings.model, settings.learner
    base = load_base_model(
        source, dtype=machine.dtype, device=machine.device, quantization=model.quantization,
        trust_remote_code=model.trust_remote_code, attention=NAME,
    )  # fmt: skip
    policy = Policy(
        base, lora=lora_arguments(settings), seed=settings.run.seed, temperature=settings.sampling.temperature,
        logit_chunk_tokens=learner.logit_chunk_tokens, gradient_checkpointing=learner.gradient_checkpointing,
    )  # fmt: skip
    return Learner(policy, OBJECTIVES[settings.algorithm.name](settings.algorithm), learner)
