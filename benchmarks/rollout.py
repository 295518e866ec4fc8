"""The engine alone against `transformers.generate`: `python -m benchmarks.rollout [override ...]`.

One JSON line a batch size. Same random weights, same adapter, same prompts, sampling to the limit; the ratio at 64
sequences and at the engine's best. Needs a GPU.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel

from actors.engines.base import Engine
from actors.models.loading import load_base_model
from actors.models.lora import FlatLora, lora_arguments_of
from actors.types import Sampling
from benchmarks.common import build_workers, report, sample_all
from benchmarks.work import prompts_of, random_rollouts, work_settings

SIZES = (8, 64, 128, 256, 512)
GROUP = 8  # sequences of each prompt


def engine_rate(engine: Engine, prompts: list[tuple[int, ...]], *, count: int, tokens: int) -> float:
    """Sampled tokens a second with `count` sequences at the same time."""
    sequences = [prompts[i // GROUP % len(prompts)] for i in range(count)]
    start = time.perf_counter()
    completions = sample_all(engine, sequences, Sampling(1.0, tokens))
    return sum(len(completion.token_ids) for completion in completions) / (time.perf_counter() - start)


def generate_rate(model: PeftModel, prompts: list[tuple[int, ...]], *, count: int, tokens: int) -> float:
    """The same by transformers; the better of two runs."""
    ids = torch.tensor([prompts[i // GROUP % len(prompts)] for i in range(count)], device="cuda")
    generate, rates = cast("Callable[..., torch.Tensor]", model.generate), []
    for _ in range(2):
        start = time.perf_counter()
        output = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
            use_cache=True,
        )
        torch.cuda.synchronize()
        rates.append(count * (output.shape[1] - ids.shape[1]) / (time.perf_counter() - start))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--generate-tokens", type=int, default=128)
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        limits = [f"engine.max_num_seqs={max(SIZES)}", "learner.micro_batch_tokens=8192"]
        settings = work_settings("w", Path(folder), *limits, *overrides)
        workers = build_workers(settings)
        plan = workers.plan
        prompts = list(dict.fromkeys(prompts_of(random_rollouts(settings, plan.shape.vocabulary))))
        engine_rate(workers.engine, prompts, count=max(SIZES), tokens=32)
        rates = {n: engine_rate(workers.engine, prompts, count=n, tokens=arguments.tokens) for n in SIZES}
        base = load_base_model(
            plan.source,
            dtype=plan.device.dtype,
            device=plan.device.kind,
            quantization=plan.engine.quantization,
            trust_remote_code=False,
        )
        base.config.use_cache = True
        model = FlatLora(base, **lora_arguments_of(plan.layout), seed=0).model.eval()
        plain = {n: generate_rate(model, prompts, count=n, tokens=arguments.generate_tokens) for n in (64, 256)}
    for n, rate in rates.items():
        ratio = {"ratio": rate / plain[n]} if n in plain else {}
        report(
            benchmark="rollout",
            sequences=n,
            tokens_per_second=rate,
            generate=plain.get(n),
            overrides=overrides,
            **ratio,
        )
    best = max(rates.values())
    report(benchmark="rollout", sequences="best", tokens_per_second=best, ratio_to_generate_at_64=best / plain[64])


if __name__ == "__main__":
    main()
