"""Base models: what is refused before it trains on wrong numbers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.models.families import family_of
from actors.models.loading import check_checkpoint, check_finite, checkpoint_quantization, fingerprint, load_base_model
from actors.models.source import ModelError, ModelSource
from actors.models.weight_sharing import build_meta_model
from learner.model.attention import NAME, packed_attention
from learner.model.supported import check_attention, check_head
from learner.packing import Packing, Segment

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def changed(model: Path, folder: Path, change: Any) -> ModelSource:
    """A copy of `model` whose tensors `change` has changed."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelSource(str(folder), None, "")


def check(source: ModelSource) -> None:
    model = build_meta_model(source, dtype="float32", trust_remote_code=False)
    check_checkpoint(source, model, trust_remote_code=False)


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_checkpoint_without_a_weight_is_refused(tiny_model: Path, tmp_path: Path):
    source = changed(tiny_model, tmp_path / "model", lambda tensors: tensors.pop(UP))
    with pytest.raises(ModelError, match=f"lacks 1 of the model's weights.*{UP}"):
        check(source)


def test_a_checkpoint_with_a_weight_of_another_shape_is_refused(tiny_model: Path, tmp_path: Path):
    source = changed(tiny_model, tmp_path / "model", lambda tensors: tensors.update({UP: torch.zeros(3, 3)}))
    with pytest.raises(ModelError, match=f"another shape: {UP}"):
        check(source)


def test_a_checkpoint_that_is_cut_short_is_refused(tiny_model: Path, tmp_path: Path):
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    source = ModelSource(str(tmp_path / "model"), None, "")
    with pytest.raises(ModelError, match="cannot be read"):
        check(source)
    with pytest.raises(ModelError, match="cannot be read"):
        load_base_model(source, dtype="float32", device="cpu", quantization="none", trust_remote_code=False)


def test_a_configuration_that_is_no_json_or_of_an_unknown_model_is_refused(tiny_model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for text in ("{", '{"model_type": "nosuch"}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match="cannot be read"):
            checkpoint_quantization(ModelSource(str(folder), None, ""), trust_remote_code=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_with_a_number_that_is_not_finite_is_refused(tiny_model: Path, tmp_path: Path, value: float):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][1, 2] = value

    source = changed(tiny_model, tmp_path / "model", spoil)
    base = load_base_model(source, dtype="float32", device="cpu", quantization="none", trust_remote_code=False)
    with pytest.raises(ModelError, match=f"NaN or infinity in {UP}"):
        check_finite(base, "here")


def test_whole_checkpoints_pass(tiny_model: Path):
    source = ModelSource(str(tiny_model), None, "")
    check(source)
    check_finite(AutoModelForCausalLM.from_pretrained(tiny_model), "here")


def test_the_fingerprint_tells_other_weights_behind_the_same_path(tiny_model: Path, tmp_path: Path):
    def move(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] += 1

    source = ModelSource(str(tiny_model), None, "")
    assert fingerprint(source) == fingerprint(source)
    assert fingerprint(changed(tiny_model, tmp_path / "model", move)) != fingerprint(source)


def meta_model(kind: str, **more: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **{**SMALL, "pad_token_id": 0, **more})
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=torch.bfloat16)
    model.tie_weights()
    return model


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("qwen3_next", {"num_experts": 4}, "layers of linear_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "is_causal=False"),
        (
            "phi3",
            {"rope_parameters": {**LONGROPE, **FACTORS}, "original_max_position_embeddings": 64},
            r"over 64 tokens.*allow 100",
        ),
    ],
)
def test_attention_that_is_not_computed_is_refused(kind: str, more: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        check_attention(meta_model(kind, **more), longest=100)


def test_attention_that_was_not_seen_at_the_start_is_refused_when_it_comes():
    values = torch.zeros(1, 1, 2, 8)
    packing = Packing([Segment(0, 2)], "cpu")
    packed_attention(torch.nn.Module(), values, values, values, None, packing=packing, sliding_window=2)
    unknown: tuple[dict[str, Any], ...] = (
        {"new_in_2027": True},
        {"dropped_layers": 1},
    )
    for keyword in unknown:
        with pytest.raises(ModelError, match=f"does not compute {next(iter(keyword))}"):
            packed_attention(torch.nn.Module(), values, values, values, None, packing=packing, **keyword)


def test_a_head_with_a_bias_is_refused():
    with pytest.raises(ModelError, match="bias in its head"):
        check_head(meta_model("phi"))


@pytest.mark.parametrize(
    ("part", "name"), [("enable_moe_block", "experts"), ("attention_k_eq_v", "keys that are its values")]
)
def test_a_size_of_a_family_that_nobody_has_compared_is_refused(part: str, name: str):
    with pytest.raises(ModelError, match=f"Gemma 4 with {name}"):
        family_of(AutoConfig.for_model("gemma4_text", **{part: True}))


def test_a_family_that_nobody_has_compared_is_refused_by_name():
    with pytest.raises(ModelError, match=r"'falcon_h1' model .* Llama, Qwen2\.5, .* docs/models\.md"):
        family_of(AutoConfig.for_model("falcon_h1"))
