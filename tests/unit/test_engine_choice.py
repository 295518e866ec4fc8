"""Which engine is chosen, what is said where it cannot run, and how it is built."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.engines import registry
from actors.engines.base import EngineUnavailable
from actors.engines.registry import ENGINES, choose_engine
from actors.engines.vllm import environment
from actors.models.families import FAMILIES
from actors.models.lora import adapter_layout
from actors.models.source import ModelSource
from actors.models.tokenizer import load_tokenizer
from actors.models.weight_sharing import build_meta_model
from actors.types import Adapter, Request, Sampling
from conf.errors import UsageError
from tests.helpers.engines import CPU_OPTIONS


def choose(name: str = "auto", *, device: str = "cpu", quantization: str = "none", devices: int = 1) -> tuple[str, str]:
    return choose_engine(
        name, device=device, quantization=quantization, family=FAMILIES["llama"], tensor_parallel_size=devices
    )


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(ENGINES["vllm"], unavailable=lambda *_: "it is not there")
    monkeypatch.setitem(registry.ENGINES, "vllm", spec)


def test_auto_takes_vllm_where_it_runs():
    name, reason = choose()
    assert name == "vllm" and reason.startswith("version 0.")


def test_auto_falls_back_and_says_why(no_vllm: None):
    assert choose() == ("transformers", "it is not there")
    assert choose("transformers")[0] == "transformers"


@pytest.mark.parametrize(("name", "devices"), [("vllm", 1), ("auto", 2)])
def test_an_engine_that_is_asked_for_and_cannot_run_is_refused(no_vllm: None, name: str, devices: int):
    with pytest.raises(EngineUnavailable, match=f"engine.name={name}: it is not there"):
        choose(name, devices=devices)


def test_what_no_engine_does_is_refused():
    assert choose(quantization="nf4")[0] == "transformers"
    with pytest.raises(EngineUnavailable, match="vLLM holds no nf4 weights on a CPU"):
        choose("vllm", quantization="nf4")
    with pytest.raises(EngineUnavailable, match=r"engine.tensor_parallel_size=2: transformers runs on one device"):
        choose("transformers", devices=2)
    with pytest.raises(UsageError, match=r"engine.name=sglang: choose auto, vllm, transformers"):
        choose("sglang")


def test_versions_and_the_plugin_are_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "find_spec", lambda _: None)
    monkeypatch.setattr(environment, "version", lambda _: "0.27.1")
    assert choose("vllm", device="cuda", quantization="nf4") == ("vllm", "version 0.27.1")
    for version, message in {
        "0.24.9": "outside the supported range 0.25 to 0.34",
        "0.28": "needs the package vllm-bnb-plugin for nf4",
    }.items():
        monkeypatch.setattr(environment, "version", lambda _, version=version: version)
        with pytest.raises(EngineUnavailable, match=message):
            choose("vllm", device="cuda", quantization="nf4")


def test_a_choice_imports_no_engine():
    code = (
        "import sys; from types import SimpleNamespace; from actors.engines.registry import choose_engine; "
        "choose_engine('auto', device='cuda', quantization='none', "
        "family=SimpleNamespace(has_experts=False, has_image_encoder=False, has_linear_attention=False, "
        "oldest_vllm='0.25'), "
        "tensor_parallel_size=1); "
        "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert output.strip() == "[]"


def test_the_transformers_engine_is_built_from_options(tiny_model: Path):
    source = ModelSource(str(tiny_model), None, "")
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    meta_model = build_meta_model(source, dtype="float32", trust_remote_code=False)
    layout = adapter_layout(meta_model, rank=4, alpha=8.0, target_modules=["up_proj", "q_proj"])
    options = replace(CPU_OPTIONS, model_path=source.path)
    engine = ENGINES["transformers"].build(options, tokenizer, layout=layout, eos_token_ids=(1,))
    engine.load_adapter(Adapter(3, layout, torch.zeros(layout.size)))
    engine.submit([Request("a", (5, 6), Sampling(1.0, 4, 0))])
    completions = []
    while engine.unfinished:
        completions += engine.step()
    assert [c.version_spans[0].version for c in completions] == [3]
