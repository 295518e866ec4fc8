"""Models of real shapes with random weights: speed and memory do not depend on what weights say.

`random_model("qwen2.5-1.5b")` writes a folder that transformers and vLLM load like any other, in bfloat16 or as a
bitsandbytes nf4 checkpoint, with a byte tokenizer. Needs a GPU for nf4.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.initialization import no_init_weights

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
ROPE_1M = {"rope_type": "default", "rope_theta": 1e6}

# Published configurations: class, vocabulary, hidden, intermediate, layers, heads, key-value heads, tied, the rest.
SHAPES: dict[str, tuple[type[PreTrainedConfig], int, int, int, int, int, int, bool, dict[str, Any]]] = {
    "qwen2.5-0.5b": (Qwen2Config, 151936, 896, 4864, 24, 14, 2, True, {"rope_parameters": ROPE_1M}),
    "qwen2.5-1.5b": (Qwen2Config, 151936, 1536, 8960, 28, 12, 2, True, {"rope_parameters": ROPE_1M}),
    "qwen2.5-3b": (Qwen2Config, 151936, 2048, 11008, 36, 16, 2, True, {"rope_parameters": ROPE_1M}),
    "qwen2.5-7b": (Qwen2Config, 152064, 3584, 18944, 28, 28, 4, False, {"rope_parameters": ROPE_1M}),
    "llama-3.1-8b": (LlamaConfig, 128256, 4096, 14336, 32, 32, 8, False, {"rope_parameters": LLAMA3_ROPE}),
    "phi-4": (Phi3Config, 100352, 5120, 17920, 40, 40, 10, False, {"pad_token_id": 0}),
    "tiny": (Qwen2Config, 512, 64, 128, 2, 4, 2, True, {}),
}


def shape_config(name: str) -> PreTrainedConfig:
    """The transformers configuration of SHAPES[name]. It names no end of sequence: benchmarks sample to the limit."""
    kind, vocabulary, hidden, intermediate, layers, heads, kv_heads, tied, more = SHAPES[name]
    make: Any = kind
    config = make(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        max_position_embeddings=16384, bos_token_id=None, eos_token_id=None, **more,
    )  # fmt: skip
    config.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
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
        skeleton = AutoModelForCausalLM.from_config(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made: dict[tuple[int, ...], torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, parameter in skeleton.named_parameters():
        shape = tuple(parameter.shape)
        if shape not in made:
            values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, device=device).mul_(0.02)
            made[shape] = values.to(torch.bfloat16)
        value = made[shape] if not key.endswith("bias") else torch.zeros(shape, dtype=torch.bfloat16)
        if nf4 and len(shape) == 2 and "embed" not in key and "lm_head" not in key:
            tensors |= {k: v.cpu().clone() for k, v in _nf4(key, value).items()}
        else:
            tensors[key] = value.cpu().clone()
    if nf4:
        config.quantization_config = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
        }  # fmt: skip
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
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def byte_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A token a byte, and a name for every other token, so that all completions read differently."""
    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"t{i}" for i in range(len(words), size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
