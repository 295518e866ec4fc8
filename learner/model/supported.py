"""Supported models: what the learner computes exactly, and what it refuses.

transformers passes what a model needs of its attention as keyword arguments, and changes logits where a configuration
says so. What the learner does not compute has to be refused, or it trains on other numbers than the engine's. Knows
models' configurations and forward passes; knows neither adapters nor losses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from actors.models.source import ModelError

# Keywords of an attention call that change neither which keys a query sees nor how they are weighted.
HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"})
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Settings of a model that change its logits after the head.
LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


@dataclass
class Probe:
    """Takes the place of a Packing and records what a model asks of its attention, up to `longest` tokens."""

    longest: int
    calls: int = 0
    asked: dict[str, object] = field(default_factory=dict)

    def record(self, keywords: Mapping[str, object]) -> None:
        """Count one attention call, and keep those of its keywords that the learner does not compute."""
        self.calls += 1
        self.asked |= _with_effect(keywords, self.longest)


def check_keywords(keywords: Mapping[str, object], *, longest: int) -> None:
    """Raises ModelError if a keyword of an attention call changes its result for sequences up to `longest` tokens."""
    unknown = _with_effect(keywords, longest)
    if unknown:
        raise ModelError(f"the learner's attention does not compute {_listed(unknown)}")


def check_attention(model: PreTrainedModel, *, longest: int) -> None:
    """Raises ModelError if packed attention does not compute all that mixes the tokens of `model`.

    `model` must use the packed attention (attention.NAME) and may be on the meta device; `longest` is the length of the
    longest sequence in tokens.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other_layers:
        raise ModelError(
            f"{name} has layers of {', '.join(sorted(other_layers))}, which the learner does not compute; "
            "choose another model.path"
        )
    probe = Probe(longest)
    two_tokens = torch.arange(2, device=model.device)[None]
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=two_tokens, position_ids=two_tokens, use_cache=False, packing=probe)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ModelError(f"the attention of {name} cannot be examined ({error}); choose another model.path") from error
    if probe.calls != config.num_hidden_layers:
        raise ModelError(
            f"{name} calls attention {probe.calls} times for {config.num_hidden_layers} layers: it has layers that the "
            "learner does not compute; choose another model.path"
        )
    if probe.asked:
        shorter = ", or a shorter sampling.max_tokens" if "sliding_window" in probe.asked else ""
        raise ModelError(
            f"{name} uses {_listed(probe.asked)} with sequences of up to {longest} tokens, which the learner's "
            f"attention does not compute; choose another model.path{shorter}"
        )


def check_logits(model: PreTrainedModel) -> None:
    """Raises ModelError if `model` (which may be on the meta device) changes its logits after the head."""
    configs = (model.config, model.config.get_text_config())
    changes = [
        name for name in LOGIT_SETTINGS if any(getattr(config, name, None) not in (None, 1.0) for config in configs)
    ]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        changes.append("a bias of the head")
    if changes:
        raise ModelError(
            f"{type(model).__name__} changes its logits ({', '.join(changes)}), which the learner does not compute; "
            "choose another model.path"
        )


def _with_effect(keywords: Mapping[str, object], longest: int) -> dict[str, object]:
    """The keywords of an attention call that change its result for sequences of up to `longest` tokens."""

    def has_effect(name: str, value: object) -> bool:
        if value is None or name in HARMLESS or (name == "is_causal" and value is True):
            return False
        return not (name == "sliding_window" and isinstance(value, int) and value >= longest)

    return {name: value for name, value in keywords.items() if has_effect(name, value)}


def _listed(keywords: Mapping[str, object]) -> str:
    return ", ".join(
        f"{name}={value}" if isinstance(value, (int, float, str)) else name for name, value in sorted(keywords.items())
    )
