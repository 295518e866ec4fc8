"""A base model loaded one layer after another: the same weights, and what cannot be loaded so is refused."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from actors.models.families import FAMILIES
from actors.models.layer_loading import load_by_layer
from actors.models.loading import decoder_layers, load_base_model
from actors.models.source import ModelError, ModelSource
from actors.models.weight_sharing import Nf4Weight, build_meta_model, named_base_weights
from benchmarks.family_models import make_family_model
from learner.parallel.sharding import Shard, ShardedLayer
from tests.helpers.tiny import make_tiny_model

KEPT = frozenset({"model.layers.0.mlp.down_proj"})


def load(folder: Path, quantization: str, seen: list[torch.nn.Module], kept: frozenset[str] = KEPT) -> PreTrainedModel:
    source = ModelSource(str(folder), None, "test")
    meta = build_meta_model(source, dtype="float32", trust_remote_code=False)
    return load_by_layer(
        meta,
        source,
        device="cpu",
        quantization=quantization,
        kept=kept,
        trust_remote_code=False,
        after_layer=seen.append,
    )


def whole(folder: Path, quantization: str, *, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """What a load of the whole model gives: each weight unpacked, and buffers."""
    source = ModelSource(str(folder), None, "test")
    options = {"dtype": dtype, "device": "cpu", "trust_remote_code": False}
    return unpacked(load_base_model(source, quantization=quantization, keep_16bit=sorted(KEPT), **options))


def unpacked(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name: dequantize_4bit(weight.packed, weight.state) if isinstance(weight, Nf4Weight) else weight
        for name, weight in named_base_weights(model).items()
    }


def assert_equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_layers_come_one_after_another_with_the_weights_of_a_whole_load(tiny_model: Path, quantization: str):
    seen: list[torch.nn.Module] = []
    model = load(tiny_model, quantization, seen)
    assert seen == decoder_layers(model)
    packed = [weight for weight in named_base_weights(model).values() if isinstance(weight, Nf4Weight)]
    assert len(packed) == (13 if quantization == "nf4" else 0)  # two layers of seven, less the one that is kept
    assert_equal(unpacked(model), whole(tiny_model, quantization))
    head = model.get_output_embeddings()
    assert head is not None and head.weight is model.get_input_embeddings().weight


# Checkpoints that hold experts one by one, or name their language model otherwise than the model does.
OTHER_NAMES = ("qwen3_moe", "mistral3", "gemma3", "qwen3_5")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_loaded_as_a_whole_or_refused(model_type: str, tmp_path: Path):
    folder = make_family_model(model_type, tmp_path)
    if model_type in OTHER_NAMES:
        with pytest.raises(ModelError, match=r"runtime\.learner_shards"):
            load(folder, "none", [], frozenset())
        return
    assert_equal(unpacked(load(folder, "none", [], frozenset())), whole(folder, "none"))


def test_a_checkpoint_that_is_in_4_bits_already_stays_as_it_is(tiny_model: Path, tmp_path: Path):
    """Its layers in 16 bits, too, although nothing in the settings names them."""
    source = ModelSource(str(tiny_model), None, "test")
    options = {"dtype": "float32", "device": "cpu", "trust_remote_code": False}
    load_base_model(source, quantization="nf4", keep_16bit=sorted(KEPT), **options).save_pretrained(tmp_path)
    weights = named_base_weights(load(tmp_path, "nf4", [], frozenset()))
    packed = {name for name, weight in weights.items() if isinstance(weight, Nf4Weight)}
    assert len(packed) == 13 and "model.layers.0.mlp.down_proj.weight" not in packed
    assert_equal(unpacked(load(tmp_path, "nf4", [], frozenset())), whole(tiny_model, "nf4"))


def test_a_weight_under_another_name_or_a_number_that_is_none_is_refused(tmp_path: Path):
    file = make_tiny_model(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holds NaN or infinity in mlp\.up_proj\.weight"):
        load(tmp_path, "none", [])
    tensors["model.layers.0.mlp.fused"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"learner_shards: .* stores model\.layers\.0\.mlp\.up_proj\.weight under"):
        load(tmp_path, "none", [])


def test_a_rank_keeps_its_part_of_a_layer_and_the_parts_are_the_layer(tiny_model: Path):
    parts, layers = [], []
    for index in range(3):
        seen: list[torch.nn.Module] = []
        load(tiny_model, "nf4", seen)
        layers.append(ShardedLayer(seen[0], Shard(index, 3)))
        parts.append(layers[-1].part)
    whole = torch.cat(parts)
    assert len(whole) == layers[0].size and all(len(part) == layers[0].size // 3 for part in parts)
    linear = layers[0].module.get_submodule("mlp.gate_proj")
    assert isinstance(linear.weight, torch.nn.Parameter) and linear.weight.numel() == 0
    layers[0].show(whole)
    seen = []
    load(tiny_model, "nf4", seen)
    assert torch.equal(linear.weight, seen[0].get_parameter("mlp.gate_proj.weight"))
    layers[0].hide()
    assert linear.weight.numel() == 0
