"""The memory plan: what it counts, what it chooses, and how it refuses."""

import os
from dataclasses import replace

import pytest
import torch

from benchmarks.common import settings_from
from conf.schema import Settings
from learner.build import GROW_IN_PLACE, let_memory_grow_in_place
from learner.memory import GIB, MemoryPlanError, ModelShape, plan, without_gpu

# Qwen2.5-1.5B and an adapter of rank 16 on all its linear layers.
QWEN = ModelShape(
    layers=28, hidden=1536, intermediate=8960, queries=1536, keys=256, vocabulary=151936, linear=1_310_195_712,
    largest_linear=13_762_560, other=233_518_592, lora=18_464_768,
)  # fmt: skip


def settings(*overrides: str) -> Settings:
    return settings_from("experiment=none", "data=file", "data.source=x.jsonl", *overrides)


WORK = (
    "algorithm.prompts_per_step=8",
    "algorithm.group_size=8",
    "sampling.max_tokens=512",
    "data.max_prompt_tokens=128",
)


def test_parts_are_what_a_hand_counts():
    found = plan(settings(*WORK), QWEN, budget=130 * GIB, shared=True)
    # 1.5437e9 weights of 2 bytes; 18.46e6 x (4 + 4 + 8 + 3 x 2); 28 layers x 2 x 256 x 2 bytes x 65 x (640 + 32) tokens.
    assert found.parts["base weights"] == 2 * (1_310_195_712 + 233_518_592)
    assert found.parts["adapter, gradient and optimizer"] == 18_464_768 * 22
    assert found.parts["key-value cache"] == 28_672 * 65 * 672
    # Four bytes for each of 151,936 tokens, of 64 sequences and of 128 rows of logits, and four workspaces of 33 MiB.
    assert found.parts["the engine's buffers"] == 4 * 151_936 * (64 + 128) + 4 * 33 * 2**20
    assert found.total <= 130 * GIB
    two = plan(settings(*WORK), QWEN, budget=130 * GIB, shared=False)
    assert two.parts["base weights (two copies)"] == 2 * found.parts["base weights"]


def test_nf4_takes_half_a_byte_and_a_scale_for_64():
    assert QWEN.weights("nf4") == 1_310_195_712 // 2 + 1_310_195_712 // 16 + 2 * 233_518_592


def test_a_large_card_keeps_everything_and_a_small_one_recomputes():
    large = plan(settings(*WORK), QWEN, budget=130 * GIB, shared=True).settings
    assert (large.engine.max_num_seqs, large.learner.gradient_checkpointing) == (64, False)
    small = plan(settings(*WORK, "hardware=7gb", "model.quantization=nf4"), QWEN, budget=7 * GIB, shared=True).settings
    assert small.learner.gradient_checkpointing
    assert small.learner.micro_batch_tokens < large.learner.micro_batch_tokens
    assert small.learner.logit_chunk_tokens < large.learner.logit_chunk_tokens


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("gib", [5, 7, 7.4, 11.2, 14.4, 22.4, 44, 76])
def test_every_plan_stays_under_its_budget(quantization: str, gib: float):
    for max_tokens in (64, 1024):
        wanted = settings(*WORK, f"model.quantization={quantization}", f"sampling.max_tokens={max_tokens}")
        try:
            found = plan(wanted, QWEN, budget=int(gib * GIB), shared=True)
        except MemoryPlanError:
            assert quantization == "none" and gib == 5
            continue
        assert found.total <= gib * GIB
        assert found.settings.engine.max_num_seqs >= 1
        assert found.allocator_bytes < gib * GIB


def test_what_the_user_sets_is_kept():
    chosen = ("engine.max_num_seqs=12", "learner.micro_batch_tokens=3000", "learner.gradient_checkpointing=true")
    found = plan(settings(*WORK, *chosen), QWEN, budget=130 * GIB, shared=True).settings
    assert found.engine.max_num_seqs == 12
    assert found.learner.micro_batch_tokens == 3000
    assert found.learner.gradient_checkpointing is True
    assert found.learner.offload_activations is False


def test_staleness_wants_as_many_sequences_as_may_be_in_flight():
    found = plan(settings(*WORK, "runtime.max_staleness=2"), QWEN, budget=130 * GIB, shared=True).settings
    assert found.engine.max_num_seqs == 192


def test_a_budget_that_is_too_small_says_by_how_much_and_what_would_fit():
    with pytest.raises(MemoryPlanError) as caught:
        plan(settings(*WORK), QWEN, budget=int(3.5 * GIB), shared=True)
    message = str(caught.value)
    assert "3.50 GiB cannot hold this run" in message and "too much" in message
    assert "model.quantization=nf4: " in message and "fits" in message
    assert "base weights" in message
    # What it says fits does fit.
    fits = plan(settings(*WORK, "model.quantization=nf4"), QWEN, budget=int(3.5 * GIB), shared=True)
    assert fits.total <= 3.5 * GIB


def test_a_critic_and_an_entropy_bonus_are_counted():
    plain = plan(settings(*WORK, "engine.max_num_seqs=64"), QWEN, budget=40 * GIB, shared=True)
    s = plain.settings
    filled = (f"learner.micro_batch_tokens={s.learner.micro_batch_tokens}", "learner.gradient_checkpointing=true")
    for change in ("algorithm=ppo", "algorithm.entropy_coefficient=0.01"):
        one, other = (
            plan(settings(*WORK, "engine.max_num_seqs=64", *filled, *more), QWEN, budget=60 * GIB, shared=True)
            for more in ((), (change,))
        )
        assert other.parts["activations and logits"] > one.parts["activations and logits"]


def test_the_knobs_that_take_less_take_less():
    base = settings(*WORK, "engine.max_num_seqs=64")
    for change in ("learner.optimizer=adamw8bit", "engine.kv_cache_dtype=fp8"):
        less = settings(*WORK, "engine.max_num_seqs=64", change)
        assert (
            plan(less, QWEN, budget=90 * GIB, shared=True).total < plan(base, QWEN, budget=90 * GIB, shared=True).total
        )
    few = plan(replace(base, runtime=replace(base.runtime, max_staleness=1)), QWEN, budget=90 * GIB, shared=True)
    assert few.settings.engine.max_num_seqs == 64


def test_the_cache_is_lent_before_activations_are_offloaded_and_only_then():
    budget = 7 * GIB
    small = ("hardware=7gb", "algorithm.prompts_per_step=12", "sampling.max_tokens=512", "data.max_prompt_tokens=128")
    found = plan(settings(*small), QWEN, budget=budget, shared=True)
    assert found.settings.engine.release_cache and found.settings.engine.max_num_seqs == 96
    assert found.total <= budget and "the cache lent to the learner" in found.lines()[-1]
    assert found.settings.engine.kv_cache_gib * GIB == 28_672 * 97 * 672
    assert found.allocator_bytes == budget - found.parts["CUDA context and graphs"]
    kept = plan(settings(*small, "engine.release_cache=false"), QWEN, budget=budget, shared=True)
    assert kept.settings.learner.offload_activations and not found.settings.learner.offload_activations
    lagging = plan(settings(*small, "runtime.max_staleness=1"), QWEN, budget=budget, shared=True)
    assert not lagging.settings.engine.release_cache
    assert not plan(settings(*WORK), QWEN, budget=80 * GIB, shared=True).settings.engine.release_cache


def test_without_a_gpu_every_null_is_filled():
    found = without_gpu(settings(), QWEN, entry=4)
    assert found.engine.kv_cache_gib * GIB == 2 * 28_672 * 65 * (256 + 512 + 32)
    assert (found.engine.max_num_seqs, found.learner.micro_batch_tokens, found.learner.logit_chunk_tokens) == (
        64,
        8192,
        1024,
    )
    assert found.learner.gradient_checkpointing is False and found.learner.offload_activations is False


def test_an_engine_over_devices_takes_its_part_of_weights_and_cache_from_each():
    whole = plan(settings(*WORK), QWEN, budget=130 * GIB, shared=True, roles=frozenset({"rollout"}))
    half = plan(settings(*WORK), QWEN.spread(2), budget=130 * GIB, shared=True, roles=frozenset({"rollout"}))
    for name in ("base weights", "key-value cache"):
        assert half.parts[name] == pytest.approx(whole.parts[name] / 2, rel=1e-6)
    assert half.parts["adapter, gradient and optimizer"] == whole.parts["adapter, gradient and optimizer"]


def test_memory_grows_in_place_unless_the_environment_configures_it(monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    let_memory_grow_in_place()
    assert told == [] and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    let_memory_grow_in_place()
    # vLLM's sleep mode reads the one, torch heeds the other.
    assert told == [GROW_IN_PLACE] and os.environ["PYTORCH_CUDA_ALLOC_CONF"] == GROW_IN_PLACE


@pytest.mark.parametrize("tokens", [90_000, 98_304, 100_000, 1_000_000])
def test_answers_too_long_for_any_plan_are_refused_with_a_sentence(tokens: int):
    asked = settings(*WORK, f"sampling.max_tokens={tokens}")
    with pytest.raises(MemoryPlanError, match=r"cannot hold this run.*(?s:.)*sampling\.max_tokens"):
        plan(asked, QWEN, budget=7 * GIB, shared=True)


def test_one_long_answer_is_a_micro_batch():
    asked = settings(*WORK, "algorithm.prompts_per_step=1", "algorithm.group_size=2", "sampling.max_tokens=100_000")
    found = plan(asked, QWEN, budget=400 * GIB, shared=True)
    assert found.settings.learner.micro_batch_tokens >= 100_128
