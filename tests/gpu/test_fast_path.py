"""The fast path on a GPU against plain passes: kernels, gradients, offloading, shared weights in bf16 and nf4."""

import gc
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from actors.lora import FlatLora, adapter_layout
from actors.models import ModelSource, end_of_sequence_ids, load_base_model, load_tokenizer
from actors.rollout import RolloutWorker
from actors.shared import Nf4Weight, attach, build_skeleton, weights_of
from actors.types import Prompt, Request, Sampling
from benchmarks.common import sample_groups
from conf.schema import LearnerSettings, LoraSettings
from learner.attention import NAME
from learner.batch import Rollouts
from learner.learner import Learner
from learner.policy import Policy
from learner.softmax import softmax_
from tests.presets import objective
from tests.rollouts import group, scored, table

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LORA: dict[str, Any] = {"rank": 16, "alpha": 32.0, "target_modules": LoraSettings().target_modules}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_kernel_equals_float64(dtype: torch.dtype):
    logits = (3 * torch.randn(37, 49152 + 13, device="cuda")).to(dtype)
    targets = torch.randint(0, logits.shape[1], (37,), device="cuda")
    expected = (logits.double() / 0.7).log_softmax(1)
    found, logprobs, entropy = softmax_(logits.clone(), targets, temperature=0.7)
    assert relative(logprobs, expected.gather(1, targets[:, None])[:, 0]) < 1e-5
    assert relative(entropy, -(expected.exp() * expected).sum(1)) < 1e-5
    assert relative(found, expected.exp()) < 4e-3


def base(path: str, dtype: str, attention: str = NAME) -> Any:
    return load_base_model(
        ModelSource(path, None, ""), dtype=dtype, device="cuda", quantization="none", trust_remote_code=False,
        attention=attention,
    )  # fmt: skip


def some_rollouts(count: int = 4, length: int = 96) -> Any:
    draw = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(100, 40000, (n,), generator=draw).tolist()

    groups = [
        group(i, [1.0, 0.0, 0.5, 0.25], prompt=tokens(30), completions=[tokens(length + 7 * j) for j in range(4)])
        for i in range(count)
    ]
    return table(groups)


def randomised(lora: FlatLora) -> FlatLora:
    draw = torch.Generator("cuda").manual_seed(1)
    lora.flat.detach().add_(torch.randn(lora.flat.shape, generator=draw, device="cuda"), alpha=0.01)
    return lora


def plain_gradient(path: str, dtype: str, rows: Any) -> torch.Tensor:
    """GRPO's gradient without any of the fast path: one padded-free pass a completion, PEFT's own layers."""
    lora = randomised(FlatLora(base(path, dtype, "sdpa"), **LORA, seed=0))
    rollouts = Rollouts.from_table(rows)
    grpo = objective()
    prepared = grpo.prepare(rollouts.scored, None)
    weights = grpo.weights(rollouts.scored, prepared.used_N)
    for row, (tokens, start) in enumerate(zip(rollouts.token_ids, rollouts.prompt_lengths, strict=True)):
        ids = torch.tensor(tokens, dtype=torch.long, device="cuda")
        logprobs = lora.model(input_ids=ids[None]).logits[0].float().log_softmax(-1)[start - 1 : -1]
        chosen = logprobs.gather(1, ids[start:, None])[:, 0]
        behavior = torch.tensor(rollouts.behavior_logprobs[row], device="cuda")
        weight = (chosen.detach() - behavior).exp().clamp(max=2.0)
        factor = float(prepared.advantages_A[rollouts.starts_N[row]] * weights[row])
        (-factor * (weight * chosen)).sum().backward()
    assert lora.flat.grad is not None
    return lora.flat.grad.clone()


def fast_gradient(path: str, dtype: str, rows: Any, **options: Any) -> torch.Tensor:
    settings = {"gradient_checkpointing": False, "logit_chunk_tokens": 128, **options}
    policy = Policy(base(path, dtype), lora=LORA, seed=0, temperature=1.0, **settings)
    randomised(policy.lora)
    learner = Learner(policy, objective(), LearnerSettings(micro_batch_tokens=700))
    learner.accumulate(rows)
    return policy.lora.flat.grad.clone()


def test_fast_gradients_equal_plain_ones(smollm2: str, capfd: pytest.CaptureFixture[str]):
    rows = some_rollouts()
    exact = plain_gradient(smollm2, "float32", rows)
    assert relative(fast_gradient(smollm2, "float32", rows), exact) < 1e-3  # tf32 is off; float32 sums differ in order
    plain = plain_gradient(smollm2, "bfloat16", rows)
    found = {
        "fast": fast_gradient(smollm2, "bfloat16", rows),
        "unfused": fast_gradient(smollm2, "bfloat16", rows, fused_kernels=False),
        "checkpointed": fast_gradient(smollm2, "bfloat16", rows, gradient_checkpointing=True),
        "offloaded": fast_gradient(smollm2, "bfloat16", rows, gradient_checkpointing=True, offload_activations=True),
    }
    with capfd.disabled():
        print(f"\nbf16 plain against float32 plain {relative(plain, exact):.4f}", end="")
        for name, gradient in found.items():
            print(
                f"\n{name}: against float32 {relative(gradient, exact):.4f}, plain bf16 {relative(gradient, plain):.4f}"
            )
    assert relative(found["checkpointed"], found["fast"]) < 1e-2
    assert relative(found["offloaded"], found["checkpointed"]) < 1e-2
    # No path may be further from the truth than bf16 itself is.
    for gradient in found.values():
        assert relative(gradient, exact) < 1.1 * relative(plain, exact)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_shared_weights_agree_with_the_engine(quantization: str, smollm2: str, capfd: pytest.CaptureFixture[str]):
    from actors.vllm_engine import VllmEngine, VllmOptions

    source = ModelSource(smollm2, None, "")
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    skeleton = build_skeleton(source, dtype="bfloat16", trust_remote_code=False, attention=NAME)
    layout = adapter_layout(skeleton, **LORA)
    options = VllmOptions(
        model_path=smollm2, revision=None, dtype="bfloat16", quantization=quantization, device="cuda", threads=8,
        max_model_len=512, max_num_seqs=64, kv_cache_bytes=1 << 30,
        enforce_eager=True, per_request_seeds=False, seed=0, trust_remote_code=False, share_weights=True,
        keep_16bit=("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"),
    )  # fmt: skip
    engine = VllmEngine(options, tokenizer, layout=layout, eos_token_ids=end_of_sequence_ids(source, tokenizer))
    allocated = torch.cuda.memory_allocated()
    model = attach(skeleton, engine.base_weights(), device="cuda")
    assert torch.cuda.memory_allocated() - allocated < 1 << 20
    kinds = {type(m.weight).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
    assert kinds == ({"Parameter"} if quantization == "none" else {"Parameter", "Params4bit"})
    policy = Policy(model, lora=LORA, seed=0, temperature=1.0, logit_chunk_tokens=512, gradient_checkpointing=False)
    learner = Learner(policy, objective(), LearnerSettings(learning_rate=2e-4))
    engine.load_adapter(learner.adapter())
    worker = RolloutWorker(engine, seed=0)
    means = []
    for step in range(3):
        prompts = []
        for i in range(8):
            question = [{"role": "user", "content": f"What is {i + 8 * step} + {i}?"}]
            text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            prompts.append(Prompt(8 * step + i, text, ids, "", "1", ""))
        groups = sample_groups(worker, prompts, Sampling(1.0, 64), 8)
        rows = table([scored(g) for g in groups])
        of_engine, of_plain = errors(learner, source, rows)
        stats = learner.step(rows)
        means.append((stats.mismatch, of_engine, of_plain))
        engine.load_adapter(learner.adapter())
    with capfd.disabled():
        print(f"\n{quantization}: |engine - learner|, |engine - float32|, |plain bf16 - float32| in the mean:", means)
    for mismatch, of_engine, of_plain in means:
        # The engine is as close to float32 as plain bf16 is, and so they differ by what two bf16 passes do.
        assert of_engine < 1.25 * of_plain
        assert mismatch < 2 * of_plain
    del engine, worker, learner, policy, model, skeleton
    gc.collect()
    torch.cuda.empty_cache()


def test_a_released_cache_comes_back_under_the_same_graphs(smollm2: str):
    """The learner can take the cache's memory meanwhile, and the engine samples as before."""
    from actors.vllm_engine import VllmEngine, VllmOptions

    source, gib = ModelSource(smollm2, None, ""), 1 << 30
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    skeleton = build_skeleton(source, dtype="bfloat16", trust_remote_code=False, attention=NAME)
    layout = adapter_layout(skeleton, **LORA)
    options = VllmOptions(
        model_path=smollm2, revision=None, dtype="bfloat16", quantization="none", device="cuda", threads=8,
        max_model_len=512, max_num_seqs=8, kv_cache_bytes=4 * gib, enforce_eager=False, per_request_seeds=False, seed=0,
        trust_remote_code=False, share_weights=True, release_cache=True,
    )  # fmt: skip
    engine = VllmEngine(options, tokenizer, layout=layout, eos_token_ids=end_of_sequence_ids(source, tokenizer))
    lent = attach(skeleton, engine.base_weights(), device="cuda")
    before = {name: weight.clone() for name, weight in lent.named_parameters()}

    def greedy(tag: str) -> list[tuple[int, ...]]:
        engine.load_adapter(FlatLora(base(smollm2, "bfloat16"), **LORA, seed=0).export(0))
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
    engine.release_cache()
    released = torch.cuda.mem_get_info()[0] - free
    torch.full((3 * gib,), 255, dtype=torch.uint8, device="cuda")
    engine.restore_cache()
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
    lent = weights_of(learner.policy.lora.model)

    def logprobs(weights: Any, dtype: str) -> torch.Tensor:
        skeleton = build_skeleton(source, dtype=dtype, trust_remote_code=False)
        lora = FlatLora(attach(skeleton, weights, device="cuda"), **LORA, seed=0)
        lora.load(learner.adapter())
        found = []
        for tokens, start in zip(rollouts.token_ids, rollouts.prompt_lengths, strict=True):
            ids = torch.tensor(tokens, dtype=torch.long, device="cuda")
            row = lora.model(input_ids=ids[None]).logits[0].float().log_softmax(-1)[start - 1 : -1]
            found.append(row.gather(1, ids[start:, None])[:, 0])
        return torch.cat(found)

    exact = logprobs({name: plain(weight).float() for name, weight in lent.items()}, "float32")
    sampled = torch.cat([torch.tensor(row, device="cuda") for row in rollouts.behavior_logprobs])
    return float((sampled - exact).abs().mean()), float((logprobs(lent, "bfloat16") - exact).abs().mean())


def plain(weight: torch.Tensor | Nf4Weight) -> torch.Tensor:
    return dequantize_4bit(weight.packed, weight.state) if isinstance(weight, Nf4Weight) else weight
