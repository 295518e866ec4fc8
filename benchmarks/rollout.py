"""The engine alone against `transformers.generate`: `python -m benchmarks.rollout [override ...]`, one JSON line a batch size.

Same random weights, same adapter, same prompts, sampling to the limit; the ratio at 64 sequences and at the engine's best.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from actors.build import lora_arguments
from actors.lora import FlatLora
from actors.models import load_base_model
from actors.types import Request, Sampling
from benchmarks.common import build_workers, report
from benchmarks.work import prompts_of, random_rollouts, work_settings

SIZES = (8, 64, 128, 256, 512)


def engine_rate(engine: Any, prompts: list[tuple[int, ...]], count: int, tokens: int, tag: str) -> float:
    """Sampled tokens a second with `count` sequences in flight, eight of each prompt."""
    requests = [Request(f"{tag}/{i}", prompts[i // 8 % len(prompts)], Sampling(1.0, tokens)) for i in range(count)]
    engine.submit(requests)
    start, sampled = time.perf_counter(), 0
    while engine.unfinished:
        sampled += sum(len(c.token_ids) for c in engine.step())
    return sampled / (time.perf_counter() - start)


def generate_rate(model: Any, prompts: list[tuple[int, ...]], count: int, tokens: int) -> float:
    ids = torch.tensor([prompts[i // 8 % len(prompts)] for i in range(count)], device="cuda")
    rates = []
    for _ in range(2):
        start = time.perf_counter()
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, use_cache=True,
        )  # fmt: skip
        torch.cuda.synchronize()
        rates.append(count * (found.shape[1] - ids.shape[1]) / (time.perf_counter() - start))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--generate-tokens", type=int, default=128)
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        wanted = [f"engine.max_num_seqs={max(SIZES)}", "learner.micro_batch_tokens=8192", *overrides]
        settings = work_settings("w", Path(folder), *wanted)
        workers = build_workers(settings)
        prompts = prompts_of(random_rollouts(settings, 151000))[::8]
        engine_rate(workers.engine, prompts, max(SIZES), 32, "warm")
        rates = {n: engine_rate(workers.engine, prompts, n, arguments.tokens, f"{n}") for n in SIZES}
        base = load_base_model(
            workers.blueprint.source,
            dtype=workers.blueprint.machine.dtype,
            device="cuda",
            quantization=settings.model.quantization,
            trust_remote_code=False,
        )
        base.config.use_cache = True
        model = FlatLora(base, **lora_arguments(settings), seed=0).model.eval()
        plain = {n: generate_rate(model, prompts, n, arguments.generate_tokens) for n in (64, 256)}
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
