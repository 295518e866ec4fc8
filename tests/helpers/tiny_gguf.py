"""A tiny Llama as a .gguf file, made on the spot."""

from pathlib import Path

import gguf
import numpy as np

WIDTH, MIDDLE, HEADS, VOCABULARY = 32, 64, 4, 260


def write_tiny_gguf(file: Path, *, spoil: float | None = None) -> Path:
    """Write one layer of random weights and a tokenizer of bytes; `spoil` takes the place of one weight."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    words = ["<s>", "</s>", *(chr(256 + i) for i in range(VOCABULARY - 3))]
    words.append(words[2] + words[3])
    writer.add_token_list(words)
    writer.add_token_types([3, 3, *[1] * (VOCABULARY - 2)])
    writer.add_token_merges([f"{words[2]} {words[3]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (WIDTH, WIDTH),
        "attn_v": (WIDTH, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (MIDDLE, WIDTH),
        "ffn_up": (MIDDLE, WIDTH),
        "ffn_down": (WIDTH, MIDDLE),
    }
    tensors = {f"blk.0.{name}.weight": draw.normal(0, 0.1, shape) for name, shape in shapes.items()}
    tensors |= {f"blk.0.{name}.weight": np.ones(WIDTH) for name in ("attn_norm", "ffn_norm")}
    tensors |= {"token_embd.weight": draw.normal(0, 0.1, (VOCABULARY, WIDTH)), "output_norm.weight": np.ones(WIDTH)}
    if spoil is not None:
        tensors["blk.0.ffn_up.weight"][1, 2] = spoil
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
