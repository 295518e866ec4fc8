"""The families of models that are trained exactly, and what each does that others do not.

One table, which learner and engines read. A model of a type that is not in it is refused by name: what nobody has
compared with a plain forward pass would train on wrong numbers (docs/models.md). Knows configurations only; loads
nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from transformers import PreTrainedConfig

from actors.models.source import ModelError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
QKV = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
QKV_AND_GATE_UP = {**QKV, "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class LogitTransform:
    """From the head's product z to logits: softcap * tanh(scale * z / softcap), or scale * z without a soft cap."""

    scale: float = 1.0
    softcap: float | None = None


def _plain_logits(_: PreTrainedConfig) -> LogitTransform:
    return LogitTransform()


@dataclass(frozen=True)
class ModelFamily:
    """The particulars of a family.

    `fused_projections` names each matrix that engines stack from several linear layers of transformers, and those
    layers in the order of their rows; nf4 takes or leaves the layers of one matrix together. `targets` are the layers
    that get an adapter if the user names none, and `logits` reads from a configuration what follows the head.
    `has_experts`: a mixture of experts, whose adapter is on attention alone. `has_linear_attention`: some layers carry
    a state from token to token. `has_image_encoder`: only the checkpoint's language model is trained and served.
    `plain_attention` is transformers' implementation that computes all of the family's attention. `vllm_names` are
    parts of module names, as transformers and as vLLM has them. `oldest_vllm` is the first version that was seen to
    compute the family as transformers does, and `has_fused_kernels` says whether liger-kernel's kernels were. `refused`
    names what some of the family's models have and nobody has compared.
    """

    name: str
    targets: tuple[str, ...] = (*ATTENTION, *MLP)
    fused_projections: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: QKV_AND_GATE_UP)
    logits: Callable[[PreTrainedConfig], LogitTransform] = _plain_logits
    has_experts: bool = False
    has_linear_attention: bool = False
    refused: Callable[[PreTrainedConfig], str | None] = lambda _: None
    plain_attention: str = "sdpa"
    has_image_encoder: bool = False
    vllm_names: tuple[tuple[str, str], ...] = ()
    oldest_vllm: str = "0.25"
    has_fused_kernels: bool = True

    def fused_name(self, layer: str) -> str | None:
        """The matrix that the linear layer `layer` (the last part of its name) is stacked into, if any."""
        return next((fused for fused, layers in self.fused_projections.items() if layer in layers), None)

    def fused_with(self, layer: str) -> tuple[str, ...]:
        """The layers that are stacked into one matrix with `layer`, itself included."""
        fused = self.fused_name(layer)
        return (layer,) if fused is None else self.fused_projections[fused]

    def name_in_vllm(self, name: str) -> str:
        """transformers' name of a module, as vLLM has it."""
        for ours, theirs in self.vllm_names:
            name = name.replace(ours, theirs)
        return name

    def name_from_vllm(self, name: str) -> str:
        """The inverse of `name_in_vllm`."""
        for ours, theirs in self.vllm_names:
            name = name.replace(theirs, ours)
        return name


def _softcapped(config: PreTrainedConfig) -> LogitTransform:
    return LogitTransform(softcap=getattr(config.get_text_config(), "final_logit_softcapping", None))


def _divided(config: PreTrainedConfig) -> LogitTransform:
    return LogitTransform(scale=1.0 / config.get_text_config().logits_scaling)


def _gemma4_refused(config: PreTrainedConfig) -> str | None:
    text = config.get_text_config()
    if text.enable_moe_block:
        return "experts"
    return "keys that are its values" if text.attention_k_eq_v else None


LANGUAGE_MODEL = (("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head"))

GEMMA4 = ModelFamily(
    "Gemma 4", logits=_softcapped, oldest_vllm="0.32", has_fused_kernels=False, refused=_gemma4_refused
)
QWEN3_5 = ModelFamily(
    "Qwen3.5",
    (*ATTENTION, *MLP, "in_proj_qkv", "in_proj_z", "out_proj"),
    has_linear_attention=True,
    has_fused_kernels=False,
)
# By the `model_type` of config.json.
FAMILIES: dict[str, ModelFamily] = {
    "llama": ModelFamily("Llama"),
    "qwen2": ModelFamily("Qwen2.5"),
    "qwen3": ModelFamily("Qwen3"),
    "qwen3_5_text": QWEN3_5,
    "qwen3_5": replace(QWEN3_5, has_image_encoder=True),
    "mistral": ModelFamily("Mistral"),
    "ministral": ModelFamily("Ministral"),
    "ministral3": ModelFamily("Ministral 3", oldest_vllm="0.32", has_fused_kernels=False),
    # Ministral 3 and Mistral Small 3 come with an image encoder.
    "mistral3": ModelFamily(
        "Mistral 3", has_image_encoder=True, oldest_vllm="0.32", has_fused_kernels=False, vllm_names=LANGUAGE_MODEL
    ),
    # Its checkpoints hold the stacked matrices, so that transformers has them as single layers.
    "phi3": ModelFamily("Phi-3 and Phi-4", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), {}),
    "gemma2": ModelFamily("Gemma 2", logits=_softcapped, plain_attention="eager"),
    "gemma3_text": ModelFamily("Gemma 3", logits=_softcapped),
    "gemma3": ModelFamily(
        "Gemma 3", logits=_softcapped, has_image_encoder=True, has_fused_kernels=False, vllm_names=LANGUAGE_MODEL
    ),
    "gemma4_text": GEMMA4,
    "gemma4": replace(GEMMA4, has_image_encoder=True, vllm_names=LANGUAGE_MODEL),
    "smollm3": ModelFamily("SmolLM3"),
    "granite": ModelFamily("Granite", logits=_divided),
    "olmo2": ModelFamily("OLMo 2"),
    "olmo3": ModelFamily("OLMo 3", oldest_vllm="0.32", has_fused_kernels=False),
    "glm4": ModelFamily("GLM-4", (*ATTENTION, "gate_up_proj", "down_proj"), QKV, has_fused_kernels=False),
    "qwen3_moe": ModelFamily("Qwen3 MoE", ATTENTION, has_experts=True, has_fused_kernels=False),
    "gpt_oss": ModelFamily(
        "gpt-oss",
        ATTENTION,
        QKV,
        has_experts=True,
        has_fused_kernels=False,
        plain_attention="eager",
        vllm_names=((".self_attn.", ".attn."), (".embed_tokens", ".embedding")),
    ),
}


def family_of(config: PreTrainedConfig) -> ModelFamily:
    """The family of a model. Raises ModelError if its type is not in the table."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(dict.fromkeys(family.name for family in FAMILIES.values()))
        raise ModelError(
            f"model.path: nobody has shown that a {config.model_type!r} model is trained exactly here; choose one of "
            f"{known}, or see docs/models.md on how to add a family"
        )
    if (part := family.refused(config)) is not None:
        raise ModelError(
            f"model.path: nobody has shown that {family.name} with {part} is trained exactly here; choose another size"
        )
    return family


def check_quantization(family: ModelFamily, quantization: str) -> None:
    """Raises ModelError if learner and engine would not quantize the same layers of the family."""
    if family.has_experts and quantization == "nf4":
        raise ModelError(
            f"model.quantization=nf4: transformers would leave the experts of {family.name} in 16 bits and vLLM would "
            "not, so that they would not compute the same; use model.quantization=none"
        )
