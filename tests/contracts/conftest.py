"""Engines beside a policy on the same real model, for the contract that all of them keep."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from actors.engines.transformers import TransformersEngine
from actors.models.loading import load_base_model
from actors.models.source import ModelSource
from actors.models.tokenizer import end_of_sequence_ids, load_tokenizer
from actors.models.weight_sharing import build_meta_model, share_weights
from learner.model.attention import NAME
from learner.model.policy import Policy
from tests.helpers.bench import LORA, Bench
from tests.helpers.engines import CPU_OPTIONS
from tests.helpers.fakes import EchoEngine


@pytest.fixture(scope="module")
def real(smollm2: str) -> tuple[ModelSource, Any, Policy]:
    source = ModelSource(smollm2, None, "")
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    base = load_base_model(
        source, dtype="float32", device="cpu", quantization="none", trust_remote_code=False, attention=NAME
    )
    policy = Policy(base, lora=LORA, seed=0, temperature=1.0, logit_chunk_tokens=256, gradient_checkpointing=False)
    return source, tokenizer, policy


@pytest.fixture(scope="module")
def vllm(real: tuple[ModelSource, Any, Policy]) -> Bench:
    return _vllm(real, devices=1)


@pytest.fixture(scope="module")
def sharded(real: tuple[ModelSource, Any, Policy]) -> Bench:
    """SmolLM2 has 9 heads and 3 keys' heads."""
    return _vllm(real, devices=3)


@pytest.fixture(scope="module")
def crowded(real: tuple[ModelSource, Any, Policy]) -> Bench:
    """vLLM with a cache for one of its eight sequences at full length: 46,080 bytes a token, blocks of 32 tokens."""
    return _vllm(real, devices=1, kv_cache_bytes=46_080 * (320 + 64))


def _vllm(real: tuple[ModelSource, Any, Policy], *, devices: int, kv_cache_bytes: int = 150 << 20) -> Bench:
    from actors.engines.vllm.engine import VllmEngine

    source, tokenizer, policy = real
    options = replace(
        CPU_OPTIONS,
        model_path=source.path,
        max_model_len=320,
        max_num_seqs=8,
        kv_cache_bytes=kv_cache_bytes,
        share_weights=devices == 1,
        tensor_parallel_size=devices,
    )
    eos = end_of_sequence_ids(source, tokenizer)
    return Bench(
        "vllm", VllmEngine(options, tokenizer, layout=policy.lora.layout, eos_token_ids=eos), policy, tokenizer
    )


@pytest.fixture(scope="module")
def oracle(real: tuple[ModelSource, Any, Policy]) -> Bench:
    source, tokenizer, policy = real
    base = load_base_model(source, dtype="float32", device="cpu", quantization="none", trust_remote_code=False)
    engine = TransformersEngine(
        base, tokenizer, lora=LORA, eos_token_ids=end_of_sequence_ids(source, tokenizer), max_num_seqs=8
    )
    return Bench("transformers", engine, policy, tokenizer)


@pytest.fixture(params=["echo", "transformers", "vllm", "sharded"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    if request.param == "echo":
        yield Bench("echo", EchoEngine(), None, None)
    else:
        yield request.getfixturevalue("oracle" if request.param == "transformers" else str(request.param))


@pytest.fixture(scope="module")
def shared(vllm: Bench, real: tuple[ModelSource, Any, Policy]) -> Bench:
    """vLLM, and a policy over vLLM's own weights."""
    source, tokenizer, _ = real
    meta_model = build_meta_model(source, dtype="float32", trust_remote_code=False, attention=NAME)
    model = share_weights(meta_model, vllm.engine.base_weights(), device="cpu")  # type: ignore[attr-defined]
    policy = Policy(model, lora=LORA, seed=0, temperature=1.0, logit_chunk_tokens=256, gradient_checkpointing=False)
    return Bench("shared", vllm.engine, policy, tokenizer)
