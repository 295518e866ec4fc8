"""The memory plan: what it counts, what it chooses, and how it refuses."""

import os
import re
from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from actors.models.families import FAMILIES
from actors.models.loading import keep_language_model, model_class
from benchmarks.family_models import LAYERS, family_config
from conf.compose import load_settings
from conf.errors import UsageError
from conf.schema import Settings
from epiphany.checked_model import check_embedding
from epiphany.memory_settings import asked_of, shares_adapter, taken_by_others, workload_of
from epiphany.run_plan import EXPANDABLE_SEGMENTS, enable_expandable_segments
from learner.memory.advice import MemoryPlanError, longest_answer, plan_memory, room_lines
from learner.memory.footprint import GIB, ROLES, Process
from learner.memory.plan import NO_TILE, TILE, MemoryPlan, first_that_fits, plan_without_gpu
from learner.memory.shape import ModelShape
from learner.model import offload

# Qwen2.5-1.5B and an adapter of rank 16 on all its linear layers.
QWEN = ModelShape(
    layers=28,
    hidden=1536,
    intermediate=8960,
    queries=1536,
    keys=256,
    vocabulary=151936,
    linear=1_310_195_712,
    largest_linear=13_762_560,
    other=233_518_592,
    lora=18_464_768,
)
# Llama-3.1-8B, whose embedding is not its head.
LLAMA = ModelShape(
    layers=32,
    hidden=4096,
    intermediate=14336,
    queries=4096,
    keys=1024,
    vocabulary=128256,
    linear=6_979_321_856,
    largest_linear=58_720_256,
    other=1_050_939_392,
    lora=41_943_040,
    embedding=525_336_576,
)
WORK = (
    "algorithm.prompts_per_step=8",
    "algorithm.group_size=8",
    "sampling.max_tokens=512",
    "data.max_prompt_tokens=128",
)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_shape_of_every_family_is_known(model_type: str):
    config = family_config(model_type)
    with init_empty_weights(include_buffers=False):
        model = model_class(config).from_config(config)
    keep_language_model(model)
    shape = ModelShape.of(model, 100)
    text = config.get_text_config()
    assert (shape.layers, shape.hidden, shape.vocabulary) == (LAYERS, text.hidden_size, 300)
    is_gemma4 = model_type.startswith("gemma4")
    assert (shape.queries, shape.keys) == ((256, 128) if is_gemma4 else (128, 64))
    assert bool(shape.carried) == model_type.startswith("qwen3_5")
    assert shape.linear + shape.other == sum(parameter.numel() for parameter in model.parameters())


def test_a_model_that_does_not_say_the_size_of_its_heads_has_hidden_over_heads():
    config = AutoConfig.for_model("qwen2", hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
    with init_empty_weights():
        shape = ModelShape.of(AutoModelForCausalLM.from_config(config), 100)
    assert (shape.queries, shape.keys) == (96, 32)


def settings_of(*overrides: str) -> Settings:
    return load_settings("experiment=none", "data=file", "data.source=x.jsonl", *overrides)


def plan_of(
    settings: Settings,
    *,
    gib: float,
    shape: ModelShape = QWEN,
    shared: bool = True,
    roles: frozenset[str] = ROLES,
    host_gib: float | None = None,
) -> MemoryPlan:
    """The plan for settings and budgets of `gib` GiB of the card and `host_gib` of the host's memory."""
    workload = workload_of(settings, settings.model.quantization)
    host_budget = None if host_gib is None else int(host_gib * GIB)
    process = Process(int(gib * GIB), shared=shared, roles=roles, host_budget=host_budget)
    return plan_memory(asked_of(settings), workload, shape, process, lora_rank=settings.model.lora.rank)


def test_parts_are_what_a_hand_counts():
    plan = plan_of(settings_of(*WORK), gib=130)
    # 1.5437e9 weights of 2 bytes; 18.46e6 x (4 + 4 + 8 + 2 x 2); 28 layers x 2 x 256 x 2 bytes x 64 x (640 + 32)
    # tokens, and for vLLM's own block.
    assert plan.parts["base weights"] == 2 * (1_310_195_712 + 233_518_592)
    assert plan.parts["adapter, gradient and optimizer"] == 18_464_768 * 20
    assert plan.parts["key-value cache"] == 28_672 * (64 * 672 + 64)
    # Four bytes for each of 151,936 tokens, of 64 sequences and of 128 rows of logits, and four workspaces of 33 MiB.
    assert plan.parts["the engine's buffers"] == 4 * 151_936 * (64 + 128) + 4 * 33 * 2**20
    assert plan.total <= 130 * GIB
    two_copies = plan_of(settings_of(*WORK), gib=130, shared=False)
    assert two_copies.parts["base weights (two copies)"] == 2 * plan.parts["base weights"]


def test_nf4_takes_half_a_byte_and_a_scale_for_64():
    # A byte for the scale of 64 values, and two float32 numbers for 256 scales.
    blocks = 1_310_195_712 // 64
    assert QWEN.weights("nf4") == 1_310_195_712 // 2 + blocks + 8 * blocks // 256 + 2 * 233_518_592
    # Scales that do not fill such blocks stay float32.
    once = replace(QWEN, once_scaled=QWEN.linear)
    assert once.weights("nf4") == 1_310_195_712 // 2 + 4 * blocks + 2 * 233_518_592


def test_a_large_card_keeps_everything_and_a_small_one_recomputes():
    large = plan_of(settings_of(*WORK), gib=130).way
    assert (large.max_num_seqs, large.gradient_checkpointing) == (64, False)
    small = plan_of(settings_of(*WORK, "hardware=7gb", "model.quantization=nf4"), gib=7).way
    assert small.gradient_checkpointing
    assert small.micro_batch_tokens < large.micro_batch_tokens
    assert small.logit_chunk_tokens < large.logit_chunk_tokens


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("gib", [5, 7, 7.4, 11.2, 14.4, 22.4, 44, 76])
def test_every_plan_stays_under_its_budget(quantization: str, gib: float):
    for max_tokens in (64, 1024):
        settings = settings_of(*WORK, f"model.quantization={quantization}", f"sampling.max_tokens={max_tokens}")
        try:
            plan = plan_of(settings, gib=gib)
        except MemoryPlanError:
            assert quantization == "none" and gib == 5
            continue
        assert plan.total <= gib * GIB
        assert plan.way.max_num_seqs >= 1
        assert plan.allocator_bytes < gib * GIB


def test_what_the_user_sets_is_kept():
    chosen = ("engine.max_num_seqs=12", "learner.micro_batch_tokens=3000", "learner.gradient_checkpointing=true")
    way = plan_of(settings_of(*WORK, *chosen), gib=130).way
    assert way.max_num_seqs == 12
    assert way.micro_batch_tokens == 3000
    assert way.gradient_checkpointing is True
    assert way.offload_activations is False


def test_staleness_needs_as_many_sequences_as_may_be_in_flight():
    plan = plan_of(settings_of(*WORK, "runtime.max_staleness=2"), gib=130)
    assert plan.way.max_num_seqs == 192


def test_a_budget_that_is_too_small_says_by_how_much_and_what_would_fit():
    with pytest.raises(MemoryPlanError) as caught:
        plan_of(settings_of(*WORK), gib=3.5)
    message = str(caught.value)
    assert "3.50 GiB cannot hold this run" in message and "too much" in message
    assert "model.quantization=nf4: " in message and "fits" in message
    assert "base weights" in message
    # What it says fits does fit.
    fits = plan_of(settings_of(*WORK, "model.quantization=nf4"), gib=3.5)
    assert fits.total <= 3.5 * GIB


@pytest.mark.parametrize("change", ["algorithm=ppo", "algorithm.entropy_coefficient=0.01"])
def test_a_critic_and_an_entropy_bonus_are_counted(change: str):
    fixed = (*WORK, "engine.max_num_seqs=64")
    micro_batch_tokens = plan_of(settings_of(*fixed), gib=40).way.micro_batch_tokens
    fixed += (f"learner.micro_batch_tokens={micro_batch_tokens}", "learner.gradient_checkpointing=true")
    plain, more = (plan_of(settings_of(*fixed, *changes), gib=60) for changes in ((), (change,)))
    assert more.parts["activations and logits"] > plain.parts["activations and logits"]


@pytest.mark.parametrize("change", ["learner.optimizer=adamw8bit", "engine.kv_cache_dtype=fp8"])
def test_the_settings_that_take_less_take_less(change: str):
    fixed = (*WORK, "engine.max_num_seqs=64")
    assert plan_of(settings_of(*fixed, change), gib=90).total < plan_of(settings_of(*fixed), gib=90).total


def test_staleness_changes_no_number_of_sequences_that_the_user_sets():
    settings = settings_of(*WORK, "engine.max_num_seqs=64")
    stale = replace(settings, runtime=replace(settings.runtime, max_staleness=1))
    assert plan_of(stale, gib=90).way.max_num_seqs == 64


def test_the_engine_sleeps_before_activations_are_offloaded_and_only_then():
    small = ("hardware=7gb", "algorithm.prompts_per_step=12", "sampling.max_tokens=512", "data.max_prompt_tokens=128")
    plan = plan_of(settings_of(*small), gib=7)
    assert plan.way.sleep_mode and plan.way.max_num_seqs == 96
    assert plan.total <= 7 * GIB and "the engine sleeps while the learner works" in plan.lines()[-1]
    assert plan.way.kv_cache_bytes == 28_672 * (96 * 672 + 64)
    assert plan.allocator_bytes == 7 * GIB - plan.parts["CUDA context and graphs"]
    awake = plan_of(settings_of(*small, "engine.sleep_mode=false"), gib=7)
    assert awake.way.offload_activations and not plan.way.offload_activations
    stale = plan_of(settings_of(*small, "runtime.max_staleness=1"), gib=7)
    assert not stale.way.sleep_mode
    assert not plan_of(settings_of(*WORK), gib=80).way.sleep_mode


def test_a_card_that_holds_not_all_sequences_holds_nearly_all():
    gsm8k = ("hardware=7gb", "model.quantization=nf4", "sampling.max_tokens=512", "data.max_prompt_tokens=512")
    plan = plan_of(settings_of(*gsm8k, "algorithm.prompts_per_step=16", "algorithm.group_size=8"), gib=7)
    # Half of them would fit while the learner works, all of them only when the engine sleeps then.
    assert (plan.way.max_num_seqs, plan.way.full_length_seqs, plan.way.sleep_mode) == (128, 128, True)
    fewer = plan_of(settings_of(*gsm8k, "algorithm.prompts_per_step=16", "algorithm.group_size=10"), gib=7)
    assert (fewer.way.max_num_seqs, fewer.way.full_length_seqs) == (160, 120)
    assert fewer.way.kv_cache_bytes == 28_672 * (120 * 1056 + 64)
    assert "160 sequences at a time (120 at full length)" in fewer.lines()[-1]


def test_without_a_gpu_nothing_is_left_open():
    settings = settings_of()
    way = plan_without_gpu(asked_of(settings), workload_of(settings, "none"), QWEN, value_bytes=4)
    assert way.kv_cache_bytes == 2 * 28_672 * (64 * (256 + 512 + 32) + 64)
    assert (way.max_num_seqs, way.micro_batch_tokens, way.logit_chunk_tokens) == (64, 8192, 1024)
    assert way.gradient_checkpointing is False and way.offload_activations is False


def test_an_engine_over_devices_takes_its_part_of_weights_and_cache_from_each():
    rollout = frozenset({"rollout"})
    whole = plan_of(settings_of(*WORK), gib=130, roles=rollout)
    half = plan_of(settings_of(*WORK), gib=130, shape=QWEN.shard(2), roles=rollout)
    for name in ("base weights", "key-value cache"):
        assert half.parts[name] == pytest.approx(whole.parts[name] / 2, rel=1e-6)
    assert half.parts["adapter, gradient and optimizer"] == whole.parts["adapter, gradient and optimizer"]


def test_memory_grows_in_place_unless_the_environment_configures_it(monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    enable_expandable_segments()
    assert told == [] and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    enable_expandable_segments()
    # vLLM's sleep mode reads the variable, torch the call.
    assert told == [EXPANDABLE_SEGMENTS] and os.environ["PYTORCH_CUDA_ALLOC_CONF"] == EXPANDABLE_SEGMENTS


@pytest.mark.parametrize("tokens", [90_000, 98_304, 100_000, 1_000_000])
def test_completions_too_long_for_any_plan_are_refused_with_a_sentence(tokens: int):
    settings = settings_of(*WORK, f"sampling.max_tokens={tokens}")
    with pytest.raises(MemoryPlanError, match=r"cannot hold this run.*(?s:.)*sampling\.max_tokens"):
        plan_of(settings, gib=7)


def test_one_long_completion_is_a_micro_batch():
    long = ("algorithm.prompts_per_step=1", "algorithm.group_size=2", "sampling.max_tokens=100_000")
    plan = plan_of(settings_of(*WORK, *long), gib=400)
    assert plan.way.micro_batch_tokens >= 100_128


def room(gib: float, *more: str, positions: int | None = 32768) -> list[str]:
    settings = load_settings(*WORK, *more)
    workload, process = workload_of(settings, settings.model.quantization), Process(int(gib * GIB), True, ROLES)
    return room_lines(asked_of(settings), workload, QWEN, process, positions=positions)


def test_an_embedding_that_is_not_the_head_goes_to_the_host_before_activations_do():
    small = ("model.quantization=nf4", "algorithm.prompts_per_step=1", "algorithm.group_size=8")
    plan = plan_of(settings_of(*WORK, *small), gib=9.2, shape=LLAMA)
    assert plan.way.embedding_on_host and not plan.way.offload_activations
    assert plan.parts["base weights"] == LLAMA.weights("nf4") - 2 * 525_336_576
    assert plan.on_host == 2**30 and "in the memory of the host" in "\n".join(plan.lines())
    smaller = plan_of(settings_of(*WORK, *small), gib=7.4, shape=LLAMA)
    assert smaller.way.embedding_on_host and smaller.way.offload_activations
    # The inputs of 32 layers and 4 for the last norm in slabs of 64 MiB: 1,024 tokens of 4,096 numbers take one.
    assert smaller.way.micro_batch_tokens == 1024 and smaller.on_host == 2**30 + 36 * 2**26
    kept = plan_of(settings_of(*WORK, *small, "model.embedding_on_host=false"), gib=9.2, shape=LLAMA)
    assert not kept.way.embedding_on_host and kept.way.offload_activations
    assert not plan_of(settings_of(*WORK, "model.quantization=nf4"), gib=5).way.embedding_on_host


def test_a_host_without_room_for_what_would_move_there_is_refused_with_a_sentence():
    small = settings_of(*WORK, "model.quantization=nf4", "algorithm.prompts_per_step=1")
    with pytest.raises(MemoryPlanError, match=r"needs 3\.25 GiB of the host's memory, too, which has 2\.00 GiB"):
        plan_of(small, gib=7.4, shape=LLAMA, host_gib=2)
    # Where a way without it fits, that is taken.
    assert plan_of(small, gib=12, shape=LLAMA, host_gib=0).on_host == 0


def test_moments_get_8_bits_before_fewer_than_half_of_the_sequences_are_sampled_at_a_time():
    work = (*WORK, "model.quantization=nf4", "algorithm.prompts_per_step=1", "sampling.max_tokens=2048")
    plans = [plan_of(settings_of(*work), gib=gib, shape=LLAMA).way for gib in (9, 8.5, 8, 7.6, 7.4)]
    chosen = [(way.optimizer, way.full_length_seqs) for way in plans]
    assert chosen == [("adamw", 7), ("adamw", 5), ("adamw8bit", 4), ("adamw8bit", 3), ("adamw8bit", 2)]
    asked = plan_of(settings_of(*work, "learner.optimizer=adamw"), gib=8, shape=LLAMA)
    assert (asked.way.optimizer, asked.way.full_length_seqs) == ("adamw", 3)
    assert "moments in 8 bits" in plan_of(settings_of(*work), gib=8, shape=LLAMA).lines()[-1]


def test_a_cache_of_the_users_holds_as_many_sequences_as_fit_into_it():
    way = plan_of(settings_of(*WORK, "engine.kv_cache_gib=0.5"), gib=40).way
    # 0.5 GiB are 18,724 tokens, and a sequence takes 672.
    assert (way.kv_cache_bytes, way.full_length_seqs, way.max_num_seqs) == (GIB // 2, 27, 64)
    with pytest.raises(MemoryPlanError, match=r"engine\.kv_cache_gib: 0\.01 GiB hold not even one sequence of 640"):
        plan_of(settings_of(*WORK, "engine.kv_cache_gib=0.01"), gib=40)


def test_a_base_that_is_split_leaves_a_part_two_layers_and_all_scales():
    half = LLAMA.shard_layers(2)
    two_layers = 2 * -(-LLAMA.linear // 32)
    assert half.linear == LLAMA.linear // 2 + two_layers
    blocks = LLAMA.linear // 64
    assert half.weights("nf4") == half.linear // 2 + blocks + 8 * blocks // 256 + 2 * LLAMA.other
    assert LLAMA.shard_layers(1) == LLAMA


def test_one_copy_of_the_adapter_is_two_bytes_less_and_a_slot_may_be_wider():
    settings = settings_of(*WORK)
    one, wide = (settings_of(*WORK, *more) for more in ((), ("model.lora.rank=9", "model.lora.alpha=18")))
    targets = ("q_proj", "down_proj")
    assert shares_adapter(settings, targets, engine_name="vllm")
    assert not shares_adapter(settings, ("qkv_proj",), engine_name="vllm")
    assert not shares_adapter(settings, targets, engine_name="transformers")
    assert not shares_adapter(settings_of(*WORK, "runtime.max_staleness=1"), targets, engine_name="vllm")
    sizes = []
    for asked, shared in ((one, False), (one, True), (wide, True)):
        process, workload = Process(90 * GIB, True, shares_adapter=shared), workload_of(asked, "none")
        plan = plan_memory(asked_of(asked), workload, QWEN, process, lora_rank=9)
        sizes.append(plan.parts["adapter, gradient and optimizer"])
    # Weights, gradient and two moments in float32; the engine's slot of rank 16 where 9 were asked for.
    assert sizes == [20 * QWEN.lora, 18 * QWEN.lora, int((16 + 2 * 16 / 9) * QWEN.lora)]


def test_what_the_user_forbids_is_not_planned():
    small = (*WORK, "model.quantization=nf4", "algorithm.prompts_per_step=1", "learner.gradient_checkpointing=false")
    for gib in (8, 10, 12, 16, 20, 30):
        try:
            way = plan_of(settings_of(*small), gib=gib, shape=LLAMA).way
        except MemoryPlanError:
            continue
        assert not way.gradient_checkpointing and not way.offload_activations
    asked = plan_of(settings_of(*WORK, "learner.offload_activations=true"), gib=60)
    assert asked.way.gradient_checkpointing and asked.way.offload_activations


def test_pairs_of_answers_need_a_micro_batch_for_both():
    long = ("algorithm.prompts_per_step=1", "algorithm.group_size=2", "sampling.max_tokens=60_000")
    single, pairs = (
        plan_of(settings_of(*WORK, *long, f"algorithm={name}"), gib=400) for name in ("rloo", "online_dpo")
    )
    key = "activations and logits"
    assert pairs.way.micro_batch_tokens >= 120_128 and pairs.parts[key] > single.parts[key]


@pytest.mark.parametrize(
    ("device", "shape", "message"),
    [("cpu", LLAMA, "in the host's memory without a GPU"), ("cuda", QWEN, "is its head, too")],
)
def test_an_embedding_that_cannot_move_is_refused(device: str, shape: ModelShape, message: str):
    check_embedding(settings_of(), QWEN, device="cpu")
    check_embedding(settings_of("model.embedding_on_host=true"), LLAMA, device="cuda")
    with pytest.raises(UsageError, match=f"model.embedding_on_host=true: .*{message}"):
        check_embedding(settings_of("model.embedding_on_host=true"), shape, device=device)


def test_slabs_of_the_hosts_memory_are_used_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(offload, "SLAB_BYTES", 64)
    memory = offload.HostMemory()
    first, rest = memory.take(128), memory.take(65)
    assert [len(slabs) for slabs in (first, rest)] == [2, 2] and all(len(slab) == 64 for slab in first + rest)
    addresses = {slab.data_ptr() for slab in first + rest}
    assert len(addresses) == 4
    memory.give_back(first)
    memory.give_back(rest)
    again = memory.take(4 * 64)
    assert {slab.data_ptr() for slab in again} == addresses
    assert memory.take(1)[0].data_ptr() not in addresses


def test_a_card_that_others_use_is_named(monkeypatch: pytest.MonkeyPatch):
    def lines(limit: str, free: float) -> list[str]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * GIB), 24 * GIB))
        return taken_by_others(settings_of(f"hardware.vram_gib={limit}"))

    assert lines("null", 3) == [] and lines("20", 22) == []
    assert lines("20", 12.5) == [
        "hardware.vram_gib=20: this card has 24.00 GiB, of which 12.50 are free: other processes have the rest "
        "(nvidia-smi shows them)"
    ]
    assert lines("44", 23.5) == ["hardware.vram_gib=44: this card has 24.00 GiB, of which 23.50 are free"]


def test_an_mlp_in_tiles_needs_no_more_for_a_longer_stream():
    short, long = (LLAMA.recomputed(tokens, tile=TILE) for tokens in (TILE, 32 * TILE))
    whole = LLAMA.recomputed(32 * TILE, tile=NO_TILE)
    assert long < 0.5 * whole and long < 32 * short
    assert replace(LLAMA, tiles_mlp=False).recomputed(32 * TILE, tile=TILE) == whole


def test_the_longest_answer_fits_and_one_token_more_does_not():
    settings = load_settings(*WORK, "model.quantization=nf4")
    asked, workload = asked_of(settings), workload_of(settings, "nf4")
    process = Process(8 * GIB, True, ROLES)
    longest = longest_answer(asked, workload, QWEN, process, most=10**6)
    assert 1024 < longest < 10**6
    for tokens, fits in ((longest, True), (longest + 1, False)):
        plan, _ = first_that_fits(asked, replace(workload, max_tokens=tokens), QWEN, process)
        assert (plan is not None) == fits
    assert longest_answer(asked, workload, QWEN, Process(GIB, True, ROLES), most=10**6) == 0


def test_what_more_memory_would_buy_is_said():
    few, more = room(3.5, "model.quantization=nf4"), room(4.5, "model.quantization=nf4")
    longest = [
        int(re.findall(r"up to ([\d,]+) tokens", line)[0].replace(",", "")) for line in (few[0], few[1], more[0])
    ]
    assert longest[0] < longest[1] == longest[2]
    assert room(200) == [
        "answers of up to 32,640 tokens fit, all that the model has positions for",
        "one GiB more would buy nothing",
    ]
    assert (
        "sequences at full length at a time instead of"
        in room(5, "algorithm.prompts_per_step=64", "model.quantization=nf4")[1]
    )
