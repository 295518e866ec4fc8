"""One copy of the base weights: what attaches, what it computes, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM

from actors.lora import FlatLora, adapter_layout
from actors.models import ModelError, ModelSource, load_base_model, stored_quantization
from actors.shared import Nf4Weight, SharingImpossible, attach, build_skeleton, kept_in_16bit, weights_of
from conf.errors import UsageError
from learner.attention import NAME
from tests.presets import objective
from tests.unit.test_policy import LORA, a_table, make_policy, randomise


def source(folder: Path) -> ModelSource:
    return ModelSource(str(folder), None, "test")


def lender(folder: Path, quantization: str = "none", **options):
    return load_base_model(
        source(folder), dtype="float32", device="cpu", quantization=quantization, trust_remote_code=False, **options
    )


def skeleton(folder: Path):
    return build_skeleton(source(folder), dtype="float32", trust_remote_code=False, attention=NAME)


def test_a_skeleton_holds_no_weights_and_knows_the_layout(tiny_model: Path):
    empty = skeleton(tiny_model)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert adapter_layout(empty, **LORA) == FlatLora(lender(tiny_model), **LORA, seed=0).layout


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_attached_model_is_the_lender_without_a_copy(tiny_model: Path, quantization: str):
    lent = lender(tiny_model, quantization)
    weights = weights_of(lent)
    assert any(isinstance(w, Nf4Weight) for w in weights.values()) == (quantization == "nf4")
    model = attach(build_skeleton(source(tiny_model), dtype="float32", trust_remote_code=False), weights, device="cpu")
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == dict(lent.named_parameters())[name].data_ptr()
    if quantization == "none":  # bitsandbytes has no nf4 product for so small a model on a CPU
        ids = torch.arange(2, 40)[None]
        torch.testing.assert_close(model(ids).logits, lent(ids).logits, atol=0, rtol=0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_nf4_weights_stay_as_they_are_while_the_lender_samples(smollm2: str):
    lent = lender(Path(smollm2), "nf4").eval()
    weights = {name: w for name, w in weights_of(lent).items() if isinstance(w, Nf4Weight)}
    before = {name: (w.packed.clone(), dequantize_4bit(w.packed, w.state)) for name, w in weights.items()}
    model = attach(skeleton(Path(smollm2)), weights_of(lent), device="cpu")
    with torch.no_grad():
        lent(torch.arange(2, 40)[None])
    for name, parameter in model.named_parameters():
        if name in before:
            packed, unpacked = before[name]
            torch.testing.assert_close(parameter.data, packed, atol=0, rtol=0)
            torch.testing.assert_close(dequantize_4bit(parameter.data, weights[name].state), unpacked, atol=0, rtol=0)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradients_over_lent_weights_are_those_over_own_ones(tiny_model: Path, quantization: str):
    from conf.schema import LearnerSettings
    from learner.learner import Learner
    from learner.policy import Policy

    own = make_policy(tiny_model, quantization=quantization)
    model = attach(skeleton(tiny_model), weights_of(lender(tiny_model, quantization)), device="cpu")
    lent = Policy(model, lora=LORA, seed=0, temperature=1.0, logit_chunk_tokens=5, gradient_checkpointing=False)
    randomise(lent.lora)
    gradients = []
    for policy in (own, lent):
        learner = Learner(policy, objective(), LearnerSettings())
        learner.accumulate(a_table())
        gradients.append(policy.lora.flat.grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-7, rtol=1e-6)


def test_weights_made_in_inference_mode_serve_backward(tiny_model: Path):
    with torch.inference_mode():
        weights = {name: w.clone() for name, w in weights_of(lender(tiny_model)).items()}
    model = attach(build_skeleton(source(tiny_model), dtype="float32", trust_remote_code=False), weights, device="cpu")
    lora = FlatLora(model, **LORA, seed=0)
    lora.model(torch.arange(2, 12)[None]).logits.square().sum().backward()
    assert lora.flat.grad.abs().max() > 0


def test_what_does_not_fit_is_refused(tiny_model: Path):
    weights = weights_of(lender(tiny_model))
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(SharingImpossible, match=rf"the engine has no {name}"):
        attach(skeleton(tiny_model), {k: w for k, w in weights.items() if k != name}, device="cpu")
    with pytest.raises(SharingImpossible, match=r"down_proj.weight is \(32, 64\)"):
        attach(skeleton(tiny_model), weights | {name: torch.zeros(64, 32)}, device="cpu")


def test_layers_that_engines_fuse_stay_together(tiny_model: Path):
    kept = kept_in_16bit(skeleton(tiny_model), ["model.layers.0.*.k_proj", "*.down_proj"])
    assert kept == {f"model.layers.0.self_attn.{x}_proj" for x in "qkv"} | {
        f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
    }
    with pytest.raises(UsageError, match="'nothing' matches no linear layer"):
        kept_in_16bit(skeleton(tiny_model), ["nothing"])
    model = lender(tiny_model, "nf4", keep_16bit=sorted(kept))
    packed = {n for n, w in weights_of(model).items() if isinstance(w, Nf4Weight)}
    assert len(packed) == 14 - 3 - 2 and not packed & {f"{name}.weight" for name in kept}


def test_a_bitsandbytes_checkpoint_is_loaded_as_it_is(tiny_model: Path, tmp_path: Path):
    lent = lender(tiny_model, "nf4")
    lent.save_pretrained(tmp_path / "nf4")
    assert stored_quantization(source(tiny_model)) is None
    assert stored_quantization(source(tmp_path / "nf4")) == "nf4"
    again = lender(tmp_path / "nf4", "nf4")
    name = "model.layers.1.mlp.down_proj.weight"
    weights = [weights_of(model)[name] for model in (lent, again)]
    unpacked = [dequantize_4bit(w.packed, w.state) for w in weights if isinstance(w, Nf4Weight)]
    torch.testing.assert_close(unpacked[1], unpacked[0], atol=0, rtol=0)


def test_other_quantisations_are_refused(tiny_model: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model, tmp_path / "gptq")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(ModelError, match="quantised by gptq"):
        stored_quantization(source(folder))


def test_the_plain_loader_reads_the_shapes_of_the_benchmarks(tmp_path: Path):
    from benchmarks.shapes import random_model

    folder = random_model("tiny", folder=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.hidden_size == 64 and model.dtype == torch.bfloat16
