"""What only a GPU can show: variable-length attention, bf16 agreement, CUDA graphs under a changing adapter."""

import pytest
import torch

from actors.engines.base import EngineOptions
from actors.models.loading import load_base_model
from actors.models.lora import LoraArguments
from actors.models.source import ModelSource
from actors.models.tokenizer import end_of_sequence_ids, load_tokenizer
from actors.rollout import RolloutWorker
from actors.types import Prompt, Sampling
from benchmarks.common import sample_groups
from conf.schema import LoraSettings
from learner.model.attention import NAME, _padded, _varlen
from learner.model.policy import Policy
from learner.packing import Packing, Segment
from tests.helpers.learners import make_learner
from tests.helpers.presets import algorithm
from tests.helpers.rollouts import scored, table

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LORA: LoraArguments = {"rank": 16, "alpha": 32.0, "target_modules": LoraSettings().target_modules}


def test_varlen_equals_padded_attention():
    segments, offset = [], 0
    for prompt, completions in [(70, [5, 1, 130]), (3, [2, 64])]:
        start = offset
        segments.append(Segment(offset, prompt))
        offset += prompt
        for length in completions:
            segments.append(Segment(offset, length, start, prompt))
            offset += length
    packing = Packing(segments, "cuda")
    q, k, v = (
        torch.randn(offset, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (9, 3, 3)
    )
    upstream = torch.randn(offset, 9, 64, device="cuda", dtype=torch.bfloat16)
    fast = _varlen(q, k, v, scaling=None, packing=packing)
    slow = _padded(q.float(), k.float(), v.float(), scaling=None, packing=packing)
    assert ((fast - slow).norm() / slow.norm()) < 1e-2
    fast_gradients = torch.autograd.grad(fast, (q, k, v), upstream)
    slow_gradients = torch.autograd.grad(slow, (q, k, v), upstream.float())
    for a, b in zip(fast_gradients, slow_gradients, strict=True):
        assert ((a - b).norm() / b.norm()) < 2e-2


def test_engine_and_learner_agree_in_bf16(smollm2: str, capfd: pytest.CaptureFixture[str]):
    from actors.engines.vllm.engine import VllmEngine

    source = ModelSource(smollm2, None, "")
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    base = load_base_model(
        source, dtype="bfloat16", device="cuda", quantization="none", trust_remote_code=False, attention=NAME
    )
    policy = Policy(base, lora=LORA, seed=0, temperature=1.0, logit_chunk_tokens=4096, gradient_checkpointing=False)
    learner = make_learner(policy, algorithm(), learning_rate=5e-4)
    options = EngineOptions(
        model_path=smollm2,
        revision=None,
        trust_remote_code=False,
        dtype="bfloat16",
        quantization="none",
        device="cuda",
        threads=8,
        max_model_len=512,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        kv_cache_bytes=1 << 30,
        enforce_eager=False,
        per_request_seeds=False,
        seed=0,
    )
    engine = VllmEngine(
        options, tokenizer, layout=policy.lora.layout, eos_token_ids=end_of_sequence_ids(source, tokenizer)
    )
    engine.load_adapter(learner.adapter())
    worker = RolloutWorker(engine, seed=0)
    long = "Remember this: " + "apples are red, " * 40  # many cache blocks: a stale prefix would show
    prompts = []
    for i in range(8):
        question = [{"role": "user", "content": f"{long} and what is {i} + {i}?"}]
        text = str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        prompts.append(Prompt(i, text, ids, "", str(2 * i), ""))
    means = []
    for _ in range(4):
        groups = sample_groups(worker, prompts, Sampling(1.0, 64), 8)
        stats = learner.step(table([scored(g) for g in groups]))
        means.append((stats.logprob_gap, stats.logprob_gap_max))
        engine.load_adapter(learner.adapter())
    with capfd.disabled():
        print("\nbf16 mean and max |engine - learner| before each update:", [f"{a:.4f} {b:.3f}" for a, b in means])
    assert max(mean for mean, _ in means) < 0.05
