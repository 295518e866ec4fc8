"""What only a GPU can show: variable-length attention, bf16 agreement, CUDA graphs under a changing adapter."""

from dataclasses import replace

import pytest
import torch

from actors.engines.vllm.engine import VllmEngine
from actors.models.loading import load_base_model
from actors.models.source import ModelSource
from actors.models.tokenizer import end_of_sequence_ids, load_tokenizer
from actors.rollout import RolloutWorker
from actors.types import Prompt, Request, Sampling
from benchmarks.common import sample_groups
from learner.learner import Learner
from learner.model.attention import NAME, Scores, _padded, _varlen
from learner.model.flex_attention import flex
from learner.model.policy import Policy
from learner.packing import Packing, Segment
from tests.helpers.engines import GPU_OPTIONS
from tests.helpers.gpu import LORA, NEEDS_GPU, chat_prompt
from tests.helpers.learners import make_learner
from tests.helpers.presets import algorithm
from tests.helpers.rollouts import scored, table

pytestmark = NEEDS_GPU


SINKS = torch.linspace(-2.0, 2.0, 9)


@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"),
    [(None, None, False), (20, None, False), (None, 2.0, False), (20, 2.0, False), (20, None, True)],
)
def test_fast_attention_equals_padded_attention(window: int | None, softcap: float | None, has_sinks: bool):
    sinks = SINKS.cuda() if has_sinks else None
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
    scores = Scores(scale=64**-0.5, window=window, softcap=softcap, sinks=sinks)
    if scores.is_plain:
        fast = _varlen(q, k, v, scores=scores, packing=packing)
    else:
        fast = flex(*(x.transpose(0, 1)[None] for x in (q, k, v)), scores=scores, packing=packing)[0]
    slow = _padded(q.float(), k.float(), v.float(), scores=scores, packing=packing)
    assert ((fast - slow).norm() / slow.norm()) < 1e-2
    fast_gradients = torch.autograd.grad(fast, (q, k, v), upstream)
    slow_gradients = torch.autograd.grad(slow, (q, k, v), upstream.float())
    for a, b in zip(fast_gradients, slow_gradients, strict=True):
        assert ((a - b).norm() / b.norm()) < 2e-2


def test_engine_and_learner_agree_in_bf16(smollm2: str, capfd: pytest.CaptureFixture[str]):
    source = ModelSource(smollm2, None, "")
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    base = load_base_model(
        source, dtype="bfloat16", device="cuda", quantization="none", trust_remote_code=False, attention=NAME
    )
    policy = Policy(base, lora=LORA, seed=0, temperature=1.0, logit_chunk_tokens=4096, gradient_checkpointing=False)
    learner = make_learner(policy, algorithm(), learning_rate=5e-4)
    options = replace(GPU_OPTIONS, model_path=smollm2)
    engine = VllmEngine(
        options, tokenizer, layout=policy.lora.layout, eos_token_ids=end_of_sequence_ids(source, tokenizer)
    )
    engine.load_adapter(learner.adapter())
    worker = RolloutWorker(engine, seed=0)
    long = "Remember this: " + "apples are red, " * 40  # many cache blocks: a stale prefix would show
    prompts = [chat_prompt(tokenizer, i, f"{long} and what is {i} + {i}?", str(2 * i)) for i in range(8)]
    means = []
    for _ in range(4):
        groups = sample_groups(worker, prompts, Sampling(1.0, 64), 8)
        stats = learner.step(table([scored(g) for g in groups]))
        means.append((stats.logprob_gap, stats.logprob_gap_max))
        engine.load_adapter(learner.adapter())
    with capfd.disabled():
        print("\nbf16 mean and max |engine - learner| before each update:", [f"{a:.4f} {b:.3f}" for a, b in means])
    assert max(mean for mean, _ in means) < 0.05
    check_stop_texts(engine, prompts[0], learner)


def check_stop_texts(engine: VllmEngine, prompt: Prompt, learner: Learner) -> None:
    """A step is under way whenever an answer ends with a text or an adapter comes; nothing is counted twice."""
    stop, after = ",", {}
    requests = [Request(f"stop/{i}", prompt.token_ids, Sampling(1.0, 64, stop=(stop,))) for i in range(64)]
    engine.submit(requests)
    steps = 0
    while engine.unfinished:
        after |= {c.request_id: c for c in engine.step()}
        steps += 1
        if steps % 3 == 0:
            engine.load_adapter(replace(learner.adapter(), version=100 + steps))
    stopped = [c for c in after.values() if c.text.endswith(stop)]
    assert len(after) == 64 and len(stopped) > 8
    assert all(c.text.count(stop) == 1 and c.finish_reason == "stop" for c in stopped)
    assert all(stop not in c.text for c in after.values() if c not in stopped)
    for c in after.values():
        assert sum(span.count for span in c.version_spans) == len(c.token_ids) == len(c.logprobs)
