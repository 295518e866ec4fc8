"""Supported models: what the learner computes exactly, and what it refuses.

transformers passes what a model needs of its attention as keyword arguments. What the learner does not compute has to
be refused, or it trains on other numbers than the engine's. Knows models' configurations and forward passes; knows
neither adapters nor losses.
"""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from actors.models.source import ModelError
from learner.model.linear_attention import LINEAR_ATTENTION, pack_linear_attention
from learner.model.probe import Probe, listed

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# A rotary embedding whose frequencies change at a length; engine and learner choose them differently.
BY_LENGTH = "longrope"


def check_attention(model: PreTrainedModel, *, longest: int) -> None:
    """Raises ModelError if packed attention does not compute all that mixes the tokens of `model`.

    `model` must use the packed attention (attention.NAME) and may be on the meta device. `longest` is the length of the
    longest sequence in tokens; a rotary embedding that changes with the length is fixed to what it is up to there.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    computed = LAYER_TYPES | ({LINEAR_ATTENTION} if pack_linear_attention(model) else set())
    other_layers = set(getattr(config, "layer_types", None) or ()) - computed
    if other_layers:
        raise ModelError(
            f"{name} has layers of {', '.join(sorted(other_layers))}, which the learner does not compute; "
            "choose another model.path"
        )
    _check_rotary_embedding(name, config, longest=longest)
    for module in model.modules():
        if vars(module).get("rope_type") == BY_LENGTH:
            vars(module)["rope_type"] = "default"  # no sequence is long enough to change it, so nobody needs to look
    probe = Probe()
    two_tokens = torch.arange(2, device=model.device)[None]
    try:
        with torch.no_grad(), _static_experts(model):
            model.get_decoder()(input_ids=two_tokens, position_ids=two_tokens, use_cache=False, packing=probe)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ModelError(f"the attention of {name} cannot be examined ({error}); choose another model.path") from error
    if probe.calls != config.num_hidden_layers:
        raise ModelError(
            f"{name} calls attention {probe.calls} times for {config.num_hidden_layers} layers: it has layers that the "
            "learner does not compute; choose another model.path"
        )
    if probe.asked:
        raise ModelError(
            f"{name} uses {listed(probe.asked)}, which the learner's attention does not compute; "
            "choose another model.path"
        )


def check_head(model: PreTrainedModel) -> None:
    """Raises ModelError if the head of `model` (which may be on the meta device) adds a bias to its logits."""
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(
            f"{type(model).__name__} has a bias in its head, which the learner does not compute; choose another "
            "model.path"
        )


def _check_rotary_embedding(name: str, config: PreTrainedConfig, *, longest: int) -> None:
    asked: dict[str, object] = getattr(config, "rope_parameters", None) or {}
    # Some models have one embedding for each type of layer.
    for rope in (asked, *(value for value in asked.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "dynamic":
            raise ModelError(
                f"{name} has a dynamic rotary embedding, which engines compute otherwise; choose another model.path"
            )
        trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope.get("rope_type") == BY_LENGTH and isinstance(trained, int) and longest > trained:
            raise ModelError(
                f"{name} changes its rotary embedding for sequences over {trained} tokens, and engine and learner "
                f"would not agree when; lower data.max_prompt_tokens or sampling.max_tokens, which allow {longest}"
            )


@contextlib.contextmanager
def _static_experts(model: PreTrainedModel) -> Iterator[None]:
    """Within, experts compute in a way that needs no values, so that a meta model can."""
    stock = getattr(model.config, "_experts_implementation", None)
    if stock is None:
        yield
        return
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(stock)
