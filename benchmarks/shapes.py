"""Models of real shapes with random weights: speed and memory do not depend on what weights say.

`random_model("qwen2.5-1.5b")` writes a folder that transformers and vLLM load like any other, in bfloat16 or as a
bitsandbytes nf4 checkpoint, with a byte tokenizer. Needs a GPU for nf4.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.initialization import no_init_weights

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
POSITIONS = 131072
ROPE_1M = {"rope_type": "default", "rope_theta": 1e6}


@dataclass(frozen=True)
class Shape:
    """A published configuration: its transformers class, its sizes, and what else its constructor takes."""

    config: type[PreTrainedConfig]
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    tied: bool
    more: Mapping[str, object] = field(default_factory=dict)


SHAPES = {
    "qwen2.5-0.5b": Shape(Qwen2Config, 151936, 896, 4864, 24, 14, 2, True, {"rope_parameters": ROPE_1M}),
    "qwen2.5-1.5b": Shape(Qwen2Config, 151936, 1536, 8960, 28, 12, 2, True, {"rope_parameters": ROPE_1M}),
    "qwen2.5-3b": Shape(Qwen2Config, 151936, 2048, 11008, 36, 16, 2, True, {"rope_parameters": ROPE_1M}),
    "qwen2.5-7b": Shape(Qwen2Config, 152064, 3584, 18944, 28, 28, 4, False, {"rope_parameters": ROPE_1M}),
    "llama-3.1-8b": Shape(LlamaConfig, 128256, 4096, 14336, 32, 32, 8, False, {"rope_parameters": LLAMA3_ROPE}),
    "llama-3.3-70b": Shape(LlamaConfig, 128256, 8192, 28672, 80, 64, 8, False, {"rope_parameters": LLAMA3_ROPE}),
    "phi-4": Shape(Phi3Config, 100352, 5120, 17920, 40, 40, 10, False, {"pad_token_id": 0}),
    "tiny": Shape(Qwen2Config, 512, 128, 256, 2, 4, 2, True),
}


def shape_config(name: str) -> PreTrainedConfig:
    """The transformers configuration of SHAPES[name]. It names no end of sequence: benchmarks sample to the limit."""
    shape = SHAPES[name]
    make_config = cast("Callable[..., PreTrainedConfig]", shape.config)
    config = make_config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
        **shape.more,
    )
    config.architectures = [shape.config.__name__.replace("Config", "ForCausalLM")]
    config.dtype = torch.bfloat16
    return config


def random_model(name: str, *, nf4: bool = False, folder: Path | None = None) -> Path:
    """Write the model once and return its folder. Linear layers of one shape share their random values."""
    from transformers import AutoModelForCausalLM

    root = folder or Path(tempfile.gettempdir()) / "epiphany-shapes"
    target = root / (name + ("-nf4" if nf4 else ""))
    if (target / "config.json").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    config = shape_config(name)
    with torch.device("meta"), no_init_weights():
        meta_model = AutoModelForCausalLM.from_config(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random_values: dict[tuple[int, ...], torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, parameter in meta_model.named_parameters():
        shape = tuple(parameter.shape)
        if shape not in random_values:
            values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, device=device).mul_(0.02)
            random_values[shape] = values.to(torch.bfloat16)
        value = random_values[shape] if not key.endswith("bias") else torch.zeros(shape, dtype=torch.bfloat16)
        if nf4 and len(shape) == 2 and "embed" not in key and "lm_head" not in key:
            tensors |= {k: v.cpu().clone() for k, v in _nf4(key, value).items()}
        else:
            tensors[key] = value.cpu().clone()
    if nf4:
        config.quantization_config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }
    _save(tensors, target)
    byte_tokenizer(config.vocab_size).save_pretrained(target)
    config.save_pretrained(target)
    return target


def _nf4(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(value, quant_type="nf4", compress_statistics=True, blocksize=64)
    return {key: packed} | {f"{key}.{name}": x for name, x in state.as_dict(packed=True).items()}


def _save(tensors: dict[str, torch.Tensor], folder: Path, shard_bytes: int = 4 << 30) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for key, value in tensors.items():
        if size + value.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += value.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def byte_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A token a byte, and a name for every other token, so that all completions read differently."""
    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"t{i}" for i in range(len(words), size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
