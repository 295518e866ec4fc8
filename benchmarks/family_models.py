"""A tiny model of every family: random weights, and all that its family does to attention and logits.

Windows are WINDOW tokens, so that short answers leave them; soft caps, multipliers and sinks are large enough to show.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig

from actors.models.families import FAMILIES
from actors.models.loading import model_class
from benchmarks.shapes import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
WINDOW = 8
ANSWER_TOKENS = 3 * WINDOW + 6  # an answer that leaves every window
LAYERS = 4
COMMON: Mapping[str, object] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM has no smaller ones on a CPU
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
YARN: Mapping[str, object] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
QWEN3_5: Mapping[str, object] = {
    "initializer_range": 0.1,  # larger ones amplify rounding: transformers differs from itself with other chunks
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}
MINISTRAL3_ROPE = {**YARN, "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}
# Later layers take keys and values of earlier ones, those that see all have wider heads, each has an input of its own.
GEMMA4: Mapping[str, object] = {
    "sliding_window": WINDOW,
    "layer_types": ALTERNATING,
    "global_head_dim": 64,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 300,
    "final_logit_softcapping": 4.0,
}
# What is particular to each family, by the `model_type` of config.json.
PARTICULARS: Mapping[str, Mapping[str, object]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"hidden_size": 128},
    "qwen3": {},
    "qwen3_5_text": QWEN3_5,
    "qwen3_5": {
        "text_config": QWEN3_5,
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
        },
    },
    "mistral": {"sliding_window": WINDOW},
    "ministral": {"sliding_window": WINDOW, "layer_types": ALTERNATING},
    "ministral3": {"rope_parameters": MINISTRAL3_ROPE},
    "mistral3": {
        "text_config": {"model_type": "ministral3", "rope_parameters": MINISTRAL3_ROPE},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 28,
            "patch_size": 14,
        },
    },
    "phi3": {
        "sliding_window": WINDOW,
        "hidden_size": 128,
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.5] * 16,
            "long_factor": [4.0] * 16,
        },
    },
    "gemma2": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
        "layer_types": ALTERNATING,
    },
    "gemma3_text": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "layer_types": ALTERNATING},
    "gemma3": {
        "text_config": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "layer_types": ALTERNATING},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "gemma4_text": GEMMA4,
    "gemma4": {
        "text_config": GEMMA4,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        "audio_config": None,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
        "logits_scaling": 4.0,
        "hidden_size": 128,
    },
    "olmo2": {"hidden_size": 128},
    "olmo3": {"sliding_window": WINDOW, "hidden_size": 128, "layer_types": ALTERNATING},
    "glm4": {"partial_rotary_factor": 0.5, "hidden_size": 128},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ALTERNATING,
        "rope_parameters": {**YARN, "truncate": False},
    },
}


def family_config(model_type: str) -> PreTrainedConfig:
    """The tiny configuration of a family."""
    make_config = cast("Callable[..., PreTrainedConfig]", CONFIG_MAPPING[model_type])
    particulars = dict(PARTICULARS[model_type])
    if "text_config" in particulars:
        text = cast("Mapping[str, object]", particulars["text_config"])
        return make_config(**{**particulars, "text_config": {**COMMON, **text}})
    return make_config(**{**COMMON, **particulars})


def make_family_model(model_type: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny model (float32) of the family and a byte tokenizer into `folder`."""
    assert model_type in FAMILIES
    torch.manual_seed(seed)
    config = family_config(model_type)
    # What is published with an image encoder is loaded without it by some classes, but always has it on the disk.
    make = AutoModelForImageTextToText if FAMILIES[model_type].has_image_encoder else model_class(config)
    model = make.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms, biases and sinks, which start as constants
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for name, buffer in model.named_buffers():  # the scale of Gemma 4's layers
            if name in model.state_dict():
                buffer.mul_(1 + 0.2 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
