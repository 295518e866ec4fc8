"""One copy of the base weights: what is shared, what it computes, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM

from actors.models.loading import checkpoint_quantization, load_base_model
from actors.models.lora import FlatLora, adapter_layout
from actors.models.source import ModelError, ModelSource
from actors.models.weight_sharing import (
    BaseWeights,
    Nf4Weight,
    SharingImpossible,
    build_meta_model,
    named_base_weights,
    resolve_kept_modules,
    share_weights,
)
from conf.errors import UsageError
from learner.model.attention import NAME
from learner.model.policy import Policy
from tests.helpers.learners import LORA, a_table, gradient_of, make_learner, make_policy, randomize
from tests.helpers.presets import algorithm


def source(folder: Path) -> ModelSource:
    return ModelSource(str(folder), None, "test")


def own_model(folder: Path, quantization: str = "none", **options):
    return load_base_model(
        source(folder), dtype="float32", device="cpu", quantization=quantization, trust_remote_code=False, **options
    )


def meta_model(folder: Path):
    return build_meta_model(source(folder), dtype="float32", trust_remote_code=False, attention=NAME)


def test_a_meta_model_holds_no_weights_and_knows_the_layout(tiny_model: Path):
    empty = meta_model(tiny_model)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert adapter_layout(empty, **LORA) == FlatLora(own_model(tiny_model), **LORA, seed=0).layout


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_sharing_model_computes_as_the_owner_without_a_copy(tiny_model: Path, quantization: str):
    owner = own_model(tiny_model, quantization)
    weights = named_base_weights(owner)
    assert any(isinstance(w, Nf4Weight) for w in weights.values()) == (quantization == "nf4")
    model = share_weights(
        build_meta_model(source(tiny_model), dtype="float32", trust_remote_code=False), weights, device="cpu"
    )
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == dict(owner.named_parameters())[name].data_ptr()
    if quantization == "none":  # bitsandbytes has no nf4 product for so small a model on a CPU
        ids = torch.arange(2, 40)[None]
        torch.testing.assert_close(model(ids).logits, owner(ids).logits, atol=0, rtol=0)
    head = model.get_output_embeddings()
    assert head is not None and head.weight is model.get_input_embeddings().weight


def test_nf4_weights_stay_as_they_are_while_the_owner_samples(smollm2: str):
    owner = own_model(Path(smollm2), "nf4").eval()
    weights = {name: w for name, w in named_base_weights(owner).items() if isinstance(w, Nf4Weight)}
    before = {name: (w.packed.clone(), dequantize_4bit(w.packed, w.state)) for name, w in weights.items()}
    model = share_weights(meta_model(Path(smollm2)), named_base_weights(owner), device="cpu")
    with torch.no_grad():
        owner(torch.arange(2, 40)[None])
    for name, parameter in model.named_parameters():
        if name in before:
            packed, unpacked = before[name]
            torch.testing.assert_close(parameter.data, packed, atol=0, rtol=0)
            torch.testing.assert_close(dequantize_4bit(parameter.data, weights[name].state), unpacked, atol=0, rtol=0)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradients_over_shared_weights_are_those_over_own_ones(tiny_model: Path, quantization: str):
    own = make_policy(tiny_model, quantization=quantization)
    model = share_weights(meta_model(tiny_model), named_base_weights(own_model(tiny_model, quantization)), device="cpu")
    sharing = Policy(model, lora=LORA, seed=0, temperature=1.0, logit_chunk_tokens=5, gradient_checkpointing=False)
    randomize(sharing.lora)
    gradients = []
    for policy in (own, sharing):
        make_learner(policy, algorithm()).accumulate(a_table())
        gradients.append(gradient_of(policy.lora))
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-7, rtol=1e-6)


def test_weights_made_in_inference_mode_serve_backward(tiny_model: Path):
    with torch.inference_mode():
        owned = named_base_weights(own_model(tiny_model))
        weights: BaseWeights = {name: w.clone() for name, w in owned.items() if isinstance(w, torch.Tensor)}
    model = share_weights(
        build_meta_model(source(tiny_model), dtype="float32", trust_remote_code=False), weights, device="cpu"
    )
    lora = FlatLora(model, **LORA, seed=0)
    lora.model(torch.arange(2, 12)[None]).logits.square().sum().backward()
    assert gradient_of(lora).abs().max() > 0


def test_what_does_not_fit_is_refused(tiny_model: Path):
    weights = named_base_weights(own_model(tiny_model))
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(SharingImpossible, match=rf"the engine has no {name}"):
        share_weights(meta_model(tiny_model), {k: w for k, w in weights.items() if k != name}, device="cpu")
    with pytest.raises(SharingImpossible, match=r"down_proj.weight is \(32, 64\)"):
        share_weights(meta_model(tiny_model), weights | {name: torch.zeros(64, 32)}, device="cpu")


def test_layers_that_engines_fuse_stay_together(tiny_model: Path):
    kept = resolve_kept_modules(meta_model(tiny_model), ["model.layers.0.*.k_proj", "*.down_proj"])
    assert kept == {f"model.layers.0.self_attn.{x}_proj" for x in "qkv"} | {
        f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
    }
    with pytest.raises(UsageError, match="'nothing' matches no linear layer"):
        resolve_kept_modules(meta_model(tiny_model), ["nothing"])
    model = own_model(tiny_model, "nf4", keep_16bit=sorted(kept))
    packed = {n for n, w in named_base_weights(model).items() if isinstance(w, Nf4Weight)}
    assert len(packed) == 14 - 3 - 2 and not packed & {f"{name}.weight" for name in kept}


def test_a_bitsandbytes_checkpoint_is_loaded_as_it_is(tiny_model: Path, tmp_path: Path):
    owner = own_model(tiny_model, "nf4")
    owner.save_pretrained(tmp_path / "nf4")
    assert checkpoint_quantization(source(tiny_model), trust_remote_code=False) is None
    assert checkpoint_quantization(source(tmp_path / "nf4"), trust_remote_code=False) == "nf4"
    again = own_model(tmp_path / "nf4", "nf4")
    name = "model.layers.1.mlp.down_proj.weight"
    weights = [named_base_weights(model)[name] for model in (owner, again)]
    unpacked = [dequantize_4bit(w.packed, w.state) for w in weights if isinstance(w, Nf4Weight)]
    torch.testing.assert_close(unpacked[1], unpacked[0], atol=0, rtol=0)


def test_other_quantizations_are_refused(tiny_model: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model, tmp_path / "gptq")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(ModelError, match="quantized by gptq"):
        checkpoint_quantization(source(folder), trust_remote_code=False)


def test_the_plain_loader_reads_the_shapes_of_the_benchmarks(tmp_path: Path):
    from benchmarks.shapes import random_model

    folder = random_model("tiny", folder=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.hidden_size == 128 and model.dtype == torch.bfloat16
