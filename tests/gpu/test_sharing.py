"""One copy of the weights on a GPU, in bf16 and nf4: engine and learner agree, and a cache that slept wakes."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from actors.models.loading import load_base_model
from actors.models.lora import FlatLora, adapter_layout
from actors.models.source import ModelSource
from actors.models.tokenizer import end_of_sequence_ids, load_tokenizer
from actors.models.weight_sharing import build_meta_model, named_base_weights, share_weights
from actors.rollout import RolloutWorker
from actors.types import Request, Sampling
from benchmarks.common import sample_groups
from benchmarks.model_subject import unpacked
from learner.batch import Rollouts
from learner.learner import Learner
from learner.model.attention import NAME
from learner.model.policy import Policy
from tests.helpers.engines import GPU_OPTIONS
from tests.helpers.gpu import LORA, NEEDS_GPU, chat_prompt
from tests.helpers.learners import make_learner
from tests.helpers.presets import algorithm
from tests.helpers.rollouts import scored, table

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_shared_weights_agree_with_the_engine(quantization: str, smollm2: str, capfd: pytest.CaptureFixture[str]):
    from actors.engines.vllm.engine import VllmEngine

    source = ModelSource(smollm2, None, "")
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    meta_model = build_meta_model(source, dtype="bfloat16", trust_remote_code=False, attention=NAME)
    layout = adapter_layout(meta_model, **LORA)
    options = replace(
        GPU_OPTIONS,
        model_path=smollm2,
        quantization=quantization,
        enforce_eager=True,
        keep_16bit=tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv"),
        share_weights=True,
    )
    engine = VllmEngine(options, tokenizer, layout=layout, eos_token_ids=end_of_sequence_ids(source, tokenizer))
    allocated = torch.cuda.memory_allocated()
    model = share_weights(meta_model, engine.base_weights(), device="cuda")
    assert torch.cuda.memory_allocated() - allocated < 1 << 20
    kinds = {type(m.weight).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
    assert kinds == ({"Parameter"} if quantization == "none" else {"Parameter", "Params4bit"})
    policy = Policy(model, lora=LORA, seed=0, temperature=1.0, logit_chunk_tokens=512, gradient_checkpointing=False)
    learner = make_learner(policy, algorithm(), learning_rate=2e-4)
    engine.load_adapter(learner.adapter())
    worker = RolloutWorker(engine, seed=0)
    means = []
    for step in range(3):
        ordinals = [8 * step + i for i in range(8)]
        prompts = [chat_prompt(tokenizer, o, f"What is {o} + {i}?", "1") for i, o in enumerate(ordinals)]
        groups = sample_groups(worker, prompts, Sampling(1.0, 64), 8)
        rows = table([scored(g) for g in groups])
        of_engine, of_plain = errors(learner, source, rows)
        stats = learner.step(rows)
        means.append((stats.logprob_gap, of_engine, of_plain))
        engine.load_adapter(learner.adapter())
    with capfd.disabled():
        print(f"\n{quantization}: |engine - learner|, |engine - float32|, |plain bf16 - float32| in the mean:", means)
    for logprob_gap, of_engine, of_plain in means:
        # The engine is as close to float32 as plain bf16 is, and so they differ by what two bf16 passes do.
        assert of_engine < 1.25 * of_plain
        assert logprob_gap < 2 * of_plain
    del engine, worker, learner, policy, model, meta_model
    gc.collect()
    torch.cuda.empty_cache()


def test_a_cache_that_slept_wakes_under_the_same_graphs(smollm2: str):
    """The learner can take the cache's memory meanwhile, and the engine samples as before."""
    from actors.engines.vllm.engine import VllmEngine

    source, gib = ModelSource(smollm2, None, ""), 1 << 30
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    meta_model = build_meta_model(source, dtype="bfloat16", trust_remote_code=False, attention=NAME)
    layout = adapter_layout(meta_model, **LORA)
    options = replace(
        GPU_OPTIONS,
        model_path=smollm2,
        max_num_seqs=8,
        kv_cache_bytes=4 * gib,
        share_weights=True,
        sleep_mode=True,
    )
    engine = VllmEngine(options, tokenizer, layout=layout, eos_token_ids=end_of_sequence_ids(source, tokenizer))
    lent = share_weights(meta_model, engine.base_weights(), device="cuda")
    before = {name: weight.clone() for name, weight in lent.named_parameters()}

    def greedy(tag: str) -> list[tuple[int, ...]]:
        engine.load_adapter(FlatLora(base(source), **LORA, seed=0).export(0))
        prompt = tuple(tokenizer("The capital of France is")["input_ids"])
        engine.submit([Request(f"{tag}/{i}", (*prompt, 300 + i), Sampling(0.0, 48)) for i in range(8)])
        done = {}
        while engine.unfinished:
            done |= {c.request_id.split("/")[1]: c.token_ids for c in engine.step()}
        return [done[name] for name in sorted(done)]

    first = greedy("a")
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    engine.sleep()
    released = torch.cuda.mem_get_info()[0] - free
    torch.full((3 * gib,), 255, dtype=torch.uint8, device="cuda")
    engine.wake()
    assert released > 3.9 * gib
    assert abs(torch.cuda.mem_get_info()[0] - free) < 64 << 20
    assert greedy("b") == first
    for name, weight in lent.named_parameters():
        assert torch.equal(weight, before[name])


@torch.no_grad()
def errors(learner: Learner, source: ModelSource, rows: Any) -> tuple[float, float]:
    """Mean distance of the engine's and of a plain bf16 pass' log-probabilities from float32's, over the same weights.

    The plain pass is transformers' and PEFT's own, one completion at a time.
    """
    rollouts = Rollouts.from_table(rows)
    lent = named_base_weights(learner.policy.lora.model)

    def logprobs(weights: Any, dtype: str) -> torch.Tensor:
        meta_model = build_meta_model(source, dtype=dtype, trust_remote_code=False)
        lora = FlatLora(share_weights(meta_model, weights, device="cuda"), **LORA, seed=0)
        lora.load(learner.adapter())
        parts = []
        for tokens, start in zip(rollouts.token_ids, rollouts.prompt_lengths, strict=True):
            ids = torch.tensor(tokens, dtype=torch.long, device="cuda")
            row = lora.model(input_ids=ids[None]).logits[0].float().log_softmax(-1)[start - 1 : -1]
            parts.append(row.gather(1, ids[start:, None])[:, 0])
        return torch.cat(parts)

    exact = logprobs({name: unpacked(weight).float() for name, weight in lent.items()}, "float32")
    sampled = torch.cat([torch.tensor(row, device="cuda") for row in rollouts.behavior_logprobs])
    return float((sampled - exact).abs().mean()), float((logprobs(lent, "bfloat16") - exact).abs().mean())


def base(source: ModelSource) -> Any:
    return load_base_model(source, dtype="bfloat16", device="cuda", quantization="none", trust_remote_code=False)
