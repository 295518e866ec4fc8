"""The model of a run, examined without its weights: what no engine or learner of ours computes is refused.

Knows models' configurations and shapes; knows neither devices nor memory.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from actors.models.families import ModelFamily, check_quantization, family_of
from actors.models.loading import check_checkpoint, checkpoint_quantization, positions_of
from actors.models.lora import adapter_layout
from actors.models.source import ModelSource
from actors.models.weight_sharing import build_meta_model, resolve_kept_modules
from actors.types import AdapterLayout
from conf.errors import UsageError
from conf.schema import Settings
from epiphany.adapters import lora_arguments
from learner.memory.shape import ModelShape
from learner.model.attention import NAME
from learner.model.supported import check_attention, check_head


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


def check_embedding(settings: Settings, shape: ModelShape, *, device: str) -> None:
    """Raises UsageError if the embedding is to be in the host's memory and cannot be."""
    if not settings.model.embedding_on_host:
        return
    if device == "cpu":
        raise UsageError("model.embedding_on_host=true: it is in the host's memory without a GPU; leave it out")
    if not shape.embedding:
        raise UsageError(
            f"model.embedding_on_host=true: the embedding of {settings.model.path} is its head, too, which the "
            "GPU needs; leave it out"
        )


def _check_positions(model: PreTrainedModel, longest: int, path: str) -> None:
    positions = positions_of(model.config)
    if positions is not None and longest > positions:
        raise UsageError(
            f"data.max_prompt_tokens + sampling.max_tokens = {longest}: {path} has {positions} positions; lower one of "
            "them"
        )
