"""What a family of models does that others do not: one table, which learner and engines read.

Knows model types by name only; loads nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelFamily:
    """The particulars of a family.

    `fused_projections` names each matrix that engines stack from several linear layers of transformers, and those
    layers in the order of their rows. nf4 takes or leaves the layers of one matrix together.
    """

    fused_projections: Mapping[str, tuple[str, ...]]

    def fused_name(self, layer: str) -> str | None:
        """The matrix that the linear layer `layer` (the last part of its name) is stacked into, if any."""
        return next((fused for fused, layers in self.fused_projections.items() if layer in layers), None)

    def fused_with(self, layer: str) -> tuple[str, ...]:
        """The layers that are stacked into one matrix with `layer`, itself included."""
        fused = self.fused_name(layer)
        return (layer,) if fused is None else self.fused_projections[fused]


LLAMA = ModelFamily({"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")})
# Its checkpoints hold the stacked matrices, so that transformers has them as single layers.
PHI3 = ModelFamily({})

FAMILIES = {"phi3": PHI3}


def family_of(config: PretrainedConfig) -> ModelFamily:
    """The family of a model; most have Llama's layers."""
    return FAMILIES.get(config.model_type, LLAMA)
